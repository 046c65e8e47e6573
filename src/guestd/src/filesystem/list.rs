//! The walk behind `ListDir` (contract: envd.md section 3.2).

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use guestd_protocol::wire::filesystem::{EntryInfo, FileType};

use super::entry;
use super::error::{Fault, FilesystemError, fault};
use super::walk::{self, Descent, open_directory_path};
use crate::identity::Names;

/// What the kernel takes as a path. Below that a client could name nothing, and the paths of an endless tree would fill memory.
const MOST_PATH_BYTES: usize = 4096;

/// Everything below `base`, down to `depth` levels, each directory before its content and names in byte order.
///
/// A link as the base is followed, and the entries keep the path that was asked for; links below it are not followed. Only the
/// directories that are wanted are read: envd reads one level more (envd.md section 11, number 17). An entry that vanishes during
/// the walk is left out, and one that cannot be read is listed by its name; neither fails the call.
///
/// # Errors
///
/// When the base itself is missing, is a cycle of links, is not a directory or cannot be read.
pub(super) fn list(base: &Path, depth: u32, names: &Names) -> Result<Vec<EntryInfo>, FilesystemError> {
    let top = open_directory_path(base).map_err(|error| match (fault(&error), error.raw_os_error()) {
        (Fault::NotADirectory, _) => FilesystemError::NotADirectory { path: base.to_owned() },
        (_, Some(libc::ELOOP)) => FilesystemError::CyclicLink { path: base.to_owned() },
        (Fault::NotFound, _) => FilesystemError::PathNotFound { path: base.to_owned() },
        _ => FilesystemError::io("list", base)(error),
    })?;
    collect(top, base, depth, names).map_err(FilesystemError::io("list", base))
}

fn collect(top: OwnedFd, base: &Path, depth: u32, names: &Names) -> io::Result<Vec<EntryInfo>> {
    // 0 is what a client sends that leaves the field out.
    let depth = usize::try_from(depth.max(1)).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut descent = Descent::new(top)?;
    let mut levels = vec![Level { path: base.to_owned(), names: sorted(descent.here()?)?.into_iter() }];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            levels.pop();
            descent.leave()?;
            continue;
        };
        let path = level.path.join(&name);
        let info = match entry::describe(descent.here()?, &name, &path, names) {
            Ok(info) => info,
            Err(error) if fault(&error) == Fault::NotFound => continue,
            Err(_) => entry::unknown(&path),
        };
        let descend = info.r#type == FileType::Directory
            && !info.is_symlink
            && levels.len() < depth
            && path.as_os_str().len() < MOST_PATH_BYTES;
        found.push(info);
        // One that may not be read, or is no directory any more, is listed without its content.
        if descend && descent.enter(&name).is_ok() {
            levels.push(Level { path, names: sorted(descent.here()?)?.into_iter() });
        }
    }
    Ok(found)
}

struct Level {
    path: PathBuf,
    names: std::vec::IntoIter<OsString>,
}

fn sorted(directory: BorrowedFd<'_>) -> io::Result<Vec<OsString>> {
    let mut names = walk::names(directory, usize::MAX)?;
    names.sort_unstable();
    Ok(names)
}
