//! Going down a tree and up again by descriptors, however deep it is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{FileStat, Mode, fstat};
use nix::unistd::{UnlinkatFlags, Whence, lseek, unlinkat};

use super::place::open_at;

/// How many directories of one descent are open at once.
const MOST_OPEN: usize = 32;
/// How many names of a directory are held while it is being emptied.
const BATCH: usize = 4096;
const READ: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);

/// Opens a directory for reading; a link in its place is an error and not followed.
///
/// # Errors
///
/// `ENOTDIR` or `ELOOP` when it is no directory, and those of open(2).
pub(super) fn open_directory(parent: impl AsFd, name: &OsStr) -> io::Result<OwnedFd> {
    open_at(parent, Path::new(name), READ | OFlag::O_NOFOLLOW, Mode::empty())
}

/// As [`open_directory`] by path, following links.
///
/// # Errors
///
/// `ENOTDIR` when it is no directory, and those of open(2).
pub(super) fn open_directory_path(path: &Path) -> io::Result<OwnedFd> {
    open_at(nix::fcntl::AT_FDCWD, path, READ, Mode::empty())
}

/// The first `most` names in a directory; a failure halfway keeps the names before it.
///
/// # Errors
///
/// Those of dup(2) and lseek(2).
pub(super) fn names(directory: BorrowedFd<'_>, most: usize) -> io::Result<Vec<OsString>> {
    use std::os::unix::ffi::OsStrExt as _;
    // The copy shares the position of the original, which may have been read before.
    lseek(directory, 0, Whence::SeekSet)?;
    let mut stream = Dir::from_fd(directory.try_clone_to_owned()?)?;
    let names = stream.iter().map_while(Result::ok).map(|entry| entry.file_name().to_owned());
    let real = names.filter(|name| name.as_c_str() != c"." && name.as_c_str() != c"..");
    Ok(real.take(most).map(|name| OsStr::from_bytes(name.to_bytes()).to_owned()).collect())
}

/// The directories from the top of a walk to where it is.
///
/// A tree can be deeper than a process may have open files, so only the last few are held. The others are found again as the `..` of
/// the one below, and must be what they were: whoever moves directories about under a walk ends it, and leads it nowhere.
#[derive(Debug)]
pub(super) struct Descent {
    levels: Vec<Level>,
}

#[derive(Debug)]
struct Level {
    directory: Option<OwnedFd>,
    id: (u64, u64),
}

impl Descent {
    pub(super) fn new(top: OwnedFd) -> io::Result<Self> {
        Ok(Self { levels: vec![Level::new(top)?] })
    }

    /// The directory where the walk is.
    ///
    /// # Errors
    ///
    /// None that can happen: the last level is always held.
    pub(super) fn here(&self) -> io::Result<BorrowedFd<'_>> {
        let last = self.levels.last().and_then(|level| level.directory.as_ref());
        Ok(last.ok_or(Errno::EBADF)?.as_fd())
    }

    /// Goes down.
    ///
    /// # Errors
    ///
    /// Those of [`open_directory`].
    pub(super) fn enter(&mut self, name: &OsStr) -> io::Result<()> {
        let below = Level::new(open_directory(self.here()?, name)?)?;
        self.levels.push(below);
        if let Some(far) = self.levels.len().checked_sub(MOST_OPEN + 1) {
            self.levels[far].directory = None;
        }
        Ok(())
    }

    /// Goes up.
    ///
    /// # Errors
    ///
    /// `ESTALE` when the directory above is another one than before.
    pub(super) fn leave(&mut self) -> io::Result<()> {
        let Some(left) = self.levels.pop() else { return Ok(()) };
        if let (Some(above), Some(left)) = (self.levels.last_mut(), left.directory)
            && above.directory.is_none()
        {
            let found = Level::new(open_directory(left, OsStr::new(".."))?)?;
            if found.id != above.id {
                return Err(Errno::ESTALE.into());
            }
            above.directory = found.directory;
        }
        Ok(())
    }
}

impl Level {
    fn new(directory: OwnedFd) -> io::Result<Self> {
        let id = id(&fstat(&directory)?);
        Ok(Self { directory: Some(directory), id })
    }
}

/// What a file is, whatever it is called.
pub(super) fn id(status: &FileStat) -> (u64, u64) {
    (status.st_dev, status.st_ino)
}

/// Removes what is at a name, and everything below it. Links are removed and not followed.
///
/// # Errors
///
/// Those of unlink(2) and rmdir(2), and `ESTALE` when a directory was moved away meanwhile.
pub(super) fn remove(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    let Err(refusal) = unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir) else { return Ok(()) };
    let Some(top) = directory_behind(refusal, || open_directory(&parent, name), &parent, name)? else {
        return Ok(());
    };
    let mut descent = Descent::new(top)?;
    let mut batches = vec![names(descent.here()?, BATCH)?.into_iter()];
    let mut entered: Vec<OsString> = Vec::new();
    while let Some(batch) = batches.last_mut() {
        if let Some(child) = batch.next() {
            let here = descent.here()?;
            let Err(refusal) = unlinkat(here, child.as_os_str(), UnlinkatFlags::NoRemoveDir) else {
                continue;
            };
            if refusal == Errno::ENOENT {
                continue;
            }
            let here = here.try_clone_to_owned()?;
            if directory_behind(refusal, || descent.enter(&child), &here, &child)?.is_some() {
                batches.push(names(descent.here()?, BATCH)?.into_iter());
                entered.push(child);
            }
            continue;
        }
        // What did not fit, and what somebody made meanwhile.
        let more = names(descent.here()?, BATCH)?;
        if !more.is_empty() {
            *batch = more.into_iter();
            continue;
        }
        batches.pop();
        if let Some(child) = entered.pop() {
            descent.leave()?;
            remove_empty(descent.here()?, &child)?;
        }
    }
    remove_empty(parent, name)
}

/// What to do about a refused unlink: go into the directory that was the reason, or `None` when it turned out to be empty.
///
/// `EISDIR` is Linux's word for a directory and `EPERM` that of POSIX, which has other meanings as well.
fn directory_behind<T>(
    refusal: Errno,
    enter: impl FnOnce() -> io::Result<T>,
    parent: impl AsFd,
    name: &OsStr,
) -> io::Result<Option<T>> {
    if !matches!(refusal, Errno::EISDIR | Errno::EPERM) {
        return Err(refusal.into());
    }
    match enter() {
        Ok(entered) => Ok(Some(entered)),
        Err(error) => match error.raw_os_error() {
            Some(libc::ENOENT) => Ok(None),
            Some(libc::ENOTDIR | libc::ELOOP) => Err(refusal.into()),
            // A directory that may not be read can go when it is empty.
            Some(libc::EACCES) => {
                unlinkat(parent, name, UnlinkatFlags::RemoveDir).map(|()| None).map_err(|_| error)
            }
            _ => Err(error),
        },
    }
}

fn remove_empty(parent: impl AsFd, name: &OsStr) -> io::Result<()> {
    match unlinkat(parent, name, UnlinkatFlags::RemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
