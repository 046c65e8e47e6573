//! What changes the tree: making directories, renaming, removing (contract: envd.md sections 3.2 and 3.5).
//!
//! Ownership is always set through the descriptor of the thing that was just created, never by its path: the directories belong
//! to users who can put a link in the place of what was there a moment ago.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::geteuid;

use super::error::{Fault, FilesystemError, fault};
use super::transfer;
use crate::identity::User;

/// Who owns what a call creates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub uid: u32,
    pub gid: u32,
}

impl From<&User> for Owner {
    fn from(user: &User) -> Self {
        Self { uid: user.uid, gid: user.gid }
    }
}

impl Owner {
    /// Makes this the owner of an open file or directory.
    ///
    /// An agent that does not run as root can only ever create files of its own, so for its own user there is nothing to do.
    ///
    /// # Errors
    ///
    /// Those of fchown(2).
    pub(super) fn take(self, file: impl AsFd) -> io::Result<()> {
        let euid = geteuid();
        if !euid.is_root() && euid.as_raw() == self.uid {
            return Ok(());
        }
        std::os::unix::fs::fchown(file, Some(self.uid), Some(self.gid))
    }
}

/// Makes `path` and the directories above it, for `MakeDir`.
///
/// # Errors
///
/// [`FilesystemError::DirectoryExists`] and [`FilesystemError::NotADirectoryInTheWay`] when there is something at the path.
pub(super) fn make_dir(path: &Path, owner: Owner) -> Result<(), FilesystemError> {
    match path.metadata() {
        Ok(metadata) if metadata.is_dir() => Err(FilesystemError::DirectoryExists { path: path.to_owned() }),
        Ok(_) => Err(FilesystemError::NotADirectoryInTheWay { path: path.to_owned() }),
        // A link that leads nowhere is in the way as well.
        Err(_) if path.symlink_metadata().is_ok() => {
            Err(FilesystemError::NotADirectoryInTheWay { path: path.to_owned() })
        }
        Err(error) if fault(&error) == Fault::NotFound => {
            create_dirs(path, owner).map_err(FilesystemError::io("make directory", path))
        }
        Err(error) => Err(FilesystemError::io("make directory", path)(error)),
    }
}

/// Makes sure that `path` is a directory, like `mkdir -p`; each directory that this creates is 0755 and belongs to `owner`.
///
/// # Errors
///
/// `ENOTDIR` when a component exists and is something else, and those of mkdir(2) and fchown(2).
pub(super) fn create_dirs(path: &Path, owner: Owner) -> io::Result<()> {
    let reach = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut directory = match open(path, reach, Mode::empty()) {
        Ok(_exists) => return Ok(()),
        Err(Errno::ENOENT) => open("/", reach, Mode::empty())?,
        Err(error) => return Err(error.into()),
    };
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        directory = match openat(&directory, name, reach, Mode::empty()) {
            Err(Errno::ENOENT) => create_dir(&directory, name.as_ref(), owner)?,
            opened => opened?,
        };
    }
    Ok(())
}

fn create_dir(parent: &OwnedFd, name: &Path, owner: Owner) -> io::Result<OwnedFd> {
    let created = match mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) => true,
        // Somebody was faster, or it is a link that leads nowhere: the open tells them apart.
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = openat(parent, name, flags, Mode::empty())?;
    if created {
        owner.take(&directory)?;
    }
    Ok(directory)
}

/// Moves `source` to `destination`, making the directories above it; an existing file is replaced.
///
/// The source is looked at before anything is made, so that a misspelt source leaves no directories behind, and another file
/// system is no obstacle (envd.md section 11, number 16).
///
/// # Errors
///
/// [`FilesystemError::SourceNotFound`], or what rename(2) said: among others a directory that is not empty in the way.
pub(super) fn rename(source: &Path, destination: &Path, owner: Owner) -> Result<(), FilesystemError> {
    if let Err(error) = source.symlink_metadata() {
        return Err(match fault(&error) {
            Fault::NotFound => FilesystemError::SourceNotFound { path: source.to_owned() },
            _ => FilesystemError::io("move", source)(error),
        });
    }
    if let Some(parent) = destination.parent() {
        create_dirs(parent, owner).map_err(FilesystemError::io("make directory", parent))?;
    }
    match std::fs::rename(source, destination) {
        Err(error) if error.raw_os_error() == Some(libc::EXDEV) => transfer::move_across(source, destination),
        renamed => renamed,
    }
    .map_err(|error| match fault(&error) {
        // The parents exist by now, so this is a source that went away in between.
        Fault::NotFound => FilesystemError::SourceNotFound { path: source.to_owned() },
        _ => FilesystemError::io("move to", destination)(error),
    })
}

/// Removes `path` and everything below it; a missing path is success. Links are removed and not followed.
///
/// # Errors
///
/// [`FilesystemError::Root`] for `/`, which envd would try to empty, and those of unlink(2) and rmdir(2).
pub(super) fn remove(path: &Path) -> Result<(), FilesystemError> {
    if path.parent().is_none() {
        return Err(FilesystemError::Root);
    }
    match remove_any(path) {
        Err(error) if fault(&error) != Fault::NotFound => Err(FilesystemError::io("remove", path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn remove_any(path: &Path) -> io::Result<()> {
    if path.symlink_metadata()?.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }
}

/// Whether two looks at a path saw one file.
pub(super) fn same_file(one: &std::fs::Metadata, other: &std::fs::Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}
