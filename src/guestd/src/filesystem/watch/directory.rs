//! An open directory: how watching looks at the disk.
//!
//! Everything below a root is opened one component at a time and never through a symbolic link, so that no link that a program plants
//! leads a watch out of its tree.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::filesystem::walk::open_directory_path;

/// `f_type` of the file systems that report only what happens on this machine: NFS, CIFS, SMB, SMB2, FUSE (contract: envd.md section 3.4,
/// statfs(2)).
const NETWORK: [u32; 5] = [0x6969, 0xFF53_4D42, 0x517B, 0xFE53_4D42, 0x6573_5546];

/// Which directory it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    /// Where the file system knows it: the number of a removed directory is soon another's.
    created: Option<SystemTime>,
}

impl Identity {
    pub(super) fn same_file_system(self, other: Self) -> bool {
        self.device == other.device
    }
}

#[derive(Debug)]
pub(super) struct Directory {
    file: File,
    pub(super) identity: Identity,
}

/// Something in a directory.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: OsString,
    pub(super) is_directory: bool,
    /// A regular file with something in it.
    pub(super) has_content: bool,
}

impl Directory {
    /// Opens what a client asked to watch; a link there is followed.
    ///
    /// # Errors
    /// Those of open(2); ENOTDIR when it is no directory.
    pub(super) fn root(path: &Path) -> io::Result<Self> {
        Self::held(open_directory_path(path)?.into())
    }

    /// # Errors
    /// Those of open(2); ELOOP or ENOTDIR when it is no directory, which includes links.
    pub(super) fn child(&self, name: &OsStr) -> io::Result<Self> {
        Self::open(&self.address().join(name), libc::O_NOFOLLOW)
    }

    /// The directory at a relative path, through directories only.
    ///
    /// # Errors
    /// Those of [`Directory::child`].
    pub(super) fn descend(self, relative: &Path) -> io::Result<Self> {
        relative.iter().try_fold(self, |directory, name| directory.child(name))
    }

    fn open(path: &Path, flags: i32) -> io::Result<Self> {
        // std adds O_CLOEXEC. O_NONBLOCK costs nothing here and keeps odd file systems from waiting.
        let flags = flags | libc::O_DIRECTORY | libc::O_NONBLOCK;
        Self::held(OpenOptions::new().read(true).custom_flags(flags).open(path)?)
    }

    fn held(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let identity =
            Identity { device: metadata.dev(), inode: metadata.ino(), created: metadata.created().ok() };
        Ok(Self { file, identity })
    }

    /// A path that leads to this very directory while it is open.
    pub(super) fn address(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// # Errors
    /// Those of fstatfs(2).
    pub(super) fn is_network(&self) -> io::Result<bool> {
        let kind = nix::sys::statfs::fstatfs(self.file.as_fd())?.filesystem_type().0;
        // The type is a signed word on some targets: only its low 32 bits are the magic number.
        Ok(NETWORK.contains(&(kind as u32)))
    }

    /// What is in it, by name; files only if asked for, and at most `files` of them, so that a directory of millions costs no memory.
    ///
    /// # Errors
    /// Those of open(2) and getdents(2). What vanishes meanwhile is left out.
    pub(super) fn entries(&self, files: usize) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        let mut left = files;
        for entry in std::fs::read_dir(self.address())? {
            let entry = entry?;
            let Ok(kind) = entry.file_type() else { continue };
            if !kind.is_dir() {
                if left == 0 {
                    continue;
                }
                left -= 1;
            }
            entries.push(Entry {
                name: entry.file_name(),
                is_directory: kind.is_dir(),
                has_content: files > 0
                    && kind.is_file()
                    && entry.metadata().is_ok_and(|metadata| metadata.len() > 0),
            });
        }
        entries.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
        Ok(entries)
    }
}

/// Whether a directory could not be opened because it is not there any more, is none, or is not the user's to read: no reason for alarm.
pub(super) fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::EACCES | libc::EPERM | libc::ESTALE)
    )
}
