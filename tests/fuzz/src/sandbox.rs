//! A place where a fuzzed `Remove {"path": "/"}` does no harm: the whole machine is read-only, the process is nobody's, and what it
//! may write is a small file system in memory.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};

/// What may be written: in memory, and only this process sees it.
pub const WORK: &str = "/mnt";

/// Further directories that stay writable, separated by colons: where libFuzzer keeps what it finds.
const WRITABLE: &str = "GUESTD_FUZZ_WRITABLE";

const NOBODY: u32 = 65_534;

/// For a process with one thread.
///
/// # Errors
/// When the machine does not allow it; nothing must then be tried.
pub fn enter() -> io::Result<()> {
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() {
        unshare(libc::CLONE_NEWNS | libc::CLONE_NEWNET)?;
    } else {
        unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWNET)?;
        std::fs::write("/proc/self/setgroups", "deny")?;
        std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
        std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))?;
    }
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    mount(Some("fuzz"), WORK, Some("tmpfs"), MsFlags::empty(), Some("size=64m,nr_inodes=20k,mode=1777"))?;
    let writable = std::env::var(WRITABLE).unwrap_or_default();
    let writable: Vec<&str> = writable.split(':').filter(|path| !path.is_empty()).collect();
    for path in &writable {
        mount(Some(*path), *path, none, MsFlags::MS_BIND, none)?;
    }
    set_read_only(Path::new("/"), true)?;
    for path in writable.into_iter().chain([WORK]) {
        set_read_only(Path::new(path), false)?;
    }
    if uid.is_root() {
        setgroups(&[])?;
        let (user, group) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
    }
    prctl(libc::PR_SET_NO_NEW_PRIVS)?;
    // Giving up root has taken it; without it a leak checker cannot look at its own process.
    prctl(libc::PR_SET_DUMPABLE)?;
    check()
}

/// Sets a flag of prctl(2).
fn prctl(flag: libc::c_int) -> io::Result<()> {
    // SAFETY: these flags take no pointers.
    if unsafe { libc::prctl(flag, 1, 0, 0, 0) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// unshare(2).
fn unshare(what: libc::c_int) -> io::Result<()> {
    // SAFETY: this call takes no pointers.
    if unsafe { libc::unshare(what) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Whether it is safe here.
fn check() -> io::Result<()> {
    if geteuid().is_root() {
        return Err(io::Error::other("still root"));
    }
    for path in ["/", "/proc", "/tmp"] {
        let flags = nix::sys::statvfs::statvfs(path)?.flags();
        if !flags.contains(nix::sys::statvfs::FsFlags::ST_RDONLY) {
            return Err(io::Error::other(format!("{path} can be written")));
        }
    }
    std::env::set_current_dir(WORK)
}

/// mount_setattr(2): for everything below the path, or for the mount there alone.
fn set_read_only(path: &Path, read_only: bool) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bits = libc::MOUNT_ATTR_RDONLY;
    let (set, clear, flags) = if read_only { (bits, 0, libc::AT_RECURSIVE) } else { (0, bits, 0) };
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation: 0, userns_fd: 0 };
    // SAFETY: the path ends with a zero byte, and the attributes live as long as the call, which is told their size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
