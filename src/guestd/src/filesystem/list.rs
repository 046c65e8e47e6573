//! The walk behind `ListDir` (contract: envd.md section 3.2).

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use guestd_protocol::wire::filesystem::{EntryInfo, FileType};

use super::entry;
use super::error::{Fault, FilesystemError, fault};
use crate::identity::Names;

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
    let path = || base.to_owned();
    match base.metadata() {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(FilesystemError::NotADirectory { path: path() }),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(FilesystemError::CyclicLink { path: path() });
        }
        Err(error) if fault(&error) == Fault::NotFound => {
            return Err(FilesystemError::PathNotFound { path: path() });
        }
        Err(error) => return Err(FilesystemError::io("list", base)(error)),
    }
    let top = read(base).map_err(FilesystemError::io("list", base))?;
    // 0 is what a client sends that leaves the field out.
    let depth = usize::try_from(depth.max(1)).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut levels = vec![Level { directory: path(), names: top.into_iter() }];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.next() else {
            levels.pop();
            continue;
        };
        let path = level.directory.join(name);
        let info = match entry::describe(&path, names) {
            Ok(info) => info,
            Err(error) if fault(&error) == Fault::NotFound => continue,
            Err(_) => entry::unknown(&path),
        };
        let descend = info.r#type == FileType::Directory && !info.is_symlink && levels.len() < depth;
        found.push(info);
        if descend && let Ok(names) = read(&path) {
            levels.push(Level { directory: path, names: names.into_iter() });
        }
    }
    Ok(found)
}

struct Level {
    directory: PathBuf,
    names: std::vec::IntoIter<OsString>,
}

/// The sorted names in a directory; a failure halfway keeps the names before it.
fn read(directory: &Path) -> io::Result<Vec<OsString>> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory)?.map_while(Result::ok).map(|entry| entry.file_name()).collect();
    names.sort_unstable();
    Ok(names)
}
