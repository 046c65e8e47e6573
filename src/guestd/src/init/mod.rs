//! guestd as the first process of a machine or of a container.
//!
//! [`run`] is called by `main` before any thread exists, when [`is_first_process`] says so. It finds out where it is and
//! goes through the stages that apply:
//!
//! ```text
//!  kernel starts /init                      a container runtime starts guestd
//!        |                                              |
//!  initramfs: modules, root disk, overlay,              |  /proc is mounted already:
//!  new root        (only with guestd.root=)             |  everything is prepared
//!        |                                              |
//!  machine: mounts, sysctls, limits, host               |
//!  name, loopback                                       |
//!        |                                              |
//!        +--------------------- fork -------------------+
//!          parent: PID 1, reaps and waits    child: the agent
//!          for the agent's end
//! ```
//!
//! It refuses to let a machine run without its agent: whatever ends the agent ends the machine. The kernel parameters
//! are described in [`command_line`], the file systems in `mounts`, the way down in `supervise`.

pub mod command_line;
mod console;
mod initramfs;
mod machine;
mod modules;
mod mounts;
mod network;
mod supervise;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use command_line::{CommandLine, RootDisk};
use console::say;

/// The exit code with which the agent asks for an orderly end: everything else in the machine gets SIGTERM and two
/// seconds. Any other end of the agent powers the machine off at once. In a container every exit code is passed on.
pub const EXIT_POWER_OFF: i32 = 0;

/// Whether this process runs under [`run`]'s PID 1, which understands the request to power off.
static SUPERVISED: AtomicBool = AtomicBool::new(false);

/// What [`run`] may do differently.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// In a container: end with the process that started it (PR_SET_PDEATHSIG). Right for a runtime that stays in the
    /// foreground, wrong for one that detaches.
    pub die_with_parent: bool,
}

/// What the first process is the first process of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A machine with a kernel of its own: this crate has mounted and set up everything.
    Machine,
    /// A PID namespace that a container runtime prepared.
    Container,
}

/// What the agent learns from the stages before it.
#[derive(Clone, Debug)]
pub struct AgentEnvironment {
    pub place: Place,
    /// The parameters of the machine's kernel; empty in a container, where the kernel is somebody else's.
    pub command_line: CommandLine,
}

/// Whether this process is PID 1 of a machine or a container, and [`run`] is to be called.
pub fn is_first_process() -> bool {
    std::process::id() == 1
}

/// Prepares the machine, forks, and calls `start_agent` in the child; its result is the agent's exit code (see
/// [`EXIT_POWER_OFF`]). The calling process stays PID 1 and never returns.
///
/// Must be called while the process has one thread: no async runtime, no logger thread before it. The child runs with a
/// session of its own, the caller's signal mask, and an `oom_score_adj` of -1000, which processes that the agent starts
/// inherit unless the agent sets theirs.
pub fn run(options: Options, start_agent: impl FnOnce(AgentEnvironment) -> i32) -> ! {
    let environment = match prepare(options) {
        Ok(environment) => environment,
        // A failure here is one of a machine: nothing in a container's preparation is fatal.
        Err(why) => supervise::give_up(Place::Machine, &why),
    };
    SUPERVISED.store(true, Ordering::Relaxed);
    supervise::run(environment, start_agent)
}

/// Whether this process runs under [`run`]'s PID 1.
pub fn is_supervised() -> bool {
    SUPERVISED.load(Ordering::Relaxed)
}

/// This program took the place of one that ran under [`run`]'s PID 1, under the same pid.
pub fn resume_supervised() {
    SUPERVISED.store(true, Ordering::Relaxed);
}

/// Asks PID 1 to end everything and power off (in a container: to exit). Returns at once; SIGTERM follows.
///
/// # Errors
///
/// `EPERM` when the process was not started by [`run`]: the PID 1 of somebody else's system is left alone.
pub fn request_power_off() -> Result<(), Errno> {
    if !SUPERVISED.load(Ordering::Relaxed) {
        return Err(Errno::EPERM);
    }
    kill(Pid::from_raw(1), Signal::SIGTERM)
}

fn prepare(options: Options) -> Result<AgentEnvironment, String> {
    // A container shares its kernel's command line, so that cannot tell the two apart; a mounted /proc can.
    if Path::new("/proc/self").exists() {
        if options.die_with_parent
            && let Err(errno) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        {
            say!("the container outlives its runtime: {errno}");
        }
        return Ok(AgentEnvironment { place: Place::Container, command_line: CommandLine::default() });
    }
    mounts::walk(mounts::KERNEL_TABLE)?;
    let command_line = std::fs::read_to_string("/proc/cmdline")
        .map(|text| CommandLine::parse(&text))
        .map_err(|error| format!("cannot read the kernel command line: {error}"))?;
    if let Some(root) = RootDisk::of(&command_line) {
        initramfs::enter_root(&root)?;
    }
    machine::prepare(&command_line)?;
    say!("machine ready after {} s, starting the agent", uptime());
    Ok(AgentEnvironment { place: Place::Machine, command_line })
}

/// Seconds since the kernel started, as it says them itself.
fn uptime() -> String {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_init_of_another_system_is_never_signalled() {
        assert_eq!(request_power_off(), Err(Errno::EPERM));
    }
}
