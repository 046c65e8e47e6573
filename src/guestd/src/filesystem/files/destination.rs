//! Where an upload goes: opens the destination, gives it to the user, and writes what arrives.
//!
//! The file is written in place, as it is in envd: a watcher sees a create, one change of owner and writes, a hard link or an open
//! descriptor stays connected, and a failed upload leaves what had arrived.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::task::JoinHandle;

use super::{FilesError, blocking, metadata};
use crate::filesystem::change::{Owner, create_dirs};
use crate::filesystem::error::{Fault, fault};

/// What is collected before a write: the hop to a blocking thread and the call itself then hardly matter.
const BATCH: usize = 256 * 1024;

/// An open destination.
#[derive(Debug)]
pub(super) struct Destination {
    file: Arc<File>,
    path: PathBuf,
    batch: Vec<Bytes>,
    batch_bytes: usize,
    /// At most one write is under way, while the next batch is being collected: no upload holds more than two batches.
    writing: Option<JoinHandle<io::Result<()>>>,
    received: u64,
    written: Arc<AtomicU64>,
}

impl Destination {
    /// Opens `path` for an upload, making the directories above it. Blocking.
    ///
    /// # Errors
    ///
    /// [`FilesError::IsDirectory`], [`FilesError::NotRegular`] for pipes, sockets and devices, [`FilesError::NoInodes`], or what
    /// the operating system said.
    pub(super) fn open(path: &Path, owner: Owner) -> Result<Self, FilesError> {
        if let Some(parent) = path.parent() {
            create_dirs(parent, owner).map_err(no_inodes("make the directory of", path))?;
        }
        let existed = match path.metadata() {
            Ok(metadata) => {
                regular(path, &metadata)?;
                true
            }
            // A missing file or a link that leads nowhere is created, and whatever else is wrong the open will say.
            Err(_) => false,
        };
        let file = open(path, existed)?;
        let metadata = file.metadata().map_err(FilesError::io("stat", path))?;
        regular(path, &metadata)?;
        let belongs = metadata.uid() == owner.uid && metadata.gid() == owner.gid;
        let keeps = belongs || (existed && reached_through_a_link(&file, path));
        if !keeps {
            owner.take(&file).map_err(FilesError::io("change the owner of", path))?;
        }
        Ok(Self {
            file: Arc::new(file),
            path: path.to_owned(),
            batch: Vec::new(),
            batch_bytes: 0,
            writing: None,
            received: 0,
            written: Arc::default(),
        })
    }

    /// Takes the next bytes; waits only when a write is under way and another batch is full.
    ///
    /// # Errors
    ///
    /// That of an earlier write: [`FilesError::NoSpace`], or what the operating system said.
    pub(super) async fn write(&mut self, bytes: Bytes) -> Result<(), FilesError> {
        self.received += bytes.len() as u64;
        self.batch_bytes += bytes.len();
        self.batch.push(bytes);
        if self.batch_bytes >= BATCH {
            self.settle().await?;
            self.start();
        }
        Ok(())
    }

    /// Writes what is left and then replaces the file's metadata.
    ///
    /// # Errors
    ///
    /// Those of [`Destination::write`], and [`FilesError::NoSpaceForMetadata`].
    pub(super) async fn finish(mut self, metadata: Arc<BTreeMap<String, String>>) -> Result<(), FilesError> {
        self.settle().await?;
        if self.batch_bytes > 0 {
            self.start();
            self.settle().await?;
        }
        let (file, path) = (self.file, self.path);
        blocking(move || metadata::replace(&file, &path, &metadata)).await
    }

    fn start(&mut self) {
        let (file, written) = (Arc::clone(&self.file), Arc::clone(&self.written));
        let batch = std::mem::take(&mut self.batch);
        self.batch_bytes = 0;
        self.writing = Some(tokio::task::spawn_blocking(move || write_all(&file, &batch, &written)));
    }

    async fn settle(&mut self) -> Result<(), FilesError> {
        let Some(writing) = self.writing.take() else { return Ok(()) };
        let result = writing.await.map_err(|_cancelled| FilesError::Stopped)?;
        result.map_err(|source| self.failure(source))
    }

    fn failure(&self, source: io::Error) -> FilesError {
        match fault(&source) {
            Fault::NoSpace => FilesError::NoSpace {
                attempted: self.received,
                written: self.written.load(Ordering::Relaxed),
            },
            _ => FilesError::io("write", &self.path)(source),
        }
    }
}

