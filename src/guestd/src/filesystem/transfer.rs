//! Moving a file or a tree to another file system, where rename(2) cannot.
//!
//! The copy is made under a hidden name beside the destination and renamed over it when it is complete, so that the destination
//! is never half there. Owners, modes, times, links, special files and extended attributes are kept; hard links within the tree
//! become files of their own.

use std::fs::{File, FileTimes, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, fchown, lchown,
};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::stat::{Mode, SFlag, mknod};

use super::change::{remove_any, same_file};
use super::sys;

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Moves `source` to `destination` by copying.
///
/// # Errors
///
/// What rename(2) would have said about the destination, before anything is copied; or the first error of the copy, which is then
/// removed again and leaves the source whole. An error while the source is being removed leaves the destination complete.
pub(super) fn move_across(source: &Path, destination: &Path) -> io::Result<()> {
    let metadata = source.symlink_metadata()?;
    check_replaceable(&metadata, destination)?;
    let parent = destination.parent().ok_or_else(|| io::Error::from_raw_os_error(libc::EBUSY))?;
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let staging = parent.join(format!(".guestd-move-{}-{number}", std::process::id()));
    let copied = copy(source, &metadata, &staging).and_then(|()| std::fs::rename(&staging, destination));
    if let Err(error) = copied {
        // What remains of the copy is of no use to anybody; the error that is reported is the one that caused this.
        let _ = remove_any(&staging);
        return Err(error);
    }
    remove_any(source)
}

/// The refusals of rename(2), early: nobody wants to hear of them after a gigabyte.
fn check_replaceable(source: &Metadata, destination: &Path) -> io::Result<()> {
    let refuse = |errno| Err(io::Error::from_raw_os_error(errno));
    let Ok(existing) = destination.symlink_metadata() else { return Ok(()) };
    match (source.is_dir(), existing.is_dir()) {
        (false, true) => refuse(libc::EISDIR),
        (true, false) => refuse(libc::ENOTDIR),
        (true, true) if std::fs::read_dir(destination)?.next().is_some() => refuse(libc::ENOTEMPTY),
        _ => Ok(()),
    }
}

/// Copies whatever is at `source`, which must not be anything else than `metadata` says.
fn copy(source: &Path, metadata: &Metadata, destination: &Path) -> io::Result<()> {
    let kind = metadata.file_type();
    if kind.is_dir() {
        copy_directory(source, destination)
    } else if kind.is_file() {
        copy_file(source, metadata, destination)
    } else if kind.is_symlink() {
        std::os::unix::fs::symlink(std::fs::read_link(source)?, destination)?;
        lchown(destination, Some(metadata.uid()), Some(metadata.gid()))
    } else {
        let (kind, mode) =
            (SFlag::from_bits_truncate(metadata.mode()), Mode::from_bits_truncate(metadata.mode()));
        mknod(destination, kind & SFlag::S_IFMT, mode, metadata.rdev())?;
        lchown(destination, Some(metadata.uid()), Some(metadata.gid()))
    }
}

fn copy_directory(source: &Path, destination: &Path) -> io::Result<()> {
    let from = open_source(source, libc::O_DIRECTORY)?;
    // Closed to everybody until it has its content and its owner.
    std::fs::DirBuilder::new().mode(0o700).create(destination)?;
    for entry in std::fs::read_dir(source)? {
        let entry = entry?;
        copy(&entry.path(), &entry.metadata()?, &destination.join(entry.file_name()))?;
    }
    let to =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(destination)?;
    copy_attributes(&from, &to)
}

fn copy_file(source: &Path, metadata: &Metadata, destination: &Path) -> io::Result<()> {
    let mut from = open_source(source, 0)?;
    if !same_file(metadata, &from.metadata()?) {
        return Err(io::Error::other("the source was replaced while it was being moved"));
    }
    let mut to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(destination)?;
    // On Linux this copies inside the kernel.
    io::copy(&mut from, &mut to)?;
    copy_attributes(&from, &to)
}

/// Never follows a link and never waits for the other end of a pipe.
fn open_source(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | flags).open(path)
}

/// Owner first: changing it clears the set-user-id bits that the mode then restores.
fn copy_attributes(from: &File, to: &File) -> io::Result<()> {
    let metadata = from.metadata()?;
    let created = to.metadata()?;
    if (created.uid(), created.gid()) != (metadata.uid(), metadata.gid()) {
        fchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    }
    to.set_permissions(std::fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    let carrier = sys::Carrier::File(from.as_fd());
    for name in sys::list(&carrier).unwrap_or_default() {
        // Best effort, as `mv` has it: the other file system may know no attributes, or not these.
        if let Ok(value) = sys::get(&carrier, &name) {
            let _ = sys::set(to.as_fd(), &name, &value);
        }
    }
    to.set_times(FileTimes::new().set_accessed(metadata.accessed()?).set_modified(metadata.modified()?))
}
