//! How a process ended, in full: what envd's end event has no room for (weakness 32 in envd.md section 11).

use std::time::Duration;

use guestd_protocol::wire::process as wire;

use super::holders::Holder;
use super::leader::Usage;
use super::output::{Channel, End, Status};

/// Somebody ended it on purpose.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) enum Kill {
    /// A client did.
    Signal { signal: i32, by: String },
    /// Its time (`Connect-Timeout-Ms`) was over.
    Timeout,
}

impl Kill {
    /// Nothing survives it.
    pub(super) const fn is_certain(&self) -> bool {
        matches!(self, Self::Timeout | Self::Signal { signal: libc::SIGKILL, .. })
    }
}

/// Why there was an end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Cause {
    /// By itself.
    #[default]
    Exited,
    /// By a signal that nobody sent through the agent.
    Signalled,
    Timeout,
    /// The kernel was out of memory.
    Oom,
    /// A client sent the signal.
    Killed,
}

impl Cause {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::Signalled => "signalled",
            Self::Timeout => "timeout",
            Self::Oom => "oom",
            Self::Killed => "killed",
        }
    }

    fn of(status: Status, kill: Option<&Kill>, oom_killed: bool) -> Self {
        let Status::Signalled { signal, .. } = status else { return Self::Exited };
        match kill {
            Some(Kill::Timeout) if signal == libc::SIGKILL => Self::Timeout,
            Some(Kill::Signal { signal: sent, .. }) if signal == *sent => Self::Killed,
            _ if oom_killed && signal == libc::SIGKILL => Self::Oom,
            _ => Self::Signalled,
        }
    }
}

/// What is known beyond the status.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Record {
    pub cause: Cause,
    /// Who ended it, in words; empty when it ended by itself.
    pub killed_by: String,
    /// The kernel killed something of the command for want of memory, the leader or another.
    pub oom_killed: bool,
    pub usage: Usage,
    pub duration: Duration,
    pub bytes: Bytes,
    /// Who keeps its output open. Their further output goes nowhere.
    pub held_by: Vec<Holder>,
    /// The output was not read to its end.
    pub truncated: bool,
}

/// What was read of each output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Bytes {
    pub stdout: u64,
    pub stderr: u64,
    pub pty: u64,
}

impl Bytes {
    pub(super) fn add(&mut self, channel: Channel, count: usize) {
        *match channel {
            Channel::Stdout => &mut self.stdout,
            Channel::Stderr => &mut self.stderr,
            Channel::Pty => &mut self.pty,
        } += count as u64;
    }
}

impl Record {
    pub(super) fn new(status: Status, kill: Option<&Kill>, oom_killed: bool) -> Self {
        let cause = Cause::of(status, kill, oom_killed);
        let killed_by = match (cause, kill) {
            (Cause::Timeout, _) => "timeout".to_owned(),
            (Cause::Oom, _) => "the kernel: out of memory".to_owned(),
            (Cause::Killed, Some(Kill::Signal { signal, by })) => {
                let name = if *signal == libc::SIGKILL { "SIGKILL" } else { "SIGTERM" };
                format!("SendSignal {name} by {by}")
            }
            _ => String::new(),
        };
        Self { cause, killed_by, oom_killed, ..Self::default() }
    }
}

/// The additive field of the end event.
pub(super) fn to_wire(end: &End) -> wire::ExitRecord {
    let record = &end.record;
    let (exit_code, signal, core_dumped) = match end.status {
        Status::Exited(code) => (code, 0, false),
        Status::Signalled { signal, core_dumped } => (-1, signal.unsigned_abs(), core_dumped),
    };
    let holders = record.held_by.iter().map(|holder| wire::exit_record::Holder {
        pid: holder.pid,
        name: holder.name.clone(),
        ..Default::default()
    });
    wire::ExitRecord {
        cause: record.cause.name().to_owned(),
        exit_code,
        signal,
        core_dumped,
        oom_killed: record.oom_killed,
        timed_out: end.timed_out,
        killed_by: record.killed_by.clone(),
        peak_memory_bytes: record.usage.peak_memory,
        user_cpu_us: micros(record.usage.user),
        system_cpu_us: micros(record.usage.system),
        duration_ms: u64::try_from(record.duration.as_millis()).unwrap_or(u64::MAX),
        stdout_bytes: record.bytes.stdout,
        stderr_bytes: record.bytes.stderr,
        pty_bytes: record.bytes.pty,
        output_truncated: record.truncated,
        output_held_by: holders.collect(),
        ..Default::default()
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signalled(signal: i32) -> Status {
        Status::Signalled { signal, core_dumped: false }
    }

    #[test]
    fn the_cause_is_what_ended_it_and_not_what_was_tried_before() {
        let term = Kill::Signal { signal: libc::SIGTERM, by: "user".to_owned() };
        let kill = Kill::Signal { signal: libc::SIGKILL, by: "user".to_owned() };
        for (status, kill, oom, cause, by) in [
            (Status::Exited(0), None, false, Cause::Exited, ""),
            // It caught the signal and left in order.
            (Status::Exited(7), Some(&term), false, Cause::Exited, ""),
            (signalled(libc::SIGTERM), Some(&term), false, Cause::Killed, "SendSignal SIGTERM by user"),
            (signalled(libc::SIGKILL), Some(&kill), false, Cause::Killed, "SendSignal SIGKILL by user"),
            (signalled(libc::SIGSEGV), None, false, Cause::Signalled, ""),
            (signalled(libc::SIGSEGV), Some(&term), false, Cause::Signalled, ""),
            (signalled(libc::SIGKILL), None, true, Cause::Oom, "the kernel: out of memory"),
            (signalled(libc::SIGKILL), Some(&Kill::Timeout), false, Cause::Timeout, "timeout"),
            // Its own end came first.
            (Status::Exited(0), Some(&Kill::Timeout), false, Cause::Exited, ""),
            // A child was killed by the kernel; the shell told so by its code.
            (Status::Exited(137), None, true, Cause::Exited, ""),
        ] {
            let record = Record::new(status, kill, oom);
            assert_eq!((record.cause, record.killed_by.as_str()), (cause, by), "{status:?} {kill:?}");
            assert_eq!(record.oom_killed, oom);
        }
    }
}
