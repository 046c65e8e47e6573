//! What clients write to a process: its stdin, or the keyboard of its terminal.
//!
//! A process that does not read holds up only the call that writes, and that one for a bounded time; closing stdin and the process's end
//! never wait for a writer that is stuck.
//!
//! When the agent is about to be replaced no call may be left without an answer, or its client would send the same bytes again: what a
//! process has yet to take is owed to it, the call succeeds, and whoever goes on (the next agent, or this one) pays before newer input.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::terminal::Terminal;

/// How long a write without a deadline waits for a process that takes nothing at all.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long closing stdin lets a write that is on its way go on: enough for a process that reads, nothing for one that does not.
const CLOSE_GRACE: Duration = Duration::from_millis(100);

/// The most that is owed to one process, in bytes: what one request can bring.
const OWED_LIMIT: usize = guestd_protocol::MESSAGE_LIMIT;

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
    #[error(
        "error writing to {name}: the agent is being replaced: the process took {taken} of {total} bytes"
    )]
    Leaving { name: &'static str, taken: usize, total: usize },
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

/// What clients were told is taken and the process has yet to take.
#[derive(Debug, Default)]
pub(super) struct Owed {
    pub(super) pieces: VecDeque<Bytes>,
    /// The end of stdin comes after it.
    pub(super) closing: bool,
}

#[derive(Debug)]
pub(super) struct Input {
    kind: InputKind,
    sink: Mutex<Option<Sink>>,
    /// The descriptor of a pipe, open until `closed`.
    pipe: Option<RawFd>,
    closed: watch::Sender<bool>,
    /// Paid by who has the sink, and by nobody while the agent leaves.
    owed: std::sync::Mutex<Owed>,
    leaving: watch::Sender<bool>,
}

impl Input {
    /// `None` is a process whose stdin was never open. `leaving` is true while the agent is about to be replaced.
    pub(super) fn new(sink: Option<Sink>, leaving: watch::Sender<bool>) -> Self {
        let kind = match &sink {
            Some(Sink::Terminal(_)) => InputKind::Terminal,
            Some(Sink::Pipe(_)) | None => InputKind::Stdin,
        };
        let pipe = match &sink {
            Some(Sink::Pipe(pipe)) => Some(pipe.as_raw_fd()),
            Some(Sink::Terminal(_)) | None => None,
        };
        let closed = watch::Sender::new(sink.is_none());
        Self { kind, closed, sink: Mutex::new(sink), pipe, owed: std::sync::Mutex::default(), leaving }
    }

    /// Of a process that was started by the program which this one was before; a terminal's kind stays when it is gone.
    pub(super) fn restored(
        terminal: bool,
        sink: Option<Sink>,
        owed: Owed,
        leaving: watch::Sender<bool>,
    ) -> Self {
        let kind = if terminal { InputKind::Terminal } else { InputKind::Stdin };
        Self { kind, owed: std::sync::Mutex::new(owed), ..Self::new(sink, leaving) }
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
        mut bytes: Bytes,
        deadline: Option<Instant>,
    ) -> Result<(), InputError> {
        match (self.kind, kind) {
            (InputKind::Terminal, InputKind::Stdin) => return Err(InputError::NotStdin),
            (InputKind::Stdin, InputKind::Terminal) => return Err(InputError::NotTerminal),
            _ => {}
        }
        let (name, total) = (kind.name(), bytes.len());
        let (mut closed, mut leaving) = (self.closed.subscribe(), self.leaving.subscribe());
        if self.owed().closing {
            return Err(InputError::Closed(name));
        }
        let limit = || deadline.unwrap_or_else(|| Instant::now() + PATIENCE);
        let stalled = |left: usize| InputError::Stalled { name, taken: total - left, total };
        // In turn, also when the agent leaves: whoever has the sink gives it up then, and what is owed keeps its order.
        let mut sink = tokio::select! {
            biased;
            sink = self.sink.lock() => sink,
            _ = closed.wait_for(|closed| *closed) => return Err(InputError::Closed(name)),
            () = sleep_until(limit()) => return Err(stalled(total)),
        };
        let sink = sink.as_mut().filter(|_| !self.owed().closing).ok_or(InputError::Closed(name))?;
        loop {
            let owed = self.next_owed();
            let piece = owed.as_ref().unwrap_or(&bytes);
            if piece.is_empty() {
                return Ok(());
            }
            tokio::select! {
                biased;
                _ = leaving.wait_for(|leaving| *leaving) => return self.owe(name, bytes, total),
                wrote = sink.write(piece) => match wrote {
                    Ok(count) if owed.is_some() => self.paid(count),
                    Ok(count) => bytes.advance(count),
                    Err(source) => return Err(InputError::Broken { name, source }),
                },
                // Closed, or the process is gone while a grandchild holds the reading end and never reads.
                _ = closed.wait_for(|closed| *closed) => return Err(InputError::Closed(name)),
                () = sleep_until(limit()) => return Err(stalled(bytes.len())),
            }
        }
    }

    fn owe(&self, name: &'static str, rest: Bytes, total: usize) -> Result<(), InputError> {
        let mut owed = self.owed();
        let held: usize = owed.pieces.iter().map(Bytes::len).sum();
        if held + rest.len() > OWED_LIMIT {
            return Err(InputError::Leaving { name, taken: total - rest.len(), total });
        }
        owed.pieces.push_back(rest);
        Ok(())
    }

    /// Writes what is owed, until there is nothing, the process is gone, or the agent leaves.
    pub(super) async fn pay(&self) {
        let (mut closed, mut leaving) = (self.closed.subscribe(), self.leaving.subscribe());
        let mut sink = tokio::select! {
            biased;
            sink = self.sink.lock() => sink,
            _ = closed.wait_for(|closed| *closed) => return,
            _ = leaving.wait_for(|leaving| *leaving) => return,
        };
        while let (Some(open), Some(piece)) = (sink.as_mut(), self.next_owed()) {
            tokio::select! {
                biased;
                _ = leaving.wait_for(|leaving| *leaving) => return,
                _ = closed.wait_for(|closed| *closed) => return,
                wrote = open.write(&piece) => match wrote {
                    Ok(count) => self.paid(count),
                    Err(error) => {
                        tracing::debug!(%error, "input that was taken has no reader any more");
                        self.owed().pieces.clear();
                    }
                },
            }
        }
        if self.owed().closing {
            *sink = None;
            self.closed.send_replace(true);
        }
    }

    /// Whether [`Input::pay`] has something to do.
    pub(super) fn owes(&self) -> bool {
        let owed = self.owed();
        !owed.pieces.is_empty() || (owed.closing && !*self.closed.borrow())
    }

    pub(super) fn owed(&self) -> std::sync::MutexGuard<'_, Owed> {
        super::lock(&self.owed)
    }

    /// A look only: it is owed until it is written.
    fn next_owed(&self) -> Option<Bytes> {
        self.owed().pieces.front().cloned()
    }

    fn paid(&self, count: usize) {
        let mut owed = self.owed();
        if let Some(piece) = owed.pieces.front_mut() {
            piece.advance(count.min(piece.len()));
        }
        owed.pieces.retain(|piece| !piece.is_empty());
    }

    /// Closes stdin; closing it again is no error.
    ///
    /// # Errors
    /// A terminal has no end of input but the one that is typed.
    pub(super) async fn close(&self) -> Result<(), InputError> {
        if self.kind == InputKind::Terminal {
            return Err(InputError::NoCloseForTerminal);
        }
        let sink = timeout(CLOSE_GRACE, self.sink.lock()).await;
        if self.close_when_paid() {
            return Ok(());
        }
        if let Ok(mut sink) = sink {
            *sink = None;
            self.closed.send_replace(true);
        } else {
            self.end().await;
        }
        Ok(())
    }

    /// What was taken arrives before the end. False when nothing is owed.
    fn close_when_paid(&self) -> bool {
        let mut owed = self.owed();
        owed.closing |= !owed.pieces.is_empty();
        owed.closing
    }

    /// The process is gone: whoever still writes is told so.
    pub(super) async fn end(&self) {
        self.closed.send_replace(true);
        self.owed().pieces.clear();
        *self.sink.lock().await = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    fn pipe_input() -> (Arc<Input>, pipe::Receiver) {
        let (sender, receiver) = pipe::pipe().unwrap();
        (Arc::new(Input::new(Some(Sink::Pipe(sender)), watch::Sender::new(false))), receiver)
    }

    fn huge() -> Bytes {
        vec![b'x'; 1 << 20].into()
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_never_reads_holds_a_writer_for_a_bounded_time() {
        let (input, _reader) = pipe_input();
        let began = Instant::now();
        let error = input.write(InputKind::Stdin, huge(), None).await.unwrap_err();
        assert!(matches!(error, InputError::Stalled { taken: 65_536, .. }), "{error}");
        assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs());
        let deadline = Instant::now() + Duration::from_millis(200);
        let error =
            input.write(InputKind::Stdin, Bytes::from_static(b"x"), Some(deadline)).await.unwrap_err();
        assert!(matches!(error, InputError::Stalled { taken: 0, .. }), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn closing_does_not_wait_for_a_writer_that_is_stuck() {
        let (input, mut reader) = pipe_input();
        let writer = tokio::spawn({
            let input = Arc::clone(&input);
            async move { input.write(InputKind::Stdin, huge(), None).await }
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
        assert!(matches!(
            input.write(InputKind::Stdin, Bytes::from_static(b"x"), None).await,
            Err(InputError::Closed("stdin"))
        ));
    }

    fn writer(
        input: &Arc<Input>,
        bytes: impl Into<Bytes>,
    ) -> tokio::task::JoinHandle<Result<(), InputError>> {
        let (input, bytes) = (Arc::clone(input), bytes.into());
        tokio::spawn(async move { input.write(InputKind::Stdin, bytes, None).await })
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_process_has_yet_to_take_is_owed_when_the_agent_leaves_and_comes_first_afterwards() {
        let (input, mut reader) = pipe_input();
        let text: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let (first, second) =
            (writer(&input, text[..300_000].to_vec()), writer(&input, text[300_000..].to_vec()));
        tokio::time::sleep(Duration::from_millis(1)).await;
        input.leaving.send_replace(true);
        let began = Instant::now();
        first.await.unwrap().unwrap();
        second.await.unwrap().unwrap();
        input.write(InputKind::Stdin, Bytes::from_static(b"late"), None).await.unwrap();
        assert_eq!(
            (began.elapsed(), input.leaving.receiver_count()),
            (Duration::ZERO, 0),
            "nothing is waited for"
        );
        let owed: usize = input.owed().pieces.iter().map(Bytes::len).sum();
        assert_eq!(owed, text.len() + 4 - 65_536);

        // The upgrade failed. Whoever writes next pays first, and loses nothing when its client goes away.
        input.leaving.send_replace(false);
        let gone = writer(&input, "gone");
        tokio::time::sleep(Duration::from_millis(1)).await;
        gone.abort();
        let payer = tokio::spawn({
            let input = Arc::clone(&input);
            async move { input.pay().await }
        });
        input.close().await.unwrap();
        let late = input.write(InputKind::Stdin, Bytes::from_static(b"x"), None).await;
        let mut all = Vec::new();
        reader.read_to_end(&mut all).await.unwrap();
        payer.await.unwrap();
        assert!(matches!(late, Err(InputError::Closed("stdin"))), "{late:?}");
        assert_eq!(all, [&text[..], b"late"].concat(), "all, once, in order, and then the end");
        assert!(!input.owes());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_owed_is_bounded_and_the_rest_is_told() {
        let (input, _reader) = pipe_input();
        let most = writer(&input, vec![0; OWED_LIMIT]);
        let more = writer(&input, vec![0; 65_537]);
        tokio::time::sleep(Duration::from_millis(1)).await;
        input.leaving.send_replace(true);
        most.await.unwrap().unwrap();
        let error = more.await.unwrap().unwrap_err();
        assert!(matches!(error, InputError::Leaving { taken: 0, total: 65_537, .. }), "{error}");
        input.end().await;
        assert!(!input.owes(), "the process is gone");
    }

    #[tokio::test]
    async fn each_kind_of_process_says_which_input_it_has() {
        let (input, _reader) = pipe_input();
        let error = input.write(InputKind::Terminal, Bytes::from_static(b"x"), None).await.unwrap_err();
        assert!(error.to_string().starts_with("tty not assigned to process"), "{error}");
        let none = Input::new(None, watch::Sender::new(false));
        let error = none.write(InputKind::Stdin, Bytes::from_static(b"x"), None).await.unwrap_err();
        assert_eq!(error.to_string(), "error writing to stdin: stdin not enabled or closed");
    }
}
