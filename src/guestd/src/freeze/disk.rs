//! Freezing a file system: writes wait until it is thawed (ioctl_fs(2): FIFREEZE, FITHAW).

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::errno::Errno;

nix::ioctl_readwrite!(fifreeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(fithaw, b'X', 120, libc::c_int);

/// Freezes the file system that `path` is on. One that is frozen already is no error.
pub(super) fn freeze(path: &Path) -> io::Result<()> {
    let folder = File::open(path)?;
    let mut unused = 0;
    // SAFETY: the descriptor is open, and the kernel ignores the argument.
    accept(unsafe { fifreeze(folder.as_raw_fd(), &raw mut unused) }, Errno::EBUSY)
}

/// Thaws it. One that is not frozen is no error.
pub(super) fn thaw(path: &Path) -> io::Result<()> {
    let folder = File::open(path)?;
    let mut unused = 0;
    // SAFETY: as in `freeze`.
    accept(unsafe { fithaw(folder.as_raw_fd(), &raw mut unused) }, Errno::EINVAL)
}

fn accept(result: nix::Result<libc::c_int>, already: Errno) -> io::Result<()> {
    match result {
        Err(errno) if errno != already => Err(errno.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_already_is_no_error_and_a_refusal_is() {
        assert!(accept(Err(Errno::EBUSY), Errno::EBUSY).is_ok());
        assert!(accept(Err(Errno::EOPNOTSUPP), Errno::EBUSY).is_err());
        assert!(accept(Ok(0), Errno::EINVAL).is_ok());
    }

    /// procfs can never be frozen, so this changes nothing.
    #[test]
    fn a_file_system_that_cannot_be_frozen_says_so() {
        let error = freeze(Path::new("/proc")).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)), "{error}");
        assert!(freeze(Path::new("/nonexistent")).is_err());
    }
}
