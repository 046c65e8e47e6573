//! One file as replies describe it: `EntryInfo` (contract: envd.md section 3.3).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use buffa_types::google::protobuf::Timestamp;
use guestd_protocol::wire::filesystem::{EntryInfo, FileType};

use super::place::{look, look_through, proc_path, real_path};
use super::sys;
use crate::identity::Names;

/// The extended attributes that hold the metadata of an upload; the rest of the name is the client's key.
pub(super) const METADATA_PREFIX: &str = "user.e2b.";

/// The moments that a protobuf timestamp can hold: years 1 to 9999.
const TIMESTAMP_SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// Describes what is at a name in an open directory, without following it when it is a link: the type and the mode are the
/// target's, everything else is the link's own. `path` is what the reply calls it.
///
/// # Errors
///
/// Only those of reaching the name. A link that leads nowhere, or attributes that cannot be read, leave their fields empty.
pub(super) fn describe(
    directory: impl AsFd,
    name: &OsStr,
    path: &Path,
    names: &Names,
) -> io::Result<EntryInfo> {
    let found = look(&directory, name)?;
    let own = found.metadata()?;
    let is_symlink = own.is_symlink();
    let behind = is_symlink.then(|| look_through(&directory, name).ok()).flatten();
    let target =
        if is_symlink { behind.as_ref().and_then(|file| file.metadata().ok()) } else { Some(own.clone()) };
    let carrier = behind.as_ref().unwrap_or(&found);
    Ok(EntryInfo {
        name: path.file_name().map_or_else(|| "/".to_owned(), |name| name.to_string_lossy().into_owned()),
        r#type: target.as_ref().map_or(FileType::Unspecified, file_type).into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode: target.as_ref().map_or(0, |target| target.mode() & 0o777),
        permissions: permissions(own.mode()),
        owner: names.user(own.uid()),
        group: names.group(own.gid()),
        modified_time: modified(&own).into(),
        symlink_target: is_symlink.then(|| {
            let resolved = behind.as_ref().and_then(|file| real_path(file).ok());
            resolved.as_deref().unwrap_or(path).to_string_lossy().into_owned()
        }),
        metadata: target
            .filter(|target| target.is_file() || target.is_dir())
            .map_or_else(Default::default, |_| metadata(&proc_path(carrier)).into_iter().collect()),
        is_symlink,
        ..Default::default()
    })
}

/// An entry that is known by name only: it is in a directory whose other entries are fine, and even lstat fails for it.
pub(super) fn unknown(path: &Path) -> EntryInfo {
    EntryInfo {
        name: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        path: path.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

/// `FILE_TYPE_SYMLINK` is never sent: older SDKs do not know it (envd.md section 1.3).
fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_file() {
        FileType::File
    } else if metadata.is_dir() {
        FileType::Directory
    } else {
        FileType::Unspecified
    }
}

/// The modification time, or nothing where it is zero or where a timestamp cannot hold it: one such file would make the JSON of
/// a whole directory fail.
fn modified(metadata: &Metadata) -> Option<Timestamp> {
    let (seconds, nanos) = (metadata.mtime(), metadata.mtime_nsec());
    if (seconds, nanos) == (0, 0) || !TIMESTAMP_SECONDS.contains(&seconds) {
        return None;
    }
    Some(Timestamp { seconds, nanos: i32::try_from(nanos).unwrap_or(0), ..Default::default() })
}

/// The mode as Go prints it: a letter for the type and for each special bit, then `rwx` three times.
pub(super) fn permissions(mode: u32) -> String {
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => "d",
        libc::S_IFLNK => "L",
        libc::S_IFBLK => "D",
        libc::S_IFCHR => "D",
        libc::S_IFIFO => "p",
        libc::S_IFSOCK => "S",
        _ => "",
    };
    let special = [
        (mode & libc::S_ISUID != 0, 'u'),
        (mode & libc::S_ISGID != 0, 'g'),
        (mode & libc::S_IFMT == libc::S_IFCHR, 'c'),
        (mode & libc::S_ISVTX != 0, 't'),
    ];
    let mut text = kind.to_owned();
    text.extend(special.iter().filter(|(set, _)| *set).map(|(_, letter)| letter));
    if text.is_empty() {
        text.push('-');
    }
    for (index, letter) in "rwxrwxrwx".chars().enumerate() {
        text.push(if mode & (0o400 >> index) != 0 { letter } else { '-' });
    }
    text
}

/// The client's metadata of a file; empty where the file system has none.
pub(super) fn metadata(path: &Path) -> BTreeMap<String, String> {
    let Ok(carrier) = sys::Carrier::path(path) else { return BTreeMap::new() };
    let names = sys::list(&carrier).unwrap_or_default();
    let entries = names.iter().filter_map(|name| {
        let key = sys::text(name).as_bytes().strip_prefix(METADATA_PREFIX.as_bytes())?;
        let key = String::from_utf8(key.to_vec()).ok()?;
        let value = String::from_utf8(sys::get(&carrier, name).ok()?).ok()?;
        Some((key, value))
    });
    entries.collect()
}
