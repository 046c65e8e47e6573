//! The one task of a process: moves its output, waits for its end, enforces its deadline, and says how it ended.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::exit::{self, Kill, Record};
use super::leader::{Ended, Leader, Usage};
use super::output::pipe::{SMALL, read_chunk, widen};
use super::output::{Channel, End, Status};
use super::spawn::{Sources, pending};
use super::terminal::Terminal;
use super::{Process, Processes, holders, sleep_until};
use crate::cgroup::Group;

/// The most that one data event carries of a terminal (contract: envd.md section 2.6).
const TERMINAL_CHUNK: usize = 16 * 1024;

/// After the process's own end, how long to wait for the end of an output that something else (a background job) holds open. With the
/// search for that something the end is told within 100 ms.
const LEAK_GRACE: Duration = Duration::from_millis(50);

/// One output of a process.
enum Source {
    Pipe(pipe::Receiver),
    Terminal(Arc<Terminal>),
}

impl Source {
    /// The next bytes, at most `limit`; none at the end. Dropped before it is done, it has read nothing.
    async fn read(&mut self, limit: usize) -> std::io::Result<Bytes> {
        match self {
            Self::Pipe(pipe) => {
                let bytes = read_chunk(pipe, limit).await?;
                widen(pipe, bytes.len());
                Ok(bytes)
            }
            Self::Terminal(terminal) => {
                let mut buffer = BytesMut::new();
                terminal.read(&mut buffer, limit.min(TERMINAL_CHUNK)).await?;
                Ok(buffer.freeze())
            }
        }
    }

    /// What its other end is called in `/proc/<pid>/fd`.
    fn link(&self) -> Option<PathBuf> {
        match self {
            Self::Pipe(pipe) => holders::link_of_pipe(pipe),
            Self::Terminal(terminal) => holders::link_of_terminal(terminal.as_ref()),
        }
    }
}

impl AsRawFd for Source {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Pipe(pipe) => pipe.as_raw_fd(),
            Self::Terminal(terminal) => terminal.as_raw_fd(),
        }
    }
}

/// What became of one output.
#[derive(Default)]
struct Moved {
    bytes: u64,
    /// Still open when the process was over.
    left: Option<Source>,
}

pub(super) async fn run(
    processes: Arc<Processes>,
    process: Arc<Process>,
    mut leader: Leader,
    sources: Sources,
    deadline: Option<Instant>,
) {
    let exited = watch::Sender::new(false);
    let (first, stdout, stderr) = match sources {
        Sources::Pipes { stdout, stderr } => {
            (Channel::Stdout, Source::Pipe(stdout), Some(Source::Pipe(stderr)))
        }
        Sources::Terminal(terminal) => (Channel::Pty, Source::Terminal(terminal), None),
    };
    let stdout = move_output(&process, Some(stdout), first, exited.subscribe());
    let stderr = move_output(&process, stderr, Channel::Stderr, exited.subscribe());
    let wait = async {
        let ended = wait(&process, &mut leader, deadline).await;
        let duration = process.spec.started.elapsed();
        let group = process.leave_group();
        let used = group.as_ref().map(Group::usage);
        process.reaped.send_replace(true);
        // The other end of the pipe is gone, whoever else may hold it.
        process.release_input().await;
        exited.send_replace(true);
        (ended, duration, group, used)
    };
    let ((ended, duration, group, used), stdout, stderr) = tokio::join!(wait, stdout, stderr);
    let kill = process.kill();
    let oom_killed = used.is_some_and(|used| used.oom_kills > 0);
    let mut record = Record::new(ended.status, kill.as_ref(), oom_killed);
    record.duration = duration;
    // Of the whole tree where there is a group, else of those that were waited for.
    record.usage = used.map_or(ended.usage, |used| Usage {
        user: used.user,
        system: used.system,
        peak_memory: used.peak_memory.unwrap_or(ended.usage.peak_memory),
    });
    record.bytes = match first {
        Channel::Pty => exit::Bytes { pty: stdout.bytes, ..exit::Bytes::default() },
        Channel::Stdout | Channel::Stderr => {
            exit::Bytes { stdout: stdout.bytes, stderr: stderr.bytes, pty: 0 }
        }
    };
    let left: Vec<Source> = [stdout.left, stderr.left].into_iter().flatten().collect();
    if !left.is_empty() {
        record.truncated = true;
        let links: Vec<_> = left.iter().filter_map(Source::link).collect();
        record.held_by = tokio::task::spawn_blocking(move || holders::find(&links)).await.unwrap_or_default();
        tracing::debug!(pid = process.pid, holders = ?record.held_by, "an output outlives its command");
    }
    let (pid, tag, cause) = (process.pid, process.spec.tag.as_deref(), record.cause.name());
    tracing::info!(target: crate::logs::EACH_CALL, pid, tag, how = %ended.status, cause, "process ended");
    // First out of the table, then the news: a client that saw the end does not find it in a list.
    processes.retire(&process);
    let timed_out = kill == Some(Kill::Timeout);
    process.output.finish(End { status: ended.status, timed_out, record });
    for source in left {
        tokio::spawn(discard(source));
    }
    if let Some(group) = group {
        group.remove_when_empty();
    }
}

