//! The one task of a process: moves its output, waits for its end, enforces its deadline, and says how it ended.

use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use super::exit::{Kill, Record};
use super::leader::{Ended, Leader, Usage};
use super::output::pipe::{SMALL, read_chunk, widen};
use super::output::{Channel, End, Status};
use super::spawn::{Sources, pending};
use super::terminal::Terminal;
use super::{Process, Processes, holders, sleep_until};
use crate::cgroup::GroupUsage;

/// The most that one data event carries of a terminal (contract: envd.md section 2.6).
const TERMINAL_CHUNK: usize = 16 * 1024;

/// After the process's own end, how long to wait for the end of an output that something else (a background job) holds open. With the
/// search for that something the end is told within 100 ms.
const LEAK_GRACE: Duration = Duration::from_millis(50);

/// One output of a process.
pub(super) enum Source {
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

impl Source {
    pub(super) const fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }
}

/// What a new process's output is read from.
pub(super) fn sources(sources: Sources) -> Vec<(Channel, Source)> {
    match sources {
        Sources::Pipes { stdout, stderr } => {
            vec![(Channel::Stdout, Source::Pipe(stdout)), (Channel::Stderr, Source::Pipe(stderr))]
        }
        Sources::Terminal(terminal) => vec![(Channel::Pty, Source::Terminal(terminal))],
    }
}

/// The end of a process whose output is still being read.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Finishing {
    ended: Ended,
    duration: Duration,
    used: Option<GroupUsage>,
}

pub(super) async fn run(
    processes: Arc<Processes>,
    process: Arc<Process>,
    leader: Option<Leader>,
    sources: Vec<(Channel, Source)>,
) {
    let exited = watch::Sender::new(false);
    let moved = sources
        .into_iter()
        .map(|(channel, source)| move_output(&process, source, channel, exited.subscribe()));
    let moved = futures_util::future::join_all(moved);
    let wait = async {
        let known = process.finishing();
        let finishing = match (known, leader) {
            (Some(known), _) => known,
            (None, leader) => {
                let ended = wait(&process, leader).await;
                let used = process.group_usage();
                let finishing = Finishing { ended, duration: process.spec.started.elapsed(), used };
                process.finish(finishing);
                finishing
            }
        };
        process.reaped.send_replace(true);
        // The other end of the pipe is gone, whoever else may hold it.
        process.release_input().await;
        exited.send_replace(true);
        finishing
    };
    let (Finishing { ended, duration, used }, left) = tokio::join!(wait, moved);
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
    record.bytes = process.output.moved();
    let left: Vec<Source> = left.into_iter().flatten().collect();
    if !left.is_empty() {
        record.truncated = true;
        let links: Vec<_> = left.iter().filter_map(Source::link).collect();
        let first = process.pid;
        let found = tokio::task::spawn_blocking(move || holders::find(first, &links)).await;
        record.held_by = found.unwrap_or_default();
        tracing::debug!(pid = process.pid, holders = ?record.held_by, "an output outlives its command");
    }
    let (pid, tag, cause) = (process.pid, process.spec.tag.as_deref(), record.cause.name());
    tracing::info!(target: crate::logs::EACH_CALL, pid, tag, how = %ended.status, cause, "process ended");
    // First out of the table, then the news: a client that saw the end does not find it in a list.
    processes.retire(&process);
    let timed_out = kill == Some(Kill::Timeout);
    process.output.finish(End { status: ended.status, timed_out, record });
    process.ends.lock().unwrap_or_else(PoisonError::into_inner).clear();
    for source in left {
        processes.discard(source);
    }
    if let Some(group) = process.leave_group() {
        group.remove_when_empty();
    }
}

async fn wait(process: &Process, leader: Option<Leader>) -> Ended {
    let mut deadline = process.deadline.filter(|_| process.kill() != Some(Kill::Timeout));
    let Some(mut leader) = leader else {
        return Ended { status: Status::Exited(-1), usage: Usage::default() };
    };
    let ended = loop {
        tokio::select! {
            ended = leader.ended() => break ended,
            () = sleep_until(deadline) => {
                deadline = None;
                if let Err(error) = process.end_all(Kill::Timeout) {
                    tracing::warn!(pid = process.pid, %error, "a command outlives its deadline");
                }
            }
        }
    };
    let reaped = match ended {
        Ok(()) => {
            process.ask_rest();
            leader.wait().await
        }
        Err(error) => Err(error),
    };
    reaped.unwrap_or_else(|error| {
        tracing::error!(pid = process.pid, %error, "the end of a process could not be learnt");
        Ended { status: Status::Exited(-1), usage: Usage::default() }
    })
}

/// Reads an output to its end. After the process's end, what it left there is still read; then an output that somebody else holds open
/// is given up, and returned.
async fn move_output(
    process: &Process,
    mut source: Source,
    channel: Channel,
    mut exited: watch::Receiver<bool>,
) -> Option<Source> {
    let ended = |source| {
        process.forget_end(channel);
        drop(source);
        None
    };
    loop {
        let read = tokio::select! {
            biased;
            read = source.read(process.output.appetite()) => read,
            _ = exited.wait_for(|exited| *exited) => break,
        };
        match read {
            Ok(chunk) if !chunk.is_empty() => {
                let much = chunk.len() >= SMALL;
                process.output.write(channel, chunk).await;
                if much {
                    // A process that floods does not keep the thread from the others.
                    tokio::task::yield_now().await;
                }
            }
            _ => return ended(source),
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
                process.output.write(channel, chunk).await;
                // Somebody else writes without a pause: there is always more.
                if left == 0 && Instant::now() >= give_up {
                    return Some(source);
                }
            }
            Ok(_) => return ended(source),
            Err(_elapsed) => return Some(source),
        }
    }
}

/// A background job that outlives its command goes on writing: it must neither be stopped by a full pipe nor killed by a closed one.
pub(super) async fn discard(source: &mut Source) {
    while let Ok(bytes) = source.read(SMALL).await
        && !bytes.is_empty()
    {}
}
