//! Sending signals, and the names that clients read.

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Signals a process and then the group that it leads: what it started does not outlive it.
///
/// # Errors
/// The kernel's answer for the process itself; a group that is gone already is none.
pub(super) fn to_group(pid: u32, signal: Signal) -> Result<(), Errno> {
    let Ok(pid) = i32::try_from(pid) else { return Err(Errno::ESRCH) };
    let sent = kill(Pid::from_raw(pid), signal);
    match kill(Pid::from_raw(-pid), signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => tracing::debug!(pid, %error, "the process group could not be signalled"),
    }
    sent
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
