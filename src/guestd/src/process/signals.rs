//! Sending signals, and the names that clients read.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};

/// Signals a process and the group that it leads: what it started does not outlive it. A process in the group gets the signal once.
///
/// # Errors
/// The kernel's answer for the process itself; a group that is gone already is none.
pub(super) fn to_group(pid: u32, signal: Signal) -> Result<(), Errno> {
    let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) else { return Err(Errno::ESRCH) };
    let (process, group) = (Pid::from_raw(pid), Pid::from_raw(-pid));
    if getpgid(Some(process)) == Ok(process) {
        return kill(group, signal);
    }
    // It went to another group and may have left children in its first one.
    let sent = kill(process, signal);
    match kill(group, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => tracing::debug!(pid, %error, "the process group could not be signalled"),
    }
    sent
}

/// Signals the job that has a terminal's keyboard, unless it is the group of `leader`, which had the signal already.
pub(super) fn to_foreground(group: Option<i32>, leader: u32, signal: Signal) {
    let Some(group) = group.filter(|group| group.unsigned_abs() != leader) else { return };
    match kill(Pid::from_raw(-group), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => tracing::debug!(group, %error, "the foreground job could not be signalled"),
    }
}

/// The name that envd's clients know a signal by (Go's, contract: envd.md section 2.7).
pub(super) fn name(signal: i32) -> String {
    let name = match Signal::try_from(signal) {
        Ok(Signal::SIGHUP) => "hangup",
        Ok(Signal::SIGINT) => "interrupt",
        Ok(Signal::SIGQUIT) => "quit",
        Ok(Signal::SIGILL) => "illegal instruction",
        Ok(Signal::SIGTRAP) => "trace/breakpoint trap",
        Ok(Signal::SIGABRT) => "aborted",
        Ok(Signal::SIGBUS) => "bus error",
        Ok(Signal::SIGFPE) => "floating point exception",
        Ok(Signal::SIGKILL) => "killed",
        Ok(Signal::SIGUSR1) => "user defined signal 1",
        Ok(Signal::SIGSEGV) => "segmentation fault",
        Ok(Signal::SIGUSR2) => "user defined signal 2",
        Ok(Signal::SIGPIPE) => "broken pipe",
        Ok(Signal::SIGALRM) => "alarm clock",
        Ok(Signal::SIGTERM) => "terminated",
        Ok(_) | Err(_) => return format!("signal {signal}"),
    };
    name.to_owned()
}