async fn wait(process: &Process, leader: &mut Leader, deadline: Option<Instant>) -> Ended {
    let mut deadline = deadline;
    let ended = loop {
        tokio::select! {
            ended = leader.wait() => break ended,
            () = sleep_until(deadline) => {
                deadline = None;
                if let Err(error) = process.end_all(Kill::Timeout) {
                    tracing::warn!(pid = process.pid, %error, "a command outlives its deadline");
                }
            }
        }
    };
    ended.unwrap_or_else(|error| {
        tracing::error!(pid = process.pid, %error, "the end of a process could not be learnt");
        Ended { status: Status::Exited(-1), usage: Usage::default() }
    })
}

/// Reads an output to its end. After the process's end, what it left there is still read; then an output that somebody else holds open
/// is given up.
async fn move_output(
    process: &Process,
    source: Option<Source>,
    channel: Channel,
    mut exited: watch::Receiver<bool>,
) -> Moved {
    let Some(mut source) = source else { return Moved::default() };
    let mut bytes = 0;
    loop {
        let read = tokio::select! {
            biased;
            read = source.read(process.output.appetite()) => read,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        match read {
            Ok(chunk) if !chunk.is_empty() => {
                let much = chunk.len() >= SMALL;
                bytes += chunk.len() as u64;
                process.output.write(channel, chunk).await;
                if much {
                    // A process that floods does not keep the thread from the others.
                    tokio::task::yield_now().await;
                }
            }
            _ => return Moved { bytes, left: None },
        }
    }
    // What is in the pipe now was written before the end: all of it is read, however slow the clients are.
    let mut left = pending(&source);
    let give_up = Instant::now() + LEAK_GRACE;
    loop {
        let read = source.read(process.output.appetite());
        let read = if left > 0 { Ok(read.await) } else { timeout_at(give_up, read).await };
        match read {
            Ok(Ok(chunk)) if !chunk.is_empty() => {
                left = left.saturating_sub(chunk.len());
                bytes += chunk.len() as u64;
                process.output.write(channel, chunk).await;
                // Somebody else writes without a pause: there is always more.
                if left == 0 && Instant::now() >= give_up {
                    return Moved { bytes, left: Some(source) };
                }
            }
            Ok(_) => return Moved { bytes, left: None },
            Err(_elapsed) => return Moved { bytes, left: Some(source) },
        }
    }
}

/// A background job that outlives its command goes on writing: it must neither be stopped by a full pipe nor killed by a closed one.
async fn discard(mut source: Source) {
    while let Ok(bytes) = source.read(SMALL).await
        && !bytes.is_empty()
    {}
}
