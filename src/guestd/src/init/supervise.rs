//! PID 1 after the start: one child that is the agent, a loop that waits for signals, and the way down.
//!
//! The duties are those of any init and no more: reap whatever ends, end everything when asked, and never let a machine
//! run on without its agent, because nobody would be left to ask for a password. Sleeps in one system call between
//! signals, so an idle machine is not woken by it.

use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, setsid};

use super::console::say;
use super::{AgentEnvironment, EXIT_POWER_OFF, Place};

/// From the request to end everything until what is left is killed.
const GRACE: Duration = Duration::from_secs(2);
/// How long a last write to the disks may take. A disk that hangs must not keep the machine alive.
const SYNC_DEADLINE: Duration = Duration::from_secs(5);
/// Only while going down; up, nothing polls.
const STEP: Duration = Duration::from_millis(10);
/// The child must not be the one that the kernel picks when memory is short.
const NEVER_OUT_OF_MEMORY: &str = "-1000";

/// Forks the agent and never returns in the parent. Must be called while the process has one thread.
pub(super) fn run(environment: AgentEnvironment, start_agent: impl FnOnce(AgentEnvironment) -> i32) -> ! {
    let place = environment.place;
    let watched = watched_signals();
    // Blocked before the fork: a child that ends at once must not be missed.
    let before = match watched.thread_swap_mask(SigmaskHow::SIG_BLOCK) {
        Ok(before) => before,
        Err(errno) => give_up(place, &format!("cannot block signals: {errno}")),
    };
    // SAFETY: the process has one thread (the caller's contract, and nothing in this module starts one), so the child
    // inherits no lock that another thread holds and may allocate and run any code.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => become_agent(&before, environment, start_agent),
        Ok(ForkResult::Parent { child }) => watch_over(child, place, &watched),
        Err(errno) => give_up(place, &format!("cannot start the agent: fork: {errno}")),
    }
}

/// Ends a machine that cannot be started; in a container, the process.
pub(super) fn give_up(place: Place, why: &str) -> ! {
    say!("{why}");
    say!("the agent was not started");
    finish(place, 1)
}

fn watched_signals() -> SigSet {
    [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGPWR].into_iter().collect()
}

fn become_agent(
    mask: &SigSet,
    environment: AgentEnvironment,
    start_agent: impl FnOnce(AgentEnvironment) -> i32,
) -> ! {
    if let Err(errno) = mask.thread_set_mask() {
        say!("the agent runs with signals blocked: {errno}");
    }
    if let Err(errno) = setsid() {
        say!("the agent shares the console's session: {errno}");
    }
    let protected = std::fs::write("/proc/self/oom_score_adj", NEVER_OUT_OF_MEMORY);
    // A container is seldom allowed to do this, and its host has its own rules.
    if let (Err(error), Place::Machine) = (protected, environment.place) {
        say!("the agent is not protected when memory runs out: {error}");
    }
    std::process::exit(start_agent(environment))
}

// === The loop ===

/// How the agent came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Exited(i32),
    Killed(Signal),
}

impl End {
    fn of(status: WaitStatus, agent: Pid) -> Option<Self> {
        match status {
            WaitStatus::Exited(pid, code) if pid == agent => Some(Self::Exited(code)),
            WaitStatus::Signaled(pid, signal, _) if pid == agent => Some(Self::Killed(signal)),
            _ => None,
        }
    }

    /// As a shell reports it.
    fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal as i32,
        }
    }
}

fn watch_over(agent: Pid, place: Place, watched: &SigSet) -> ! {
    loop {
        match watched.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Reaped { agent: Some(end), .. } = reap(agent) {
                    agent_ended(end, place);
                }
            }
            Ok(signal) => {
                say!("{signal}: ending everything");
                let end = end_everything(agent);
                finish(place, end.map_or(0, End::code));
            }
            Err(errno) => give_up(place, &format!("cannot wait for signals: {errno}")),
        }
    }
}

fn agent_ended(end: End, place: Place) -> ! {
    if place == Place::Container {
        // The kernel kills what is left of the container together with its first process.
        std::process::exit(end.code());
    }
    match end {
        End::Exited(EXIT_POWER_OFF) => {
            say!("the agent asked to power off");
            end_everything(Pid::from_raw(0));
        }
        End::Exited(code) => {
            say!("the agent ended by itself with exit code {code}: the machine cannot go on without it")
        }
        End::Killed(signal) => say!("the agent was killed by {signal}: the machine cannot go on without it"),
    }
    finish(place, end.code())
}

