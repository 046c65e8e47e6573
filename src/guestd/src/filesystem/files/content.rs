//! What a download reads: opened once, and looked at through its descriptor. [`Reader`] streams it.

use std::fs::{File, Metadata};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use bytes::Bytes;
use nix::fcntl::{AT_FDCWD, OFlag};

use super::FilesError;
use super::destination::regular;
use super::digest::{Algorithm, Hasher, Value};
use super::reader::{CHUNK, Reader, Source, fill, read_at};
use crate::filesystem::Caller;
use crate::filesystem::error::{Fault, fault};
use crate::filesystem::place::{look_through, reopen};

/// How much of a file one blocking task hashes.
const DIGEST_STEP: u64 = 16 * 1024 * 1024;
/// Up to here a file is read at once. More than any procfs page that lies about its size is likely to be.
const WHOLE: usize = 64 * 1024;

/// An open regular file.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) modified: Option<SystemTime>,
    /// The first bytes, for telling what it is.
    pub(super) start: Bytes,
    rest: Rest,
}

#[derive(Debug)]
enum Rest {
    /// `start` is everything.
    Nothing,
    /// The file has this many bytes, `start` included.
    Sized(Arc<File>, u64),
    /// The file has more than it admits to, as procfs files do whose size is 0.
    /// The kernel makes such content while it is being read, and judges by who reads.
    Unsized(Arc<File>, Arc<Caller>),
}

impl Content {
    /// Opens `path` for a download. Blocking, as the caller's user.
    ///
    /// # Errors
    ///
    /// Those of [`find`], and what the operating system said.
    pub(super) fn open(caller: &Arc<Caller>, path: &Path) -> Result<Self, FilesError> {
        let (found, metadata) = find(path)?;
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let file = File::from(reopen(found, flags).map_err(FilesError::io("open", path))?);
        let start = read_at(&file, 0, WHOLE).map_err(FilesError::io("read", path))?;
        let rest = if start.len() < WHOLE {
            // The end was reached: this is the size, whatever the file system said.
            Rest::Nothing
        } else if metadata.len() >= start.len() as u64 {
            Rest::Sized(Arc::new(file), metadata.len())
        } else {
            Rest::Unsized(Arc::new(file), Arc::clone(caller))
        };
        Ok(Self { modified: metadata.modified().ok(), start, rest })
    }

    /// The digest of the whole file, for which it is read once more; `None` for one without a size, which may be another one at
    /// each reading.
    ///
    /// # Errors
    ///
    /// What the operating system said.
    pub(super) async fn digest(&self, algorithm: Algorithm) -> io::Result<Option<Value>> {
        let mut hasher = Hasher::new(algorithm);
        let (file, size) = match &self.rest {
            Rest::Nothing => {
                hasher.update(&self.start);
                return Ok(Some(hasher.value()));
            }
            Rest::Sized(file, size) => (file, *size),
            Rest::Unsized(..) => return Ok(None),
        };
        let mut position = 0;
        // In steps, so that a client that goes away ends it.
        while position < size {
            let file = Arc::clone(file);
            let step = tokio::task::spawn_blocking(move || -> io::Result<_> {
                let end = size.min(position + DIGEST_STEP);
                let mut buffer = vec![0; CHUNK];
                while position < end {
                    let wanted = usize::try_from(end - position).unwrap_or(CHUNK).min(CHUNK);
                    let count = fill(&file, position, &mut buffer[..wanted])?;
                    if count < wanted {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    hasher.update(&buffer[..count]);
                    position += count as u64;
                }
                Ok((hasher, position))
            });
            (hasher, position) = step.await.map_err(io::Error::other)??;
        }
        Ok(Some(hasher.value()))
    }

    /// The size in bytes; `None` when only reading to the end will tell.
    pub(super) fn size(&self) -> Option<u64> {
        match &self.rest {
            Rest::Nothing => Some(self.start.len() as u64),
            Rest::Sized(_, size) => Some(*size),
            Rest::Unsized(..) => None,
        }
    }

    /// The bytes of a range that lies within [`Content::size`].
    pub(super) fn range(self, from: u64, length: u64) -> Body {
        match self.rest {
            Rest::Nothing => {
                let from = usize::try_from(from).unwrap_or(usize::MAX).min(self.start.len());
                let length = usize::try_from(length).unwrap_or(usize::MAX).min(self.start.len() - from);
                Body::from(self.start.slice(from..from + length))
            }
            Rest::Sized(file, _) => Reader::body(Source { file, caller: None }, from, Some(length)),
            Rest::Unsized(file, caller) => {
                Reader::body(Source { file, caller: Some(caller) }, from, Some(length))
            }
        }
    }

    /// All bytes, to the end of the file or to the size that it was opened with.
    pub(super) fn all(self) -> Body {
        match (self.size(), self.rest) {
            (_, Rest::Nothing) => Body::from(self.start),
            (size, Rest::Sized(file, _)) => Reader::body(Source { file, caller: None }, 0, size),
            (size, Rest::Unsized(file, caller)) => {
                Reader::body(Source { file, caller: Some(caller) }, 0, size)
            }
        }
    }
}

/// What is at `path`, looked at and not opened: opening a device can change the machine, and opening a pipe can block.
///
/// # Errors
///
/// [`FilesError::NotFound`], [`FilesError::IsDirectory`], [`FilesError::NotRegular`], or what the operating system said.
pub(super) fn find(path: &Path) -> Result<(File, Metadata), FilesError> {
    let found = look_through(AT_FDCWD, path.as_os_str()).map_err(|error| match fault(&error) {
        Fault::NotFound | Fault::NotADirectory => FilesError::NotFound { path: path.to_owned() },
        _ => FilesError::io("open", path)(error),
    })?;
    let metadata = found.metadata().map_err(FilesError::io("stat", path))?;
    regular(path, &metadata)?;
    Ok((found, metadata))
}
