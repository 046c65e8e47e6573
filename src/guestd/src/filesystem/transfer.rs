//! Moving a file or a tree to another file system, where rename(2) cannot.
//!
//! The copy is made under a hidden name beside the destination and renamed over it when it is complete, so that the destination
//! is never half there. Owners, modes, times, links, special files and extended attributes are kept, as far as the caller may give
//! them; hard links within the tree become files of their own.

use std::ffi::OsStr;
use std::fs::{File, FileTimes, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, readlinkat, renameat};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, fchownat, symlinkat};

use super::place::{Place, look, open_at};
use super::sys;
use super::walk::{names, open_directory, remove};

/// How deep a tree may be: two directories of each level are open while it is copied.
const MOST_LEVELS: usize = 256;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Moves `source` to `destination` by copying.
///
/// # Errors
///
/// What rename(2) would have said about the destination, before anything is copied; or the first error of the copy, which is then
/// removed again and leaves the source whole. `ENAMETOOLONG` for a tree of more than [`MOST_LEVELS`] levels. An error while the
/// source is being removed leaves the destination complete.
pub(super) fn move_across(source: &Place, destination: &Place) -> io::Result<()> {
    let metadata = source.look()?.metadata()?;
    check_replaceable(&metadata, destination)?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let staging = format!(".guestd-move-{}-{number}", std::process::id());
    let staging = OsStr::new(&staging);
    let (from, to) = (source.parent.as_fd(), destination.parent.as_fd());
    let copied = copy((from, &source.name), (to, staging), MOST_LEVELS)
        .and_then(|()| Ok(renameat(to, staging, to, destination.name.as_os_str())?));
    if let Err(error) = copied {
        // What remains of the copy is of no use to anybody; the error that is reported is the one that caused this.
        let _ = remove(to, staging);
        return Err(error);
    }
    remove(from, &source.name)
}

/// The refusals of rename(2), early: nobody wants to hear of them after a gigabyte.
fn check_replaceable(source: &Metadata, destination: &Place) -> io::Result<()> {
    let Ok(existing) = destination.look().and_then(|existing| existing.metadata()) else { return Ok(()) };
    let full = || -> io::Result<bool> {
        let directory = open_directory(&destination.parent, &destination.name)?;
        Ok(!names(directory.as_fd(), 1)?.is_empty())
    };
    match (source.is_dir(), existing.is_dir()) {
        (false, true) => Err(Errno::EISDIR.into()),
        (true, false) => Err(Errno::ENOTDIR.into()),
        (true, true) if full()? => Err(Errno::ENOTEMPTY.into()),
        _ => Ok(()),
    }
}

/// Copies what is at one name to another, which must be free.
fn copy(source: (BorrowedFd<'_>, &OsStr), to: (BorrowedFd<'_>, &OsStr), levels: usize) -> io::Result<()> {
    let found = look(source.0, source.1)?;
    let metadata = found.metadata()?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        let below = levels.checked_sub(1).ok_or(Errno::ENAMETOOLONG)?;
        copy_directory(source, to, below)
    } else if kind.is_file() {
        copy_file(source, &metadata, to)
    } else if kind.is_symlink() {
        symlinkat(readlinkat(source.0, source.1)?.as_os_str(), to.0, to.1)?;
        give(to, &metadata)
    } else {
        let (kind, mode) =
            (SFlag::from_bits_truncate(metadata.mode()), Mode::from_bits_truncate(metadata.mode()));
        mknodat(to.0, to.1, kind & SFlag::S_IFMT, mode, metadata.rdev())?;
        give(to, &metadata)
    }
}

fn copy_directory(
    source: (BorrowedFd<'_>, &OsStr),
    to: (BorrowedFd<'_>, &OsStr),
    levels: usize,
) -> io::Result<()> {
    let from = open_directory(source.0, source.1)?;
    // Closed to everybody until it has its content and its owner.
    mkdirat(to.0, to.1, Mode::S_IRWXU)?;
    let into = open_directory(to.0, to.1)?;
    for name in names(from.as_fd(), usize::MAX)? {
        copy((from.as_fd(), &name), (into.as_fd(), &name), levels)?;
    }
    copy_attributes(&from.into(), &into.into())
}

fn copy_file(
    source: (BorrowedFd<'_>, &OsStr),
    metadata: &Metadata,
    to: (BorrowedFd<'_>, &OsStr),
) -> io::Result<()> {
    // Never follows a link and never waits for the other end of a pipe.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let mut from = File::from(open_at(source.0, Path::new(source.1), flags, Mode::empty())?);
    let opened = from.metadata()?;
    if (opened.dev(), opened.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(io::Error::other("the source was replaced while it was being moved"));
    }
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
    let mut into = File::from(open_at(to.0, Path::new(to.1), flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
    // On Linux this copies inside the kernel.
    io::copy(&mut from, &mut into)?;
    copy_attributes(&from, &into)
}

/// Sets the owner of something that cannot be opened. Only root can give away: what anybody else moves becomes theirs, as with mv(1).
fn give(to: (BorrowedFd<'_>, &OsStr), metadata: &Metadata) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    match fchownat(to.0, to.1, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::EPERM) => Ok(()),
        given => Ok(given?),
    }
}

/// Gives a new file owner, mode and extended attributes of another, as far as the caller may. `wanted` chooses the attributes.
///
/// Owner first: changing it clears the set-user-id bits that the mode then restores, unless the owner stayed another one.
///
/// # Errors
///
/// Those of fchown(2) other than `EPERM`, and of fchmod(2).
pub(super) fn copy_identity(from: &File, to: &File, wanted: impl Fn(&[u8]) -> bool) -> io::Result<()> {
    let (metadata, created) = (from.metadata()?, to.metadata()?);
    let mut mode = metadata.mode() & 0o7777;
    if (created.uid(), created.gid()) != (metadata.uid(), metadata.gid()) {
        match std::os::unix::fs::fchown(to, Some(metadata.uid()), Some(metadata.gid())) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => mode &= 0o1777,
            given => given?,
        }
    }
    to.set_permissions(std::fs::Permissions::from_mode(mode))?;
    let path = super::place::proc_path(from);
    let Ok(carrier) = sys::Carrier::path(&path) else { return Ok(()) };
    for name in sys::list(&carrier).unwrap_or_default() {
        // Best effort, as `mv` has it: the other file system may know no attributes, or not these.
        if wanted(name.to_bytes())
            && let Ok(value) = sys::get(&carrier, &name)
        {
            let _ = sys::set(to.as_fd(), &name, &value);
        }
    }
    Ok(())
}

fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
    copy_identity(from, to, |_| true)?;
    let metadata = from.metadata()?;
    to.set_times(FileTimes::new().set_accessed(metadata.accessed()?).set_modified(metadata.modified()?))
}
