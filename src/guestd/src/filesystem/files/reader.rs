//! Streams a file to a client: what is in the page cache without leaving the agent's thread, the rest by blocking threads.
//!
//! A hop to another thread and back for each chunk costs as much as the copy that it is for.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use tokio::task::JoinHandle;

use crate::filesystem::{Caller, sys};

/// Small enough for hundreds of transfers at once, and for the other work of the thread that copies it.
pub(super) const CHUNK: usize = 128 * 1024;

/// After a chunk that is not in the page cache, this many are read ahead by a blocking thread: the kernel's own read-ahead is behind.
const AHEAD: u32 = 16;

/// After so many chunks from the page cache the agent's other work has its turn. Packing them takes longest: some 5 ms for all of these.
const TURN: u32 = 4;

/// What is read, and as whom when that matters.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) file: Arc<File>,
    /// Set for content that is made while it is read. It is never read on the agent's own thread.
    pub(super) caller: Option<Arc<Caller>>,
}

impl Source {
    fn read(&self, from: u64, length: usize) -> io::Result<Bytes> {
        let _acting = self.caller.as_ref().map(|caller| caller.act()).transpose()?;
        read_at(&self.file, from, length)
    }

    /// What can be had without waiting for a disk, at most `length` bytes. Nothing is no sign of an end.
    ///
    /// # Errors
    ///
    /// `Unsupported` where that can never be told: content that is made while it is read, and file systems without `RWF_NOWAIT`
    /// (overlayfs and tmpfs among them; ext4, XFS and Btrfs have it).
    fn cached(&self, from: u64, length: usize, buffer: &mut BytesMut) -> io::Result<Bytes> {
        if self.caller.is_some() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        buffer.reserve(length);
        match sys::read_cached(&self.file, from, length, buffer) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Err(error),
            // Any other error comes again from the read that follows.
            _ => Ok(buffer.split().freeze()),
        }
    }
}

/// Where a download is. No thread waits for a slow client: each read is a task of its own, and none starts before the client took what is
/// there.
#[derive(Debug)]
pub(super) struct Reader {
    source: Source,
    position: u64,
    /// Bytes from `position` on; `None` for all that there are.
    remaining: Option<u64>,
    /// The chunk at `position`, when it was begun early.
    reading: Option<JoinHandle<io::Result<Bytes>>>,
    /// How many chunks are still to be begun early.
    ahead: u32,
    /// How many chunks came from the page cache since the last turn of others.
    run: u32,
    /// Used again as soon as the client has what was in it.
    buffer: BytesMut,
}

