//! The guard: a small process around each sandbox. It starts what the plan says, ends it at the hard end, on request, or when the main
//! program ends, and cleans up. It goes on when hostd dies, so that nothing outlives its maximum lifetime (DESIGN.md section 4, rule 9).
//!
//! One thread, no runtime: a loop over signals, the console's pipe, hostd's pipe and one deadline. When the guard itself is killed, the
//! kernel kills what it started (PR_SET_PDEATHSIG).
//!
//! hostd writes one line to its standard input once the sandbox is ready: the hard end, in nanoseconds since boot. If the pipe closes
//! before that line, nobody will ever know of this sandbox, and it ends at once.

use std::ffi::{CStr, CString};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guestd_idle::Moment;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde::{Deserialize, Serialize};

use super::{Input, Overlay, Plan, RunAs};
use crate::clock;

/// The files of a run folder.
pub const PLAN_FILE: &str = "plan.json";
pub const PID_FILE: &str = "guard.pid";
pub const END_FILE: &str = "end.json";
pub const CONSOLE_FILE: &str = "console.log";

/// Descriptor numbers that plans use for their inputs.
pub mod number {
    pub const KERNEL: i32 = 20;
    pub const INITRD: i32 = 21;
    pub const ROOT: i32 = 22;
}

/// The search path of guards and of what they start.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The longest wait: a machine that was suspended wakes with the deadline in the past, and poll(2) does not count its sleep.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// How long a sandbox may be without a deadline from hostd.
const UNKNOWN_LIMIT: Duration = Duration::from_secs(120);

/// The deadline's own slack: hostd, which says goodbye properly, goes first.
const AFTER_HOSTD: Duration = Duration::from_millis(400);

/// How long a helper's socket may take to appear.
const HELPER_LIMIT: Duration = Duration::from_secs(5);

/// What of the guest's console is kept, in bytes. A guest may print for ever.
const CONSOLE_LIMIT: usize = 1 << 20;

/// How long each command of the clean-up may take.
const CLEANUP_LIMIT: Duration = Duration::from_secs(5);

/// What the guard leaves behind for hostd to read.
#[derive(Debug, Serialize, Deserialize)]
pub struct End {
    /// Why, in one sentence.
    pub what: String,
}

/// Runs the guard of the run folder that is the working directory; returns when the sandbox is over and cleaned up.
///
/// # Errors
/// When the plan cannot be carried out; what was started is ended.
pub fn run() -> Result<()> {
    let plan: Plan =
        serde_json::from_slice(&std::fs::read(PLAN_FILE).context(PLAN_FILE)?).context(PLAN_FILE)?;
    let mut guard = Guard { children: Vec::new(), mounted: None };
    let what = guard.live(&plan);
    guard.end_children();
    for command in &plan.at_end {
        run_bounded(command);
    }
    guard.unmount();
    let text = match &what {
        Ok(what) => what.clone(),
        Err(error) => format!("{error:#}"),
    };
    let end = serde_json::to_vec(&End { what: text }).context(END_FILE)?;
    std::fs::write(END_FILE, end).context(END_FILE)?;
    what.map(drop)
}

struct Guard {
    children: Vec<Child>,
    mounted: Option<PathBuf>,
}

impl Guard {
    /// Starts everything and watches it to its end; the result says why it ended.
    fn live(&mut self, plan: &Plan) -> Result<String> {
        let signals = block_signals()?;
        let inputs = open_inputs(&plan.inputs)?;
        if let Some(overlay) = &plan.overlay {
            self.mounted = Some(mount_overlay(overlay)?);
        }
        // One pipe for all of them, because what is read from it is bounded.
        let (console, writer) = io::pipe().context("the console's pipe")?;
        if let Some(helper) = &plan.helper {
            let child = spawn(
                &helper.command,
                plan,
                &inputs,
                writer.try_clone()?.into(),
                writer.try_clone()?.into(),
            )?;
            self.children.push(child);
            let folder = plan.folder.as_deref().unwrap_or(".");
            self.await_helper(&helper.command, &Path::new(folder).join(&helper.socket))?;
        }
        if !plan.main.is_empty() {
            let main = spawn(&plan.main, plan, &inputs, writer.try_clone()?.into(), writer.into())?;
            self.children.push(main);
        }
        drop(inputs);
        self.watch(&signals, Console::new_in(Path::new("."), console)?)
    }

