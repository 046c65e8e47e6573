//! Starting a process: fork, become the user, exec.
//!
//! The child does its own search for the executable and its own exec, so that a missing file is what it is for a shell: the process
//! starts, says so on stderr and exits with 127, or with 126 for a file that cannot be run (contract: envd.md section 1.10). Failures before
//! that (the working directory, the user, the terminal), and an exec that failed for the size of the request or for want of something, are
//! the start's own error, which comes back through a pipe that a successful exec closes.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::ptr;
use std::sync::Arc;

use libc::{c_char, c_int};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::net::unix::pipe;

use super::fork::{Side, fork};
use super::input::Sink;
use super::leader::{Leader, reap};
use super::spec::{Spec, excerpt};
use super::terminal::{self, Terminal};

/// The exit codes of a shell that cannot run a command.
const EXIT_NOT_FOUND: c_int = 127;
const EXIT_NOT_EXECUTABLE: c_int = 126;

/// What commands get, where the agent itself has less: the kernel ends them first (contract: envd.md section 2.2).
const OOM_SCORE_ADJ: &[u8] = b"100";

/// ioprio_set(2): this process, best effort, level 4.
const IOPRIO_WHO_PROCESS: c_int = 1;
const IOPRIO_BEST_EFFORT_4: c_int = (2 << 13) | 4;

/// A command starts with these as a login shell would have them, however the agent itself was started.
const DEFAULT_SIGNALS: [c_int; 12] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGTERM,
    libc::SIGCHLD,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
];

/// How long an exec may take (a hung network file system, a group that somebody froze by hand), in milliseconds. The agent waits.
const EXEC_LIMIT: u16 = 2000;

/// A started process and its ends of pipes or terminal.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) pid: u32,
    pub(super) leader: Leader,
    pub(super) sink: Option<Sink>,
    pub(super) sources: Sources,
}

/// Where its output comes from.
#[derive(Debug)]
pub(super) enum Sources {
    Pipes { stdout: pipe::Receiver, stderr: pipe::Receiver },
    Terminal(Arc<Terminal>),
}

/// Everything that the child needs, made before the fork: after it nothing may allocate.
struct Exec {
    argv: Pointers,
    environment: Pointers,
    candidates: Vec<CString>,
    shell_argv: Pointers,
    /// What it is called on stderr.
    name: String,
    directory: CString,
    groups: Vec<libc::gid_t>,
    gid: libc::gid_t,
    uid: libc::uid_t,
    switch_user: bool,
}

/// A NULL-terminated array of C strings, and the strings.
struct Pointers {
    pointers: Vec<*const c_char>,
    _owned: Vec<CString>,
}

impl Pointers {
    fn new(owned: Vec<CString>) -> Self {
        let mut pointers: Vec<_> = owned.iter().map(|text| text.as_ptr()).collect();
        pointers.push(ptr::null());
        Self { pointers, _owned: owned }
    }
}

/// The child's standard streams, and the agent's ends of them.
struct Streams {
    child: [OwnedFd; 3],
    sink: Option<Sink>,
    sources: Sources,
}

impl Streams {
    fn new(spec: &Spec) -> io::Result<Self> {
        if let Some(size) = spec.terminal {
            let (terminal, slave) = Terminal::open(size)?;
            terminal::give_to(slave.as_fd(), spec.user.uid);
            let terminal = Arc::new(terminal);
            return Ok(Self {
                child: [slave.try_clone()?, slave.try_clone()?, slave],
                sink: Some(Sink::Terminal(Arc::clone(&terminal))),
                sources: Sources::Terminal(terminal),
            });
        }
        let (stdin, sink) = if spec.stdin {
            let (reader, writer) = io::pipe()?;
            (reader.into(), Some(Sink::Pipe(pipe::Sender::from_owned_fd(writer.into())?)))
        } else {
            (File::open("/dev/null")?.into(), None)
        };
        let (stdout, stdout_writer) = io::pipe()?;
        let (stderr, stderr_writer) = io::pipe()?;
        let sources = Sources::Pipes {
            stdout: pipe::Receiver::from_owned_fd(stdout.into())?,
            stderr: pipe::Receiver::from_owned_fd(stderr.into())?,
        };
        Ok(Self { child: [stdin, stdout_writer.into(), stderr_writer.into()], sink, sources })
    }
}