impl Reader {
    /// Nothing is read before the body is polled for the first time.
    pub(super) fn body(source: Source, position: u64, remaining: Option<u64>) -> Body {
        let reader =
            Self { source, position, remaining, reading: None, ahead: 0, run: 0, buffer: BytesMut::new() };
        let chunks = stream::unfold(Some(reader), |reader| async move {
            match reader?.next().await {
                Ok((chunk, reader)) if !chunk.is_empty() => Some((Ok(chunk), Some(reader))),
                Ok(_) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        // The gzip encoder asks once more after the end, for trailers.
        Body::from_stream(chunks.fuse())
    }

    fn wanted(&self) -> usize {
        self.remaining.map_or(CHUNK, |remaining| usize::try_from(remaining).unwrap_or(CHUNK).min(CHUNK))
    }

    /// The next bytes; none at the end.
    async fn next(mut self) -> io::Result<(Bytes, Self)> {
        let wanted = self.wanted();
        if wanted == 0 {
            return Ok((Bytes::new(), self));
        }
        if self.reading.is_none() {
            match self.source.cached(self.position, wanted, &mut self.buffer) {
                Ok(cached) if !cached.is_empty() => {
                    self.advance(cached.len());
                    self.run += 1;
                    if self.run == TURN {
                        self.run = 0;
                        tokio::task::yield_now().await;
                    }
                    return Ok((cached, self));
                }
                Ok(_) => self.ahead = AHEAD,
                Err(_unsupported) => self.ahead = u32::MAX,
            }
            self.begin();
        }
        let Some(reading) = self.reading.take() else { return Ok((Bytes::new(), self)) };
        let chunk = reading.await.map_err(io::Error::other)??;
        self.advance(chunk.len());
        if chunk.len() < wanted {
            // A promise of so many bytes was made in the header; the connection must break rather than look complete.
            if self.remaining.is_some() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.remaining = Some(0);
        } else if let Some(ahead) = self.ahead.checked_sub(1) {
            self.ahead = ahead;
            self.begin();
        }
        Ok((chunk, self))
    }

    fn advance(&mut self, count: usize) {
        self.position += count as u64;
        self.remaining = self.remaining.map(|remaining| remaining - count as u64);
    }

    fn begin(&mut self) {
        let (source, position, wanted) = (self.source.clone(), self.position, self.wanted());
        if wanted > 0 {
            self.reading = Some(tokio::task::spawn_blocking(move || source.read(position, wanted)));
        }
    }
}

/// Reads until `length` bytes are there or the file ends.
pub(super) fn read_at(file: &File, from: u64, length: usize) -> io::Result<Bytes> {
    let mut buffer = vec![0; length];
    let filled = fill(file, from, &mut buffer)?;
    buffer.truncate(filled);
    Ok(buffer.into())
}

/// Fills the buffer as far as the file goes.
pub(super) fn fill(file: &File, from: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], from + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

    use super::*;

    fn content(length: usize) -> Vec<u8> {
        (0..length).map(|number| (number % 251) as u8).collect()
    }

    fn source(path: &std::path::Path) -> Source {
        Source { file: Arc::new(File::open(path).unwrap()), caller: None }
    }

    #[tokio::test]
    async fn what_is_not_in_the_page_cache_comes_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content = content(40 * CHUNK + 7);
        std::fs::write(&path, &content).unwrap();
        let file = File::open(&path).unwrap();
        // Of memory nothing can be forgotten, and nothing needs to be.
        file.sync_all().unwrap();
        let all = content.len().cast_signed();
        for (from, length) in [(0, all), (CHUNK.cast_signed() + 4096, 3 * 4096), (all / 2, all / 2)] {
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED).unwrap();
            std::fs::read(&path).unwrap();
            posix_fadvise(&file, from as i64, length as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .unwrap();
            let body = Reader::body(source(&path), 0, Some(content.len() as u64));
            assert!(body.collect().await.unwrap().to_bytes() == content, "{from} {length}");
        }
    }

    #[tokio::test]
    async fn a_file_that_got_shorter_breaks_the_answer_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, content(CHUNK + 1)).unwrap();
        for promised in [CHUNK + 2, 2 * CHUNK, 3 * CHUNK] {
            let body = Reader::body(source(&path), 0, Some(promised as u64));
            assert!(body.collect().await.is_err(), "{promised}");
        }
        let from_behind_its_end = Reader::body(source(&path), 2 * CHUNK as u64, Some(1));
        assert!(from_behind_its_end.collect().await.is_err());
    }

    #[tokio::test]
    async fn a_file_system_that_cannot_tell_what_is_cached_is_read_by_other_threads() {
        let version = std::path::Path::new("/proc/version");
        let mut buffer = BytesMut::with_capacity(CHUNK);
        let refused = sys::read_cached(&File::open(version).unwrap(), 0, CHUNK, &mut buffer).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::Unsupported);
        let body = Reader::body(source(version), 0, None);
        assert_eq!(body.collect().await.unwrap().to_bytes(), std::fs::read(version).unwrap());
    }

    /// A client that takes everything at once, or an encoder that makes little of much, would have the agent's thread for itself.
    #[tokio::test]
    async fn other_work_has_its_turn_during_a_download_from_the_page_cache() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        std::fs::write(&path, content(40 * CHUNK)).unwrap();
        let turns = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = Arc::clone(&turns);
        tokio::spawn(async move {
            loop {
                counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        });
        Reader::body(source(&path), 0, Some(40 * CHUNK as u64)).collect().await.unwrap();
        assert!(turns.load(std::sync::atomic::Ordering::Relaxed) >= 40 / TURN as usize);
    }

    #[tokio::test]
    async fn a_client_that_keeps_what_it_got_is_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let content = content(10 * CHUNK);
        std::fs::write(&path, &content).unwrap();
        let mut body = Reader::body(source(&path), 0, Some(content.len() as u64)).into_data_stream();
        let (mut kept, mut position) = (Vec::new(), 0);
        while let Some(chunk) = body.next().await {
            let chunk = chunk.unwrap();
            // Every other chunk is let go, and its room is used again.
            if kept.len() % 2 == 0 {
                kept.push((position, chunk.clone()));
            } else {
                kept.push((position, Bytes::new()));
            }
            position += chunk.len();
        }
        for (at, chunk) in kept {
            assert!(chunk == content[at..at + chunk.len()], "{at}");
        }
    }
}
