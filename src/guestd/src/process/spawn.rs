//! Starting a process: fork, become the user, exec.
//!
//! The child does its own search for the executable and its own exec, so that a missing file is what it is for a shell: the process
//! starts, says so on stderr and exits with 127 (contract: envd.md section 1.10). Failures before that (the working directory, the
//! user) are the start's own error.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::ptr;

use libc::{c_char, c_int};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};

use super::Spec;

/// The exit codes of a shell that cannot run a command.
const EXIT_NOT_FOUND: c_int = 127;
const EXIT_NOT_EXECUTABLE: c_int = 126;

/// What commands get, where the agent itself has less: the kernel ends them first (contract: envd.md section 2.2).
const OOM_SCORE_ADJ: &[u8] = b"100";

/// ioprio_set(2): this process, best effort, level 4.
const IOPRIO_WHO_PROCESS: c_int = 1;
const IOPRIO_BEST_EFFORT_4: c_int = (2 << 13) | 4;

/// A started process and its pipes.
pub(super) struct Spawned {
    pub(super) pid: u32,
    pub(super) child: Child,
    pub(super) stdin: Option<ChildStdin>,
    pub(super) stdout: Option<ChildStdout>,
    pub(super) stderr: Option<ChildStderr>,
}

/// Everything that the child needs, made before the fork: after it nothing may allocate.
struct Exec {
    argv: Pointers,
    environment: Pointers,
    candidates: Vec<CString>,
    shell_argv: Pointers,
    missing: Vec<u8>,
    denied: Vec<u8>,
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

// SAFETY: the pointers are into `_owned`, which moves along with them, and nothing changes either.
unsafe impl Send for Pointers {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for Pointers {}

impl Pointers {
    fn new(owned: Vec<CString>) -> Self {
        let mut pointers: Vec<_> = owned.iter().map(|text| text.as_ptr()).collect();
        pointers.push(ptr::null());
        Self { pointers, _owned: owned }
    }
}

/// Starts what `spec` says, in a process group of its own.
///
/// # Errors
/// What the system said of the fork, the user or the working directory.
pub(super) fn spawn(spec: &Spec) -> io::Result<Spawned> {
    use std::process::Stdio;
    let exec = Exec::new(spec)?;
    // The program is never run: the hook below replaces the process first.
    let mut command = Command::new("/proc/self/exe");
    command
        .stdin(if spec.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(false);
    // SAFETY: the hook runs between fork and exec; it makes system calls only and touches no lock and no allocator.
    unsafe {
        command.pre_exec(move || exec.run());
    }
    let mut child = command.spawn()?;
    let pid = child.id().ok_or_else(|| io::Error::other("the process ended before it had a number"))?;
    Ok(Spawned {
        pid,
        stdin: child.stdin.take(),
        stdout: child.stdout.take(),
        stderr: child.stderr.take(),
        child,
    })
}

impl Exec {
    fn new(spec: &Spec) -> io::Result<Self> {
        // SAFETY: geteuid cannot fail.
        let own = unsafe { libc::geteuid() };
        let mut shell = vec![c"/bin/sh".to_owned(), CString::default()];
        shell.extend(spec.argv.iter().skip(1).cloned());
        let name = &spec.config.cmd;
        Ok(Self {
            argv: Pointers::new(spec.argv.clone()),
            environment: Pointers::new(spec.environment.clone()),
            candidates: spec.candidates.clone(),
            shell_argv: Pointers::new(shell),
            missing: format!("{name}: not found\n").into_bytes(),
            denied: format!("{name}: Permission denied\n").into_bytes(),
            directory: CString::new(spec.directory.as_os_str().as_bytes())?,
            groups: spec.user.groups.clone(),
            gid: spec.user.gid,
            uid: spec.user.uid,
            switch_user: own == 0 || own != spec.user.uid,
        })
    }

    /// In the child. Returns only with an error of the start itself.
    fn run(&self) -> io::Result<()> {
        write_file(c"/proc/self/oom_score_adj", OOM_SCORE_ADJ);
        // SAFETY: plain system calls; the strings and arrays live as long as `self`.
        unsafe {
            libc::setpriority(libc::PRIO_PROCESS, 0, 0);
            libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, IOPRIO_BEST_EFFORT_4);
            if self.switch_user {
                check(libc::setgroups(self.groups.len(), self.groups.as_ptr()))?;
                check(libc::setgid(self.gid))?;
                check(libc::setuid(self.uid))?;
            }
            // After the switch: the user's permissions decide.
            check(libc::chdir(self.directory.as_ptr()))?;
            let mut denied = false;
            for candidate in &self.candidates {
                libc::execve(
                    candidate.as_ptr(),
                    self.argv.pointers.as_ptr(),
                    self.environment.pointers.as_ptr(),
                );
                match io::Error::last_os_error().raw_os_error() {
                    Some(libc::ENOENT | libc::ENOTDIR) => {}
                    // A script without an interpreter line: the shell's, as execvp(3) has it. In the child, after the fork, the array
                    // is this process's own copy.
                    Some(libc::ENOEXEC) => {
                        let argv = self.shell_argv.pointers.as_ptr().cast_mut();
                        *argv.add(1) = candidate.as_ptr();
                        libc::execve(c"/bin/sh".as_ptr(), argv, self.environment.pointers.as_ptr());
                        denied = true;
                    }
                    _ => denied = true,
                }
            }
            let (text, code) =
                if denied { (&self.denied, EXIT_NOT_EXECUTABLE) } else { (&self.missing, EXIT_NOT_FOUND) };
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::_exit(code);
        }
    }
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Best effort: a container may not let us.
fn write_file(path: &std::ffi::CStr, text: &[u8]) {
    // SAFETY: an open, a write and a close on a descriptor of our own; all are async-signal-safe.
    unsafe {
        let fd = libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if fd >= 0 {
            libc::write(fd, text.as_ptr().cast(), text.len());
            libc::close(fd);
        }
    }
}

/// How many bytes a pipe holds at this moment.
pub(super) fn pending(pipe: &impl AsRawFd) -> usize {
    let mut count: c_int = 0;
    // SAFETY: FIONREAD writes one int.
    let asked = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &raw mut count) };
    if asked < 0 { 0 } else { usize::try_from(count).unwrap_or(0) }
}