    fn await_helper(&mut self, command: &[String], socket: &Path) -> Result<()> {
        let give_up = Instant::now() + HELPER_LIMIT;
        while !socket.exists() {
            if let Some(status) = self.children.last_mut().and_then(|helper| helper.try_wait().ok().flatten())
            {
                bail!("{} ended at once ({status})", command[0]);
            }
            if Instant::now() > give_up {
                bail!("{} made no socket within {HELPER_LIMIT:?}", command[0]);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn watch(&mut self, signals: &SignalFd, mut console: Console) -> Result<String> {
        let hostd = io::stdin();
        let mut hostd_open = true;
        let mut line = Vec::new();
        let mut deadline = clock::now() + UNKNOWN_LIMIT;
        let mut known = false;
        loop {
            let wait = deadline.since(clock::now());
            if wait.is_zero() {
                return Ok(if known { "reached its hard end" } else { "hostd never said that it was ready" }
                    .to_owned());
            }
            let mut polled = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            let console_at = console.is_open().then_some(polled.len());
            if console.is_open() {
                polled.push(PollFd::new(console.as_fd(), PollFlags::POLLIN));
            }
            let hostd_at = hostd_open.then_some(polled.len());
            if hostd_open {
                polled.push(PollFd::new(hostd.as_fd(), PollFlags::POLLIN));
            }
            let millis = u16::try_from(wait.min(LONGEST_WAIT).as_millis() + 1).unwrap_or(u16::MAX);
            match poll(&mut polled, PollTimeout::from(millis)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("poll"),
            }
            let has = |at: Option<usize>| at.is_some_and(|at| polled[at].any().unwrap_or(false));
            let (console_ready, hostd_ready) = (has(console_at), has(hostd_at));
            while let Some(signal) = signals.read_signal().context("signalfd")? {
                if signal.ssi_signo != Signal::SIGCHLD as u32 {
                    return Ok("was stopped".to_owned());
                }
            }
            if console_ready {
                console.read();
            }
            if hostd_ready {
                hostd_open = read_line(hostd.as_fd(), &mut line);
                if let Some(end) = parse_deadline(&line) {
                    deadline = end + AFTER_HOSTD;
                    known = true;
                    line.clear();
                }
                if !hostd_open && !known {
                    return Ok("hostd went away before it was ready".to_owned());
                }
            }
            if let Some(ended) = self.ended_child() {
                console.read();
                return Ok(ended);
            }
        }
    }

    /// The end of any child is the end: a VM without its link is of no use.
    fn ended_child(&mut self) -> Option<String> {
        let last = self.children.len().checked_sub(1)?;
        for (index, child) in self.children.iter_mut().enumerate() {
            if let Ok(Some(status)) = child.try_wait() {
                let who = if index == last { "the machine" } else { "its link process" };
                return Some(format!("{who} ended: {}", describe(status)));
            }
        }
        None
    }

    fn end_children(&mut self) {
        for child in self.children.iter_mut().rev() {
            if let Ok(None) = child.try_wait() {
                // Both answer only whether it was gone already.
                let _gone = child.kill();
                let _status = child.wait();
            }
        }
    }

    fn unmount(&mut self) {
        if let Some(target) = self.mounted.take()
            && let Err(error) = umount2(&target, MntFlags::MNT_DETACH)
        {
            eprintln!("cannot unmount {}: {error}", target.display());
        }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(0), _) => "powered off".to_owned(),
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => status.to_string(),
    }
}

/// What the machine prints, kept up to a limit.
struct Console {
    pipe: Option<io::PipeReader>,
    log: File,
    left: usize,
    full: bool,
}

impl Console {
    fn new_in(folder: &Path, pipe: io::PipeReader) -> Result<Self> {
        let flags = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(&pipe, flags).context("the console's pipe")?;
        let log = File::create(folder.join(CONSOLE_FILE)).context(CONSOLE_FILE)?;
        Ok(Self { pipe: Some(pipe), log, left: CONSOLE_LIMIT, full: false })
    }

    fn is_open(&self) -> bool {
        self.pipe.is_some()
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_ref().map_or_else(|| self.log.as_fd(), |pipe| pipe.as_fd())
    }

    /// Reads what is there. A flood is read in turns, so that it never holds up the deadline.
    fn read(&mut self) {
        let Some(pipe) = &mut self.pipe else { return };
        let mut buffer = [0; 16 * 1024];
        match pipe.read(&mut buffer) {
            Ok(0) => self.pipe = None,
            Ok(count) => {
                let kept = count.min(self.left);
                self.left -= kept;
                // A full disk must not end a sandbox: its console is the smaller loss.
                let _written = self.log.write_all(&buffer[..kept]);
                if kept < count && !std::mem::replace(&mut self.full, true) {
                    let _written =
                        self.log.write_all(b"\n[the console's limit is reached; the rest is dropped]\n");
                }
            }
            Err(_would_block) => {}
        }
    }
}

fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().context("cannot block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).context("signalfd")
}

fn open_inputs(inputs: &[Input]) -> Result<Vec<(File, i32)>> {
    let open = |input: &Input| -> Result<(File, i32)> {
        let file =
            File::open(&input.path).with_context(|| format!("cannot open {}", input.path.display()))?;
        Ok((file, input.number))
    };
    inputs.iter().map(open).collect()
}

fn mount_overlay(overlay: &Overlay) -> Result<PathBuf> {
    let options =
        format!("lowerdir={},upperdir={},workdir={}", overlay.lower.display(), overlay.upper, overlay.work);
    let target = PathBuf::from(&overlay.target);
    mount(Some("overlay"), &target, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .with_context(|| format!("cannot mount an overlay of {}", overlay.lower.display()))?;
    Ok(target)
}

/// Starts a program of the plan.
fn spawn(
    command: &[String],
    plan: &Plan,
    inputs: &[(File, i32)],
    stdout: Stdio,
    stderr: Stdio,
) -> Result<Child> {
    let name = command.first().context("a plan without a command")?;
    let program = find_program(name)?;
    let mut builder = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    builder.arg0(name).args(&command[1..]).stdin(Stdio::null()).stdout(stdout).stderr(stderr);
    let guard = i32::try_from(std::process::id()).context("a pid")?;
    let descriptors: Vec<(i32, i32)> =
        inputs.iter().map(|(file, number)| (file.as_raw_fd(), *number)).collect();
    let run_as = plan.run_as.clone();
    let folder = plan.folder.clone().map(CString::new).transpose().context("the plan's folder")?;
    builder.env_clear().env("PATH", PATH);
    // SAFETY: the hook makes system calls only; `descriptors` and `run_as` are not changed after the fork.
    unsafe {
        builder.pre_exec(move || become_child(guard, &descriptors, folder.as_deref(), run_as.as_ref()));
    }
    let child = builder.spawn().with_context(|| format!("cannot start {name}"))?;
    drop(program);
    Ok(child)
}

/// Opened here, with the guard's rights: the user that the program runs as may not be able to reach it by its path.
fn find_program(name: &str) -> Result<OwnedFd> {
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![PathBuf::from(name)]
    } else {
        std::env::split_paths(PATH).map(|folder| folder.join(name)).collect()
    };
    for candidate in candidates {
        if let Ok(file) =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_CLOEXEC).open(&candidate)
        {
            return Ok(file.into());
        }
    }
    bail!("{name} is not installed")
}

/// Between fork and exec.
fn become_child(
    guard: i32,
    descriptors: &[(i32, i32)],
    folder: Option<&CStr>,
    run_as: Option<&RunAs>,
) -> io::Result<()> {
    let check = |result: i32| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) };
    // SAFETY: system calls on values that live through them.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        for (from, to) in descriptors {
            // dup2 leaves the copy open across exec, which is what it is for.
            check(libc::dup2(*from, *to))?;
        }
        if let Some(folder) = folder {
            check(libc::chdir(folder.as_ptr()))?;
        }
        if let Some(run_as) = run_as {
            check(libc::setgroups(run_as.groups.len(), run_as.groups.as_ptr()))?;
            check(libc::setgid(run_as.gid))?;
            check(libc::setuid(run_as.uid))?;
        }
        // After the change of user, which clears it.
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))?;
        // A guard that died before that line will never send the signal.
        if libc::getppid() != guard {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        if run_as.is_some() {
            check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        }
    }
    Ok(())
}

