//! Forking a child straight into its control group.
//!
//! clone3(2) with CLONE_INTO_CGROUP, because the other way, a write to `cgroup.procs`, waits for all processors to pass a quiet state:
//! 17 ms were measured for the first one after a pause, 60 µs for the next. Kernels and sandboxes without it (ENOSYS under seccomp and
//! gVisor, EINVAL before Linux 5.7) get a plain fork, and the child writes to `cgroup.procs` itself.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_long};

/// From linux/sched.h; too wide for the types of libc's constants. The first gives the child the default handlers: a signal that comes
/// before its exec must not run a handler that speaks to the parent.
const CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of the fork this is.
pub(super) enum Side {
    /// `placed` is false when the child has still to enter its group.
    Child { placed: bool },
    /// The descriptor of the child, where the kernel gave one.
    Parent { pid: i32, pidfd: Option<OwnedFd> },
}

/// Forks; `group` is an open directory of a cgroup v2 hierarchy.
///
/// # Errors
/// The kernel's answer: EAGAIN at a limit of processes, ENOMEM, EBUSY or EACCES of the group.
///
/// # Safety
/// The child may only make system calls, on its own, until it has replaced itself or ended: other threads of the parent may have held
/// any lock, and the C library does not know that it was forked.
pub(super) unsafe fn fork(group: Option<BorrowedFd<'_>>) -> io::Result<Side> {
    let mut pidfd: c_int = -1;
    // SAFETY: a plain structure of integers.
    let mut arguments: libc::clone_args = unsafe { mem::zeroed() };
    arguments.flags = u64::from(libc::CLONE_PIDFD.cast_unsigned()) | CLEAR_SIGHAND;
    arguments.pidfd = (&raw mut pidfd).expose_provenance() as u64;
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(group) = group {
        arguments.flags |= INTO_CGROUP;
        arguments.cgroup = group.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child gets a copy of everything, as with fork(2); `arguments` and `pidfd` outlive the call.
    let result: c_long =
        unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, mem::size_of::<libc::clone_args>()) };
    match result {
        0 => return Ok(Side::Child { placed: true }),
        1.. => {
            // SAFETY: CLONE_PIDFD filled it in, and nobody else owns it.
            let pidfd = (pidfd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(pidfd) });
            return Ok(Side::Parent { pid: result as i32, pidfd });
        }
        _ => {}
    }
    let error = io::Error::last_os_error();
    if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL | libc::EPERM | libc::E2BIG)) {
        return Err(error);
    }
    // SAFETY: the caller's promise.
    match unsafe { libc::fork() } {
        0 => Ok(Side::Child { placed: group.is_none() }),
        pid if pid > 0 => Ok(Side::Parent { pid, pidfd: None }),
        _ => Err(io::Error::last_os_error()),
    }
}
