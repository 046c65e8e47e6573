//! The one task of a process: moves its output, waits for its end, enforces its deadline, and says how it ended.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::output::pipe::{SMALL, read_chunk, widen};
use super::output::{Channel, End, Status};
use super::spawn::{Spawned, pending};
use super::{Process, Processes, signals, sleep_until};

/// After the process's own end, how long to wait for the end of a pipe that something else (a background job) holds open.
const LEAK_GRACE: Duration = Duration::from_millis(50);

pub(super) async fn run(
    processes: Arc<Processes>,
    process: Arc<Process>,
    mut spawned: Spawned,
    deadline: Option<Instant>,
) {
    let exited = watch::Sender::new(false);
    let stdout = move_output(&process, spawned.stdout.take(), Channel::Stdout, exited.subscribe());
    let stderr = move_output(&process, spawned.stderr.take(), Channel::Stderr, exited.subscribe());
    let wait = async {
        let mut timed_out = false;
        let status = loop {
            tokio::select! {
                status = spawned.child.wait() => break status,
                () = sleep_until(deadline.filter(|_| !timed_out)) => {
                    timed_out = true;
                    if let Err(error) = signals::to_group(process.pid, Signal::SIGKILL) {
                        tracing::warn!(pid = process.pid, %error, "a command outlives its deadline");
                    }
                }
            }
        };
        process.reaped.send_replace(true);
        // The other end of the pipe is gone, whoever else may hold it.
        process.close_stdin().await;
        exited.send_replace(true);
        (status, timed_out)
    };
    let ((status, timed_out), (), ()) = tokio::join!(wait, stdout, stderr);
    let status = match status {
        Ok(status) => status_of(status),
        Err(error) => {
            tracing::error!(pid = process.pid, %error, "the end of a process could not be learnt");
            Status::Exited(-1)
        }
    };
    // First out of the table, then the news: a client that saw the end does not find it in a list.
    processes.retire(&process);
    process.output.finish(End { status, timed_out });
}

/// Reads a pipe to its end. After the process's end, what it left in the pipe is still read; then a pipe that somebody else holds open
/// is given up.
async fn move_output(
    process: &Process,
    pipe: Option<impl AsyncRead + AsRawFd + Unpin>,
    channel: Channel,
    mut exited: watch::Receiver<bool>,
) {
    let Some(mut pipe) = pipe else { return };
    loop {
        let read = tokio::select! {
            biased;
            read = read_chunk(&mut pipe, process.output.appetite()) => read,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        match read {
            Ok(bytes) if !bytes.is_empty() => {
                widen(&pipe, bytes.len());
                let much = bytes.len() >= SMALL;
                process.output.write(channel, bytes).await;
                if much {
                    // A process that floods does not keep the thread from the others.
                    tokio::task::yield_now().await;
                }
            }
            _ => return,
        }
    }
    // What is in the pipe now was written before the end: all of it is read, however slow the clients are.
    let mut left = pending(&pipe);
    let give_up = Instant::now() + LEAK_GRACE;
    loop {
        let read = read_chunk(&mut pipe, process.output.appetite());
        let read = if left > 0 { Ok(read.await) } else { timeout_at(give_up, read).await };
        match read {
            Ok(Ok(bytes)) if !bytes.is_empty() => {
                left = left.saturating_sub(bytes.len());
                process.output.write(channel, bytes).await;
            }
            Ok(_) => return,
            Err(_elapsed) => {
                tracing::debug!(
                    pid = process.pid,
                    "something that the command started holds its output open"
                );
                return;
            }
        }
    }
}

fn status_of(status: ExitStatus) -> Status {
    match (status.code(), status.signal()) {
        (Some(code), _) => Status::Exited(code),
        (None, Some(signal)) => Status::Signalled { signal, core_dumped: status.core_dumped() },
        (None, None) => Status::Exited(-1),
    }
}