/// Starts what `spec` says: in a process group of its own, or as the leader of its terminal's session. `group` is the open directory of
/// its control group.
///
/// # Errors
/// What the system said of the fork, the user, the terminal or the working directory.
pub(super) fn spawn(spec: &Spec, group: Option<BorrowedFd<'_>>) -> io::Result<Spawned> {
    let exec = Exec::new(spec)?;
    let Streams { child, sink, sources } = Streams::new(spec)?;
    let raw = [child[0].as_raw_fd(), child[1].as_raw_fd(), child[2].as_raw_fd()];
    let (verdict, report) = io::pipe()?;
    // SAFETY: the child's branch makes system calls only and ends in an exec or an exit.
    match unsafe { fork(group)? } {
        Side::Child { placed } => {
            let unplaced = if placed { None } else { group };
            let errno = exec.run(raw, spec.terminal.is_some(), unplaced);
            // SAFETY: a write to a descriptor of our own and the end, on copies of the parent's memory.
            unsafe {
                libc::write(report.as_raw_fd(), (&raw const errno).cast(), size_of::<c_int>());
                libc::_exit(EXIT_NOT_EXECUTABLE);
            }
        }
        Side::Parent { pid, pidfd } => {
            drop((report, child));
            let mut leader = match pidfd {
                Some(fd) => Leader::new(pid, Some(fd)),
                None => Leader::adopt(pid.cast_unsigned()),
            }
            .inspect_err(|_| discard(pid))?;
            match started(verdict) {
                Ok(()) => Ok(Spawned { pid: pid.cast_unsigned(), leader, sink, sources }),
                Err(error) => {
                    if error.kind() == io::ErrorKind::TimedOut {
                        let _gone = nix::sys::signal::kill(
                            nix::unistd::Pid::from_raw(pid),
                            nix::sys::signal::Signal::SIGKILL,
                        );
                        // It may hang where no signal reaches it.
                        tokio::spawn(async move { leader.wait().await });
                    } else {
                        let _reaped = reap(pid, 0);
                    }
                    Err(error)
                }
            }
        }
    }
}

/// The child runs and cannot be waited for: it must not stay.
fn discard(pid: i32) {
    let _gone = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
    let _reaped = reap(pid, 0);
}