/// Reads what hostd wrote; false when its end is closed.
fn read_line(hostd: BorrowedFd<'_>, line: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 64];
    match nix::unistd::read(hostd, &mut buffer) {
        Ok(0) => false,
        Ok(count) => {
            line.extend_from_slice(&buffer[..count]);
            line.len() <= 4096
        }
        Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => true,
        Err(_) => false,
    }
}

fn parse_deadline(line: &[u8]) -> Option<Moment> {
    let end = line.iter().rposition(|byte| *byte == b'\n')?;
    let last = line[..end].rsplit(|byte| *byte == b'\n').next()?;
    std::str::from_utf8(last).ok()?.parse().ok().map(Moment::from_nanos)
}

/// Runs a command of the clean-up, for a while.
fn run_bounded(command: &[String]) {
    let Some((name, arguments)) = command.split_first() else { return };
    let spawned = Command::new(name).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let Ok(mut child) = spawned else { return };
    let give_up = Instant::now() + CLEANUP_LIMIT;
    while let Ok(None) = child.try_wait() {
        if Instant::now() > give_up {
            let _gone = child.kill();
            let _status = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Does the clean-up of a guard that was killed before it could.
pub fn clean_up_after(folder: &Path) {
    let plan = std::fs::read(folder.join(PLAN_FILE))
        .ok()
        .and_then(|text| serde_json::from_slice::<Plan>(&text).ok());
    let Some(plan) = plan else { return };
    for command in &plan.at_end {
        run_bounded(command);
    }
    if let Some(overlay) = &plan.overlay {
        let _not_mounted = umount2(&folder.join(&overlay.target), MntFlags::MNT_DETACH);
    }
}

/// Whether a process still is the one that was started then.
pub fn is_alive(pid: i32, start_ticks: u64) -> bool {
    start_ticks_of(pid) == Some(start_ticks)
}

/// When a process started, in ticks since boot: the 22nd field of its stat (proc(5)). None for one that is gone or a zombie.
pub fn start_ticks_of(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so the fields are counted from its end.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    if fields.next() == Some("Z") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_read_from_a_whole_line_only() {
        assert_eq!(parse_deadline(b"12"), None);
        assert_eq!(parse_deadline(b"12\n"), Some(Moment::from_nanos(12)));
        assert_eq!(parse_deadline(b"12\n13\n"), Some(Moment::from_nanos(13)), "the newest counts");
        assert_eq!(parse_deadline(b"soon\n"), None);
    }

    #[test]
    fn a_flood_on_the_console_fills_no_disk_and_is_said_once() {
        let folder = tempfile::tempdir().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let mut console = Console::new_in(folder.path(), reader).unwrap();
        for _ in 0..CONSOLE_LIMIT / 4096 + 20 {
            writer.write_all(&[b'x'; 4096]).unwrap();
            console.read();
        }
        drop(writer);
        console.read();
        assert!(!console.is_open());
        let log = std::fs::read_to_string(folder.path().join(CONSOLE_FILE)).unwrap();
        assert!(log.len() < CONSOLE_LIMIT + 200);
        assert_eq!(log.matches("limit is reached").count(), 1);
    }

    #[test]
    fn a_pid_that_came_back_is_not_taken_for_the_old_process() {
        let own = i32::try_from(std::process::id()).unwrap();
        let ticks = start_ticks_of(own).unwrap();
        assert!(is_alive(own, ticks));
        assert!(!is_alive(own, ticks + 1));
        assert_eq!(start_ticks_of(i32::MAX), None);
    }
}
