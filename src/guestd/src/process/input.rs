//! What clients write to a process: its stdin, or the keyboard of its terminal.
//!
//! A process that does not read holds up only the call that writes, and that one for a bounded time; closing stdin and the process's end
//! never wait for a writer that is stuck.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::terminal::Terminal;

/// How long a write without a deadline waits for a process that takes nothing at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long closing stdin lets a write that is on its way go on: enough for a process that reads, nothing for one that does not.
const CLOSE_GRACE: Duration = Duration::from_millis(100);

/// Which of the two a client means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputKind {
    Stdin,
    Terminal,
}

impl InputKind {
    const fn name(self) -> &'static str {
        match self {
            Self::Stdin => "stdin",
            Self::Terminal => "tty",
        }
    }
}

/// The texts are envd's where it has one (contract: envd.md section 1.10).
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    #[error("tty assigned to process: input must be written to the pty, not to stdin")]
    NotStdin,
    #[error("tty not assigned to process: input must be written to stdin, not to a pty")]
    NotTerminal,
    #[error("error writing to {0}: {0} not enabled or closed")]
    Closed(&'static str),
    #[error("error writing to {name}: {source}")]
    Broken { name: &'static str, source: io::Error },
    #[error("error writing to {name}: the process took {taken} of {total} bytes in time")]
    Stalled { name: &'static str, taken: usize, total: usize },
    #[error("error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead")]
    NoCloseForTerminal,
}

#[derive(Debug)]
pub(super) enum Sink {
    Pipe(pipe::Sender),
    Terminal(Arc<Terminal>),
}

impl Sink {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(pipe) => pipe.write(bytes).await,
            Self::Terminal(terminal) => terminal.write(bytes).await,
        }
    }
}

#[derive(Debug)]
pub(super) struct Input {
    kind: InputKind,
    sink: Mutex<Option<Sink>>,
    /// The descriptor of a pipe, open until `closed`.
    pipe: Option<RawFd>,
    closed: watch::Sender<bool>,
}

impl Input {
    /// `None` is a process whose stdin was never open.
    pub(super) fn new(sink: Option<Sink>) -> Self {
        let kind = match &sink {
            Some(Sink::Terminal(_)) => InputKind::Terminal,
            Some(Sink::Pipe(_)) | None => InputKind::Stdin,
        };
        let pipe = match &sink {
            Some(Sink::Pipe(pipe)) => Some(pipe.as_raw_fd()),
            Some(Sink::Terminal(_)) | None => None,
        };
        Self { kind, closed: watch::Sender::new(sink.is_none()), sink: Mutex::new(sink), pipe }
    }

    /// Of a process that was started by the program which this one was before; a terminal's kind stays when it is gone.
    pub(super) fn of_kind(terminal: bool, sink: Option<Sink>) -> Self {
        let kind = if terminal { InputKind::Terminal } else { InputKind::Stdin };
        Self { kind, ..Self::new(sink) }
    }

    /// The pipe, while it is open: for the program that takes this process's place.
    pub(super) fn pipe(&self) -> Option<RawFd> {
        self.pipe.filter(|_| !*self.closed.borrow())
    }

    /// Writes all of `bytes`, or until `deadline`; without one as long as the process keeps taking something.
    ///
    /// # Errors
    /// An [`InputError`]; some of the bytes may have arrived.
    pub(super) async fn write(
        &self,
        kind: InputKind,
        bytes: &[u8],
        deadline: Option<Instant>,
    ) -> Result<(), InputError> {
        match (self.kind, kind) {
            (InputKind::Terminal, InputKind::Stdin) => return Err(InputError::NotStdin),
            (InputKind::Stdin, InputKind::Terminal) => return Err(InputError::NotTerminal),
            _ => {}
        }
        let name = kind.name();
        let mut closed = self.closed.subscribe();
        let limit = || deadline.unwrap_or_else(|| Instant::now() + PATIENCE);
        let stalled = |taken| InputError::Stalled { name, taken, total: bytes.len() };
        let mut sink = tokio::select! {
            biased;
            sink = self.sink.lock() => sink,
            _ = closed.wait_for(|closed| *closed) => return Err(InputError::Closed(name)),
            () = sleep_until(limit()) => return Err(stalled(0)),
        };
        let sink = sink.as_mut().ok_or(InputError::Closed(name))?;
        let mut taken = 0;
        while taken < bytes.len() {
            tokio::select! {
                biased;
                wrote = sink.write(&bytes[taken..]) => match wrote {
                    Ok(count) => taken += count,
                    Err(source) => return Err(InputError::Broken { name, source }),
                },
                // Closed, or the process is gone while a grandchild holds the reading end and never reads.
                _ = closed.wait_for(|closed| *closed) => return Err(InputError::Closed(name)),
                () = sleep_until(limit()) => return Err(stalled(taken)),
            }
        }
        Ok(())
    }

    /// Closes stdin; closing it again is no error.
    ///
    /// # Errors
    /// A terminal has no end of input but the one that is typed.
    pub(super) async fn close(&self) -> Result<(), InputError> {
        if self.kind == InputKind::Terminal {
            return Err(InputError::NoCloseForTerminal);
        }
        if let Ok(mut sink) = timeout(CLOSE_GRACE, self.sink.lock()).await {
            *sink = None;
            self.closed.send_replace(true);
        } else {
            self.end().await;
        }
        Ok(())
    }

    /// The process is gone: whoever still writes is told so.
    pub(super) async fn end(&self) {
        self.closed.send_replace(true);
        *self.sink.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    fn pipe_input() -> (Arc<Input>, pipe::Receiver) {
        let (sender, receiver) = pipe::pipe().unwrap();
        (Arc::new(Input::new(Some(Sink::Pipe(sender)))), receiver)
    }

    fn huge() -> Vec<u8> {
        vec![b'x'; 1 << 20]
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_never_reads_holds_a_writer_for_a_bounded_time() {
        let (input, _reader) = pipe_input();
        let began = Instant::now();
        let error = input.write(InputKind::Stdin, &huge(), None).await.unwrap_err();
        assert!(matches!(error, InputError::Stalled { taken: 65_536, .. }), "{error}");
        assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs());
        let deadline = Instant::now() + Duration::from_millis(200);
        let error = input.write(InputKind::Stdin, b"x", Some(deadline)).await.unwrap_err();
        assert!(matches!(error, InputError::Stalled { taken: 0, .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn closing_does_not_wait_for_a_writer_that_is_stuck() {
        let (input, mut reader) = pipe_input();
        let writer = tokio::spawn({
            let input = Arc::clone(&input);
            async move { input.write(InputKind::Stdin, &huge(), None).await }
        });
        tokio::task::yield_now().await;
        let began = Instant::now();
        input.close().await.unwrap();
        assert!(began.elapsed() <= CLOSE_GRACE + Duration::from_millis(10));
        assert!(matches!(writer.await.unwrap(), Err(InputError::Closed("stdin"))));
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), 65_536, "what was in the pipe is still read");
        input.close().await.unwrap();
        assert!(matches!(input.write(InputKind::Stdin, b"x", None).await, Err(InputError::Closed("stdin"))));
    }

    #[tokio::test]
    async fn each_kind_of_process_says_which_input_it_has() {
        let (input, _reader) = pipe_input();
        let error = input.write(InputKind::Terminal, b"x", None).await.unwrap_err();
        assert!(error.to_string().starts_with("tty not assigned to process"), "{error}");
        let none = Input::new(None);
        let error = none.write(InputKind::Stdin, b"x", None).await.unwrap_err();
        assert_eq!(error.to_string(), "error writing to stdin: stdin not enabled or closed");
    }
}