/// Waits for the exec, or for what stood in its way.
fn started(mut verdict: io::PipeReader) -> io::Result<()> {
    loop {
        match poll(&mut [PollFd::new(verdict.as_fd(), PollFlags::POLLIN)], PollTimeout::from(EXEC_LIMIT)) {
            Ok(0) => return Err(io::Error::new(io::ErrorKind::TimedOut, "its exec did not finish in time")),
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut errno = [0; size_of::<c_int>()];
    match verdict.read(&mut errno)? {
        0 => Ok(()),
        _ => Err(io::Error::from_raw_os_error(c_int::from_ne_bytes(errno))),
    }
}

impl Exec {
    fn new(spec: &Spec) -> io::Result<Self> {
        // SAFETY: geteuid cannot fail.
        let own = unsafe { libc::geteuid() };
        let mut shell = vec![c"/bin/sh".to_owned(), CString::default()];
        shell.extend(spec.argv.iter().skip(1).cloned());
        Ok(Self {
            argv: Pointers::new(spec.argv.clone()),
            environment: Pointers::new(spec.environment.clone()),
            candidates: spec.candidates.clone(),
            shell_argv: Pointers::new(shell),
            // Never more than the pipe of stderr holds.
            name: excerpt(&spec.config.cmd).into_owned(),
            directory: CString::new(spec.directory.as_os_str().as_bytes())?,
            groups: spec.user.groups.clone(),
            gid: spec.user.gid,
            uid: spec.user.uid,
            switch_user: own == 0 || own != spec.user.uid,
        })
    }

    /// In the child. Returns only with the error of the start itself.
    fn run(&self, streams: [RawFd; 3], terminal: bool, unplaced: Option<BorrowedFd<'_>>) -> c_int {
        match self.prepare(streams, terminal, unplaced) {
            Ok(()) => self.replace(),
            Err(errno) => errno,
        }
    }

    fn prepare(
        &self,
        streams: [RawFd; 3],
        terminal: bool,
        unplaced: Option<BorrowedFd<'_>>,
    ) -> Result<(), c_int> {
        if let Some(group) = unplaced {
            // Before the user switch: the group is the agent's.
            enter(group)?;
        }
        write_file(c"/proc/self/oom_score_adj", OOM_SCORE_ADJ);
        // SAFETY: plain system calls; the strings and arrays live as long as `self`.
        unsafe {
            for signal in DEFAULT_SIGNALS {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()))?;
            for (target, source) in (0..).zip(streams) {
                // The copy stays open across exec. The sources are above 2: those three are open in every Rust program.
                check(libc::dup2(source, target))?;
            }
            if terminal {
                check(libc::setsid())?;
                check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
            } else {
                check(libc::setpgid(0, 0))?;
            }
            libc::setpriority(libc::PRIO_PROCESS, 0, 0);
            libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_4);
            if self.switch_user {
                // Not the C library's: its functions would have every thread follow, and it does not know that there is one only.
                check_long(libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()))?;
                check_long(libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid))?;
                check_long(libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid))?;
            }
            // After the switch: the user's permissions decide.
            check(libc::chdir(self.directory.as_ptr()))
        }
    }

    /// Becomes the program, or says on stderr why not, as a shell would. Returns with an error that is the start's own.
    fn replace(&self) -> c_int {
        let mut refused = None;
        for candidate in &self.candidates {
            let mut errno = self.exec(candidate, &self.argv);
            if errno == libc::ENOEXEC {
                // A script without an interpreter line: the shell's, as execvp(3) has it. In the child, after the fork, the array is this
                // process's own copy.
                // SAFETY: the array has two strings at least.
                unsafe { *self.shell_argv.pointers.as_ptr().cast_mut().add(1) = candidate.as_ptr() };
                errno = match self.exec(c"/bin/sh", &self.shell_argv) {
                    of_shell if is_of_start(of_shell) => of_shell,
                    _ => errno,
                };
            }
            match errno {
                libc::ENOENT | libc::ENOTDIR => {}
                errno if is_of_start(errno) => return errno,
                errno => refused = refused.or(Some(errno)),
            }
        }
        let (why, code) =
            refused.map_or(("not found", EXIT_NOT_FOUND), |errno| (words(errno), EXIT_NOT_EXECUTABLE));
        let piece =
            |text: &str| libc::iovec { iov_base: text.as_ptr().cast_mut().cast(), iov_len: text.len() };
        let line = [piece(&self.name), piece(": "), piece(why), piece("\n")];
        // SAFETY: the pieces are strings that outlive the call, which only reads them.
        unsafe {
            libc::writev(2, line.as_ptr(), line.len() as c_int);
            libc::_exit(code);
        }
    }

    /// execve(2); returns with its error.
    fn exec(&self, file: &CStr, argv: &Pointers) -> c_int {
        // SAFETY: a plain system call; the strings and arrays live as long as `self`.
        unsafe { libc::execve(file.as_ptr(), argv.pointers.as_ptr(), self.environment.pointers.as_ptr()) };
        Errno::last_raw()
    }
}

/// Errors of an exec that say nothing of the file: the request is too large, or the machine or the user has no more to give.
const fn is_of_start(errno: c_int) -> bool {
    matches!(errno, libc::E2BIG | libc::EAGAIN | libc::ENOMEM | libc::EMFILE | libc::ENFILE)
}

/// As the C library, and so a shell, has it; its own function may allocate.
fn words(errno: c_int) -> &'static str {
    match errno {
        libc::ELOOP => "Too many levels of symbolic links",
        libc::EIO => "Input/output error",
        errno => Errno::from_raw(errno).desc(),
    }
}

/// Moves this process into a control group.
fn enter(group: BorrowedFd<'_>) -> Result<(), c_int> {
    // SAFETY: an open, a write and a close on a descriptor of our own; all are async-signal-safe.
    unsafe {
        let fd = libc::openat(group.as_raw_fd(), c"cgroup.procs".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        check(fd)?;
        let wrote = libc::write(fd, c"0".as_ptr().cast(), 1);
        check(c_int::try_from(wrote).unwrap_or(-1))?;
        libc::close(fd);
    }
    Ok(())
}

fn check(result: c_int) -> Result<(), c_int> {
    if result < 0 { Err(Errno::last_raw()) } else { Ok(()) }
}

fn check_long(result: libc::c_long) -> Result<(), c_int> {
    if result < 0 { Err(Errno::last_raw()) } else { Ok(()) }
}

/// Best effort: a container may not let us.
fn write_file(path: &CStr, text: &[u8]) {
    // SAFETY: an open, a write and a close on a descriptor of our own; all are async-signal-safe.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, text.as_ptr().cast(), text.len());
            libc::close(fd);
        }
    }
}

/// How many bytes a pipe or a terminal holds at this moment.
pub(super) fn pending(pipe: &impl AsRawFd) -> usize {
    let mut count: c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let asked = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if asked < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}