struct Reaped {
    agent: Option<End>,
    /// No child is left at all. As orphans become children of PID 1, that means no process is left.
    nothing_left: bool,
}

/// Takes the status of every child that has ended.
fn reap(agent: Pid) -> Reaped {
    let mut reaped = Reaped { agent: None, nothing_left: false };
    loop {
        match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) => return reaped,
            Ok(status) => reaped.agent = reaped.agent.or_else(|| End::of(status, agent)),
            Err(Errno::EINTR) => {}
            Err(_) => {
                reaped.nothing_left = true;
                return reaped;
            }
        }
    }
}

// === The way down ===

/// Asks every process to end, waits, kills the rest.
fn end_everything(agent: Pid) -> Option<End> {
    let everybody = Pid::from_raw(-1);
    let mut end = None;
    for (signal, patience) in [(Signal::SIGTERM, GRACE), (Signal::SIGKILL, GRACE)] {
        match kill(everybody, signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => say!("cannot send {signal} to everybody: {errno}"),
        }
        let start = Instant::now();
        while start.elapsed() < patience {
            let reaped = reap(agent);
            end = end.or(reaped.agent);
            if reaped.nothing_left {
                return end;
            }
            std::thread::sleep(STEP);
        }
    }
    end
}

/// The last thing that PID 1 does. In a container `code` is what its runtime sees.
fn finish(place: Place, code: i32) -> ! {
    if place == Place::Container {
        std::process::exit(code);
    }
    unmount_disks();
    sync_disks();
    say!("power off");
    for mode in [RebootMode::RB_POWER_OFF, RebootMode::RB_HALT_SYSTEM] {
        let Err(errno) = reboot(mode);
        say!("cannot power off: {errno}");
    }
    // The kernel panics when PID 1 exits, which stops the machine as well.
    std::process::exit(code)
}

/// Only what has a block device behind it: memory file systems have nothing to lose.
fn unmount_disks() {
    let Ok(table) = std::fs::read_to_string("/proc/self/mounts") else { return };
    for target in disk_mounts(&table) {
        if let Err(errno) = nix::mount::umount(target) {
            say!("{target} stays mounted: {errno}");
        }
    }
}

/// The mount points of disks other than the root, last mounted first.
fn disk_mounts(table: &str) -> Vec<&str> {
    let mut targets: Vec<_> = table
        .lines()
        .filter(|line| line.starts_with("/dev/"))
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|target| *target != "/")
        .collect();
    targets.reverse();
    targets
}

/// `sync` has no time limit of its own, so a child does it and is left behind when it takes too long.
fn sync_disks() {
    // SAFETY: as in `run`: PID 1 has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            nix::unistd::sync();
            std::process::exit(0);
        }
        Ok(ForkResult::Parent { child }) => {
            let start = Instant::now();
            while waitpid(child, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive) {
                if start.elapsed() > SYNC_DEADLINE {
                    return say!("the disks were not written within {} s", SYNC_DEADLINE.as_secs());
                }
                std::thread::sleep(STEP);
            }
        }
        Err(errno) => say!("the disks were not written: fork: {errno}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_agents_end_counts() {
        let agent = Pid::from_raw(2);
        assert_eq!(End::of(WaitStatus::Exited(Pid::from_raw(7), 3), agent), None);
        assert_eq!(End::of(WaitStatus::Exited(agent, 3), agent), Some(End::Exited(3)));
        let killed = WaitStatus::Signaled(agent, Signal::SIGSEGV, false);
        assert_eq!(End::of(killed, agent), Some(End::Killed(Signal::SIGSEGV)));
        assert_eq!(End::of(WaitStatus::StillAlive, agent), None);
    }

    #[test]
    fn a_killed_agent_has_the_exit_code_that_a_shell_would_give() {
        assert_eq!(End::Killed(Signal::SIGKILL).code(), 137);
        assert_eq!(End::Exited(4).code(), 4);
    }

    #[test]
    fn disks_are_unmounted_in_reverse_and_the_root_is_left() {
        let table = "/dev/vda / squashfs ro 0 0\nproc /proc proc rw 0 0\n/dev/vdb /data ext4 rw 0 0\n\
                     tmpfs /run tmpfs rw 0 0\n/dev/vdc /data/more ext4 rw 0 0\n";
        assert_eq!(disk_mounts(table), ["/data/more", "/data"]);
    }
}
