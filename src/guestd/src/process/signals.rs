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

/// Asks a process to end, and with it the job that has its terminal's keyboard. What else it started is asked when the process has ended:
/// until then it is the process's to look after. Each gets the signal once.
///
/// # Errors
/// The kernel's answer for the process itself.
pub(super) fn ask(pid: u32, foreground: Option<i32>, signal: Signal) -> Result<(), Errno> {
    let Some(pid) = i32::try_from(pid).ok().filter(|pid| *pid > 1) else { return Err(Errno::ESRCH) };
    let process = Pid::from_raw(pid);
    match foreground.map(Pid::from_raw) {
        Some(job) if getpgid(Some(process)) == Ok(job) => kill(Pid::from_raw(-job.as_raw()), signal),
        job => {
            let sent = kill(process, signal);
            to_foreground(job.map(Pid::as_raw), pid.unsigned_abs(), signal);
            sent
        }
    }
}

/// Signals what is left of the group of a process that ended and was not reaped, and of `others` who is in another group. A group that was
/// `asked` already is not asked again.
pub(super) fn to_rest(leader: u32, asked: Option<i32>, others: &[i32], signal: Signal) {
    let Some(leader) = i32::try_from(leader).ok().filter(|pid| *pid > 1) else { return };
    if asked != Some(leader) {
        match kill(Pid::from_raw(-leader), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(error) => {
                tracing::debug!(leader, %error, "the rest of a process group could not be signalled")
            }
        }
    }
    let is_left = |group: Pid| group.as_raw() != leader && Some(group.as_raw()) != asked;
    for pid in others.iter().map(|pid| Pid::from_raw(*pid)) {
        if getpgid(Some(pid)).is_ok_and(is_left) {
            let _gone = kill(pid, signal);
        }
    }
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