/// An existing file is opened without `O_CREAT`: with `fs.protected_regular` the kernel would refuse even root a file of somebody
/// else's in `/tmp`. `O_NONBLOCK` is for the pipe that may have taken the file's place: it must not block, ever.
fn open(path: &Path, existed: bool) -> Result<File, FilesError> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let mut options = OpenOptions::new();
    options.write(true).truncate(true).custom_flags(flags).mode(0o666);
    let opened = match options.clone().create(!existed).open(path) {
        // It went away since it was looked at.
        Err(error) if existed && fault(&error) == Fault::NotFound => options.create(true).open(path),
        opened => opened,
    };
    opened.map_err(|error| match (fault(&error), error.raw_os_error()) {
        (Fault::IsADirectory, _) => FilesError::IsDirectory { path: path.to_owned() },
        (_, Some(libc::ENXIO)) => FilesError::NotRegular { path: path.to_owned() },
        _ => no_inodes("open", path)(error),
    })
}

fn regular(path: &Path, metadata: &std::fs::Metadata) -> Result<(), FilesError> {
    if metadata.is_file() {
        Ok(())
    } else if metadata.is_dir() {
        Err(FilesError::IsDirectory { path: path.to_owned() })
    } else {
        Err(FilesError::NotRegular { path: path.to_owned() })
    }
}

/// Nothing has been written when a file or a directory cannot be created for want of room: it is inodes that are missing.
fn no_inodes(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    move |source| match fault(&source) {
        Fault::NoSpace => FilesError::NoInodes,
        _ => FilesError::io(action, path)(source),
    }
}

/// Whether the open file is elsewhere than its path says.
///
/// An existing file that was reached through a link keeps its owner: otherwise a process in the sandbox could plant a link to
/// `/etc/shadow` where the next upload goes, and be given the file (lessons.md D3, `upload.go`).
fn reached_through_a_link(file: &File, path: &Path) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).is_ok_and(|real| real != path)
}

fn write_all(mut file: &File, batch: &[Bytes], written: &AtomicU64) -> io::Result<()> {
    let mut slices: Vec<_> =
        batch.iter().filter(|bytes| !bytes.is_empty()).map(|bytes| IoSlice::new(bytes)).collect();
    let mut slices = slices.as_mut_slice();
    while !slices.is_empty() {
        match file.write_vectored(slices) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                written.fetch_add(count as u64, Ordering::Relaxed);
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn destination(path: &Path) -> Destination {
        Destination {
            file: Arc::new(OpenOptions::new().write(true).open(path).unwrap()),
            path: path.to_owned(),
            batch: Vec::new(),
            batch_bytes: 0,
            writing: None,
            received: 0,
            written: Arc::default(),
        }
    }

    #[tokio::test]
    async fn a_full_disk_says_how_much_was_attempted_and_written() {
        // Every write to this device says ENOSPC.
        let mut full = destination(Path::new("/dev/full"));
        full.write(Bytes::from_static(b"0123456789")).await.unwrap();
        let error = full.finish(Arc::default()).await.unwrap_err();
        let expected = "attempted to write 10 bytes: not enough disk space available (0 bytes were written)";
        assert_eq!(error.to_string(), expected);
        assert_eq!(error.status(), http::StatusCode::INSUFFICIENT_STORAGE);
    }

    #[test]
    fn a_quota_counts_as_a_full_disk() {
        let full = destination(Path::new("/dev/null"));
        full.written.store(7, Ordering::Relaxed);
        for errno in [libc::ENOSPC, libc::EDQUOT] {
            let error = full.failure(io::Error::from_raw_os_error(errno));
            assert!(matches!(error, FilesError::NoSpace { attempted: 0, written: 7 }));
            let error = no_inodes("open", Path::new("/x"))(io::Error::from_raw_os_error(errno));
            assert_eq!(error.to_string(), "not enough inodes available");
        }
        let error = full.failure(io::Error::from_raw_os_error(libc::EIO));
        assert!(matches!(error, FilesError::Io { action: "write", .. }));
    }

    #[test]
    fn many_small_pieces_are_written_in_order() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        let file = File::create(&path).unwrap();
        // More than the kernel takes in one call.
        let batch: Vec<_> = (0..3000_u32).map(|number| Bytes::from(format!("{number},"))).collect();
        let written = AtomicU64::new(0);
        write_all(&file, &batch, &written).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), batch.concat());
        assert_eq!(written.load(Ordering::Relaxed), batch.concat().len() as u64);
    }
}
