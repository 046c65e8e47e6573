//! Moving a file or a tree to another file system, where rename(2) cannot.
//!
//! The copy is made under a hidden name beside the destination and renamed over it when it is complete, so that the destination
//! is never half there, and not before the source has left its name, so that an error leaves both sides as they were. Owners, modes,
//! times, links, holes, special files and extended attributes are kept, as far as the caller may give them; hard links within the tree
//! become files of their own.

use std::ffi::{OsStr, OsString};
use std::fs::{File, FileTimes, Metadata, Permissions};
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, RenameFlags, readlinkat, renameat, renameat2};
use nix::sys::stat::{Mode, SFlag, fstat, mkdirat, mknodat};
use nix::unistd::{AccessFlags, Gid, Uid, Whence, faccessat, fchownat, geteuid, lseek, symlinkat};

use super::place::{Place, look, open_at, proc_path, real_path};
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
/// removed again. What cannot be removed is not copied: `EACCES`, `EPERM`, `EROFS`, and `EBUSY` for a tree that something is mounted in.
/// `ENAMETOOLONG` for a tree of more than [`MOST_LEVELS`] levels. Whatever the error, source and destination are as they were.
pub(super) fn move_across(source: &Place, destination: &Place) -> io::Result<()> {
    let metadata = source.look()?.metadata()?;
    check_replaceable(&metadata, destination)?;
    check_unmounted(source)?;
    let (staging, aside) = (hidden_name(), hidden_name());
    let (from, to) = (source.parent.as_fd(), destination.parent.as_fd());
    copy((from, &source.name), (to, &staging), MOST_LEVELS)
        // The kernel's own word on whether the source can go; it is the last thing that can be taken back.
        .and_then(|()| Ok(renameat(from, source.name.as_os_str(), from, aside.as_os_str())?))
        .and_then(|()| {
            let moved = renameat(to, staging.as_os_str(), to, destination.name.as_os_str());
            if moved.is_err() {
                put_back(from, &aside, &source.name);
            }
            Ok(moved?)
        })
        .inspect_err(|_| discard(to, &staging))?;
    if let Err(error) = remove(from, &aside) {
        // It was moved all the same: it is there and no longer here.
        tracing::warn!(%error, ?aside, "what is left of a moved tree cannot be removed");
    }
    Ok(())
}

/// Gives the source its name again, unless somebody else has it by now.
fn put_back(directory: BorrowedFd<'_>, aside: &OsStr, name: &OsStr) {
    let put = match renameat2(directory, aside, directory, name, RenameFlags::RENAME_NOREPLACE) {
        // A kernel or a file system that knows no flags.
        Err(Errno::EINVAL | Errno::ENOSYS | Errno::EPERM) => renameat(directory, aside, directory, name),
        put => put,
    };
    if let Err(error) = put {
        tracing::error!(%error, ?name, ?aside, "what could not be moved keeps a hidden name");
    }
}

fn hidden_name() -> OsString {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!(".guestd-move-{}-{number}", std::process::id()).into()
}

/// Removes what there is of a copy, if need be against the modes that were given to its directories. What remains is of no use to
/// anybody; the error that is reported is the one that caused this.
fn discard(parent: BorrowedFd<'_>, name: &OsStr) {
    if remove(parent, name).is_err() {
        open_up(parent, name, MOST_LEVELS);
        if let Err(error) = remove(parent, name) {
            tracing::warn!(%error, ?name, "what was copied of a tree that cannot be moved cannot be removed");
        }
    }
}

fn open_up(parent: BorrowedFd<'_>, name: &OsStr, levels: usize) {
    let (Some(levels), Ok(found)) = (levels.checked_sub(1), look(parent, name)) else { return };
    if !found.metadata().is_ok_and(|metadata| metadata.is_dir()) {
        return;
    }
    let _ = std::fs::set_permissions(proc_path(&found), Permissions::from_mode(0o700));
    let Ok(directory) = open_directory(parent, name) else { return };
    for child in names(directory.as_fd(), usize::MAX).unwrap_or_default() {
        open_up(directory.as_fd(), &child, levels);
    }
}

/// A mount point cannot be removed, and what is mounted there is no part of the tree (proc_pid_mountinfo(5)).
fn check_unmounted(source: &Place) -> io::Result<()> {
    let path = real_path(&source.parent)?.join(&source.name);
    let mut escaped = Vec::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b' ' | b'\t' | b'\n' | b'\\' => escaped.extend(format!("\\{byte:03o}").into_bytes()),
            other => escaped.push(*other),
        }
    }
    // Where there is no such list, the kernel still refuses to rename what is a mount point itself.
    let mounts = std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
    let mut points =
        mounts.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let inside = points.any(|point| {
        point.strip_prefix(&escaped[..]).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
    });
    if inside { Err(Errno::EBUSY.into()) } else { Ok(()) }
}

/// Whether the caller may remove `entry` from a directory: what unlink(2) would say, before it is asked.
///
/// # Errors
///
/// `EACCES` and `EROFS` for the directory, `EPERM` for what is another's in a sticky one.
fn check_removable(directory: BorrowedFd<'_>, entry: &Metadata) -> io::Result<()> {
    match faccessat(directory, ".", AccessFlags::W_OK | AccessFlags::X_OK, AtFlags::AT_EACCESS) {
        // EPERM is also the word of filters that do not know the call.
        Ok(()) | Err(Errno::EPERM) => {}
        Err(error) => return Err(error.into()),
    }
    let (above, user) = (fstat(directory)?, geteuid());
    let sticky = above.st_mode & libc::S_ISVTX != 0 && !user.is_root();
    if sticky && ![entry.uid(), above.st_uid].contains(&user.as_raw()) {
        return Err(Errno::EPERM.into());
    }
    Ok(())
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

/// Copies what is at one name to another, which must be free, unless it cannot be removed where it is.
fn copy(source: (BorrowedFd<'_>, &OsStr), to: (BorrowedFd<'_>, &OsStr), levels: usize) -> io::Result<()> {
    let found = look(source.0, source.1)?;
    let metadata = found.metadata()?;
    check_removable(source.0, &metadata)?;
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
    copy_content(&mut from, &mut into, &opened)?;
    copy_attributes(&from, &into)
}

/// Copies all of a file, or its data alone when it has holes. On Linux io::copy works inside the kernel.
fn copy_content(from: &mut File, into: &mut File, metadata: &Metadata) -> io::Result<()> {
    /// The unit of [`std::os::unix::fs::MetadataExt::blocks`] (inode(7)).
    const BLOCK: u64 = 512;
    if metadata.blocks().saturating_mul(BLOCK) >= metadata.len() {
        return io::copy(from, into).map(drop);
    }
    let mut end = 0;
    loop {
        let data = match lseek(&*from, end, Whence::SeekData) {
            Ok(data) => data,
            // Nothing but a hole is left.
            Err(Errno::ENXIO) => break,
            Err(Errno::EINVAL) if end == 0 => return io::copy(from, into).map(drop),
            Err(error) => return Err(error.into()),
        };
        end = lseek(&*from, data, Whence::SeekHole)?;
        lseek(&*from, data, Whence::SeekSet)?;
        lseek(&*into, data, Whence::SeekSet)?;
        io::copy(&mut from.take(u64::try_from(end - data).unwrap_or_default()), into)?;
    }
    into.set_len(from.metadata()?.len())
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
    to.set_permissions(Permissions::from_mode(mode))?;
    let path = proc_path(from);
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
