//! What changes the tree: making directories, renaming, removing (contract: envd.md sections 3.2 and 3.5).
//!
//! Everything happens relative to directories that are held open, and everything is set through the descriptor of the thing
//! that was just created: the directories belong to users who can put a link in the place of what was there a moment ago.

use std::ffi::OsStr;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::renameat;
use nix::sys::stat::{Mode, mkdirat};

use super::error::{Fault, FilesystemError, fault};
use super::place::{Owner, Place, look_through};
use super::walk::{self, open_directory};
use super::{entry, transfer};
use crate::identity::Names;
use guestd_protocol::wire::filesystem::EntryInfo;

/// Makes `path` and the directories above it, for `MakeDir`.
///
/// # Errors
///
/// [`FilesystemError::DirectoryExists`] and [`FilesystemError::NotADirectoryInTheWay`] when there is something at the path.
pub(super) fn make_dir(path: &Path, owner: Owner, names: &Names) -> Result<EntryInfo, FilesystemError> {
    let failed = || FilesystemError::io("make directory", path);
    let place = Place::create(path, owner).map_err(failed())?;
    if place.name == OsStr::new(".") {
        return Err(FilesystemError::DirectoryExists { path: path.to_owned() });
    }
    match mkdirat(&place.parent, place.name.as_os_str(), Mode::from_bits_truncate(0o755)) {
        Ok(()) => {}
        Err(Errno::EEXIST) => {
            // A link that leads nowhere is in the way as well.
            let existing = look_through(&place.parent, &place.name).and_then(|file| file.metadata());
            return Err(match existing {
                Ok(metadata) if metadata.is_dir() => {
                    FilesystemError::DirectoryExists { path: path.to_owned() }
                }
                _ => FilesystemError::NotADirectoryInTheWay { path: path.to_owned() },
            });
        }
        Err(error) => return Err(failed()(error.into())),
    }
    let directory = open_directory(&place.parent, &place.name).map_err(failed())?;
    owner.take(&directory).map_err(failed())?;
    entry::describe(&place.parent, &place.name, path, names).map_err(FilesystemError::io("stat", path))
}

/// Moves `source` to `destination`, making the directories above it; an existing file is replaced.
///
/// The source is looked at before anything is made, so that a misspelt source leaves no directories behind, and a move that fails takes
/// the directories away again that it made. Another file system is no obstacle (envd.md section 11, number 16).
///
/// # Errors
///
/// [`FilesystemError::SourceNotFound`], or what rename(2) said: among others a directory that is not empty in the way.
pub(super) fn rename(
    source: &Path,
    destination: &Path,
    owner: Owner,
    names: &Names,
) -> Result<EntryInfo, FilesystemError> {
    let missing = |error: std::io::Error| match fault(&error) {
        Fault::NotFound => FilesystemError::SourceNotFound { path: source.to_owned() },
        _ => FilesystemError::io("move", source)(error),
    };
    let from = Place::open(source).map_err(missing)?;
    from.look().map_err(missing)?;
    let missing_above: Vec<&Path> =
        destination.ancestors().skip(1).take_while(|above| above.symlink_metadata().is_err()).collect();
    let to = Place::create(destination, owner)
        .map_err(FilesystemError::io("make the directory of", destination))?;
    let moved = match renameat(&from.parent, from.name.as_os_str(), &to.parent, to.name.as_os_str()) {
        Err(Errno::EXDEV) => transfer::move_across(&from, &to),
        renamed => renamed.map_err(Into::into),
    };
    if moved.is_err() {
        // What was made for nothing goes again, unless somebody uses it already.
        let _ = missing_above.iter().try_for_each(std::fs::remove_dir);
    }
    moved.map_err(|error| match fault(&error) {
        // The parents exist by now, so this is a source that went away in between.
        Fault::NotFound => FilesystemError::SourceNotFound { path: source.to_owned() },
        _ => FilesystemError::io("move to", destination)(error),
    })?;
    entry::describe(&to.parent, &to.name, destination, names)
        .map_err(FilesystemError::io("stat", destination))
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
    match Place::open(path).and_then(|place| walk::remove(&place.parent, &place.name)) {
        Err(error) if fault(&error) != Fault::NotFound => Err(FilesystemError::io("remove", path)(error)),
        _ => Ok(()),
    }
}
