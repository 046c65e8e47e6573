//! What a download reads: opened once, looked at through its descriptor, and streamed with one chunk read ahead.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use tokio::task::JoinHandle;

use super::FilesError;
use crate::filesystem::error::{Fault, fault};

/// Large enough that the hop to a blocking thread does not matter, small enough for hundreds of transfers at once.
const CHUNK: usize = 128 * 1024;
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
    Unsized(Arc<File>),
}

impl Content {
    /// Opens `path` for a download. Blocking.
    ///
    /// # Errors
    ///
    /// [`FilesError::NotFound`], [`FilesError::IsDirectory`] and [`FilesError::NotRegular`]; the last before the open, because
    /// opening a device can change the machine, and after it again, because the path may have changed in between.
    pub(super) fn open(path: &Path) -> Result<Self, FilesError> {
        let missing = |error: io::Error| match fault(&error) {
            Fault::NotFound | Fault::NotADirectory => FilesError::NotFound { path: path.to_owned() },
            _ => FilesError::io("open", path)(error),
        };
        regular(path, &path.metadata().map_err(missing)?)?;
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(missing)?;
        let metadata = file.metadata().map_err(FilesError::io("stat", path))?;
        regular(path, &metadata)?;
        let start = read_at(&file, 0, WHOLE).map_err(FilesError::io("read", path))?;
        let rest = if start.len() < WHOLE {
            // The end was reached: this is the size, whatever the file system said.
            Rest::Nothing
        } else if metadata.len() >= start.len() as u64 {
            Rest::Sized(Arc::new(file), metadata.len())
        } else {
            Rest::Unsized(Arc::new(file))
        };
        Ok(Self { modified: metadata.modified().ok(), start, rest })
    }

    /// The size in bytes; `None` when only reading to the end will tell.
    pub(super) fn size(&self) -> Option<u64> {
        match &self.rest {
            Rest::Nothing => Some(self.start.len() as u64),
            Rest::Sized(_, size) => Some(*size),
            Rest::Unsized(_) => None,
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
            Rest::Sized(file, _) => ReadAhead::body(file, from, Some(length)),
            Rest::Unsized(file) => ReadAhead::body(file, from, Some(length)),
        }
    }

    /// All bytes, to the end of the file or to the size that it was opened with.
    pub(super) fn all(self) -> Body {
        match (self.size(), self.rest) {
            (_, Rest::Nothing) => Body::from(self.start),
            (size, Rest::Sized(file, _) | Rest::Unsized(file)) => ReadAhead::body(file, 0, size),
        }
    }
}

fn regular(path: &Path, metadata: &std::fs::Metadata) -> Result<(), FilesError> {
    let path = || path.to_owned();
    match metadata.file_type() {
        kind if kind.is_file() => Ok(()),
        kind if kind.is_dir() => Err(FilesError::IsDirectory { path: path() }),
        kind => {
            debug_assert!(
                kind.is_fifo() || kind.is_socket() || kind.is_char_device() || kind.is_block_device()
            );
            Err(FilesError::NotRegular { path: path() })
        }
    }
}

/// Reads until `length` bytes are there or the file ends.
fn read_at(file: &File, from: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; length];
    let mut filled = 0;
    while filled < length {
        match file.read_at(&mut buffer[filled..], from + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer.truncate(filled);
    Ok(buffer.into())
}

/// A read that is under way while the chunk before it goes out. No thread waits for a slow client: each read is a task of its
/// own, and the next one starts only when the client took what is there.
#[derive(Debug)]
struct ReadAhead {
    file: Arc<File>,
    next: JoinHandle<io::Result<Bytes>>,
    /// Where the read under way ends.
    position: u64,
    /// Bytes from `position` on; `None` for all that there are.
    remaining: Option<u64>,
    /// How much the read under way must yield, when that is known.
    expected: Option<usize>,
}

impl ReadAhead {
    /// Nothing is read before the body is polled for the first time.
    fn body(file: Arc<File>, from: u64, length: Option<u64>) -> Body {
        let start = Start { file, from, length };
        let chunks = stream::unfold(State::New(start), |state| async move {
            let ahead = match state {
                State::New(start) => Self::begin(start.file, start.from, start.length)?,
                State::Running(ahead) => ahead,
                State::Done => return None,
            };
            Some(match ahead.advance().await {
                Ok((chunk, Some(next))) => (Ok(chunk), State::Running(next)),
                Ok((chunk, None)) => (Ok(chunk), State::Done),
                Err(error) => (Err(error), State::Done),
            })
        });
        // The gzip encoder asks once more after the end, for trailers.
        Body::from_stream(chunks.fuse())
    }

    /// `None` when nothing remains.
    fn begin(file: Arc<File>, position: u64, remaining: Option<u64>) -> Option<Self> {
        let expected = remaining.map(|remaining| usize::try_from(remaining).unwrap_or(CHUNK).min(CHUNK));
        let length = expected.unwrap_or(CHUNK);
        if length == 0 {
            return None;
        }
        let reader = Arc::clone(&file);
        let next = tokio::task::spawn_blocking(move || read_at(&reader, position, length));
        let remaining = remaining.map(|remaining| remaining - length as u64);
        Some(Self { file, next, position: position + length as u64, remaining, expected })
    }

    async fn advance(self) -> io::Result<(Bytes, Option<Self>)> {
        let chunk = self.next.await.map_err(io::Error::other)??;
        let next = match self.expected {
            // A promise of so many bytes was made in the header; the connection must break rather than look complete.
            Some(expected) if chunk.len() < expected => return Err(io::ErrorKind::UnexpectedEof.into()),
            None if chunk.len() < CHUNK => None,
            _ => Self::begin(self.file, self.position, self.remaining),
        };
        Ok((chunk, next))
    }
}

enum State {
    New(Start),
    Running(ReadAhead),
    Done,
}

struct Start {
    file: Arc<File>,
    from: u64,
    length: Option<u64>,
}
