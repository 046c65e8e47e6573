//! Places in the tree: a directory that is held open, and a name in it.
//!
//! A path is looked up once, as the caller, to the directory above its last component. Whatever happens then happens relative to
//! that descriptor, so that nobody can put a link in the way between a look and a deed.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, open, openat, openat2, readlink, readlinkat};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Gid, Uid, fchown, geteuid};

use crate::identity::User;

/// As many links as the kernel itself follows on one path.
const MOST_LINKS: usize = 40;
/// Reaches a directory without reading it; needs no right but to pass through.
const REACH: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY);

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
    /// Makes this the owner of an open file or directory that was just created.
    ///
    /// What a user creates belongs to that user already. The call is made all the same: it sets the primary group in a directory
    /// that hands down its own, and its `IN_ATTRIB` is the CHMOD event that SDKs count on between CREATE and WRITE (contract:
    /// envd.md section 3.4).
    ///
    /// # Errors
    ///
    /// Those of fchown(2).
    pub(super) fn take(self, file: impl AsFd) -> io::Result<()> {
        Ok(fchown(file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?)
    }
}

/// A name in a directory that is held open.
#[derive(Debug)]
pub(super) struct Place {
    pub parent: OwnedFd,
    pub name: OsString,
}

impl Place {
    /// The place of a clean absolute path. Links above the last component are followed; the directory must exist.
    ///
    /// # Errors
    ///
    /// Those of open(2).
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let parent = path.parent().unwrap_or(path);
        Ok(Self { parent: open_at(AT_FDCWD, parent, REACH, Mode::empty())?, name: name_of(path) })
    }

    /// As [`Place::open`], making the directories that are missing, as [`create_dirs`] does.
    ///
    /// # Errors
    ///
    /// Those of [`create_dirs`].
    pub(super) fn create(path: &Path, owner: Owner) -> io::Result<Self> {
        let parent = path.parent().unwrap_or(path);
        Ok(Self { parent: create_dirs(parent, owner)?, name: name_of(path) })
    }

    /// Where the links that begin here end: a place where there is no link, and maybe nothing.
    ///
    /// # Errors
    ///
    /// `ELOOP` for a cycle, `EISDIR` for a link to something without a name, as `..` is, and those of open(2).
    pub(super) fn followed(self) -> io::Result<Self> {
        let mut place = self;
        for _ in 0..MOST_LINKS {
            let target = match readlinkat(&place.parent, place.name.as_os_str()) {
                Ok(target) => PathBuf::from(target),
                Err(Errno::EINVAL | Errno::ENOENT) => return Ok(place),
                Err(error) => return Err(error.into()),
            };
            let name = target.file_name().ok_or(Errno::EISDIR)?.to_owned();
            let above = target.parent().filter(|above| !above.as_os_str().is_empty());
            let parent = open_at(&place.parent, above.unwrap_or(Path::new(".")), REACH, Mode::empty())?;
            place = Self { parent, name };
        }
        Err(Errno::ELOOP.into())
    }

    /// What is here, a link as the link itself.
    ///
    /// # Errors
    ///
    /// Those of open(2).
    pub(super) fn look(&self) -> io::Result<std::fs::File> {
        look(&self.parent, &self.name)
    }
}

/// The root directory has no name but `.`.
fn name_of(path: &Path) -> OsString {
    path.file_name().unwrap_or(OsStr::new(".")).to_owned()
}

/// A descriptor that identifies what is at `name` without opening it, a link as the link itself: no pipe blocks, no device reacts.
///
/// # Errors
///
/// Those of open(2).
pub(super) fn look(directory: impl AsFd, name: &OsStr) -> io::Result<std::fs::File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    Ok(open_at(directory, Path::new(name), flags, Mode::empty())?.into())
}

/// As [`look`], following links.
///
/// # Errors
///
/// Those of open(2).
pub(super) fn look_through(directory: impl AsFd, name: &OsStr) -> io::Result<std::fs::File> {
    Ok(open_at(directory, Path::new(name), OFlag::O_PATH, Mode::empty())?.into())
}

/// openat2(2), always close-on-exec.
///
/// A user's path may not go through the links of `/proc/<pid>/fd` and their like: seen from here they are the agent's own
/// descriptors. Where there is no openat2 (gVisor, Linux before 5.6) or a filter forbids it, it is openat(2), without that rule.
///
/// # Errors
///
/// Those of openat2(2).
pub(super) fn open_at(directory: impl AsFd, path: &Path, flags: OFlag, mode: Mode) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC;
    let resolve = if geteuid().is_root() { ResolveFlag::empty() } else { ResolveFlag::RESOLVE_NO_MAGICLINKS };
    let how = OpenHow::new().flags(flags).mode(mode).resolve(resolve);
    Ok(match openat2(directory.as_fd(), path, how) {
        Err(Errno::ENOSYS | Errno::EPERM) => openat(directory.as_fd(), path, flags, mode)?,
        opened => opened?,
    })
}

/// Opens what a descriptor of [`look`] stands for, and nothing else. Needs `/proc`, as every machine has it.
///
/// # Errors
///
/// Those of open(2).
pub(super) fn reopen(found: impl AsFd, flags: OFlag) -> io::Result<OwnedFd> {
    Ok(open(proc_path(&found).as_path(), flags | OFlag::O_CLOEXEC, Mode::empty())?)
}

/// The path by which the kernel reaches an open descriptor.
pub(super) fn proc_path(found: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", found.as_fd().as_raw_fd()).into()
}

/// Where an open file really is, without any link.
///
/// # Errors
///
/// Those of readlink(2).
pub(super) fn real_path(found: impl AsFd) -> io::Result<PathBuf> {
    Ok(readlink(proc_path(&found).as_path())?.into())
}

/// Makes sure that `path` is a directory, like `mkdir -p`; each directory that this creates is 0755 and belongs to `owner`.
///
/// # Errors
///
/// `ENOTDIR` when a component exists and is something else, and those of mkdir(2) and fchown(2).
pub(super) fn create_dirs(path: &Path, owner: Owner) -> io::Result<OwnedFd> {
    match open_at(AT_FDCWD, path, REACH, Mode::empty()) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        opened => return opened,
    }
    let mut directory = open_at(AT_FDCWD, Path::new("/"), REACH, Mode::empty())?;
    for component in path.components() {
        let Component::Normal(name) = component else { continue };
        directory = match open_at(&directory, Path::new(name), REACH, Mode::empty()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => create_dir(&directory, name, owner)?,
            opened => opened?,
        };
    }
    Ok(directory)
}

/// Makes one directory, 0755, that belongs to `owner`; one that is there already is left as it is.
///
/// # Errors
///
/// `ENOTDIR` when something else is in the way, and those of mkdir(2) and fchown(2).
pub(super) fn create_dir(parent: &OwnedFd, name: &OsStr, owner: Owner) -> io::Result<OwnedFd> {
    let created = match mkdirat(parent, name, Mode::from_bits_truncate(0o755)) {
        Ok(()) => true,
        // Somebody was faster, or it is a link that leads nowhere: the open tells them apart.
        Err(Errno::EEXIST) => false,
        Err(error) => return Err(error.into()),
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let directory = open_at(parent, Path::new(name), flags, Mode::empty())?;
    if created {
        owner.take(&directory)?;
    }
    Ok(directory)
}
