//! Where an upload goes: opens the destination, gives it to the user, and writes what arrives.
//!
//! By default the file is written in place, as it is in envd: a watcher sees a create, one change of owner and writes, a hard link or
//! an open descriptor stays connected, and a failed upload leaves what had arrived. On request it is [`Staged`].

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::task::JoinHandle;

use super::staged::{Staged, Suffix};
use super::{FilesError, as_user, metadata};
use crate::filesystem::Caller;
use crate::filesystem::error::{Fault, fault};
use crate::filesystem::place::{Place, look_through, open_at, real_path, reopen};

/// What is collected before a write, in bytes: the hop to a blocking thread is for all of it. Large uploads collect more, some at a time.
const BATCH: usize = 256 * 1024;
const LARGE_BATCH: usize = 1024 * 1024;
static LARGE: Semaphore = Semaphore::const_new(4);
/// From here on an upload is a large one.
const LARGE_UPLOAD: u64 = 1024 * 1024;
/// What one call writes (writev(2), IOV_MAX); also what bounds an upload that comes byte by byte.
const MOST_PIECES: usize = 1024;

/// What happens to a file that is there already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Replace {
    InPlace,
    Atomic,
}

/// An open destination.
#[derive(Debug)]
pub(super) struct Destination {
    caller: Arc<Caller>,
    file: Arc<File>,
    path: PathBuf,
    staged: Option<Staged>,
    batch: Vec<Bytes>,
    batch_bytes: usize,
    large: Option<SemaphorePermit<'static>>,
    /// At most one write is under way, while the next batch is being collected: no upload holds more than two batches.
    writing: Option<JoinHandle<io::Result<()>>>,
    received: u64,
    written: Arc<AtomicU64>,
}

impl Destination {
    /// Opens `path` for an upload, making the directories above it. Blocking, as the caller's user.
    ///
    /// # Errors
    ///
    /// [`FilesError::IsDirectory`], [`FilesError::NotRegular`] for pipes, sockets and devices, [`FilesError::NoInodes`], or what
    /// the operating system said.
    pub(super) fn open(caller: &Arc<Caller>, path: &Path, replace: Replace) -> Result<Self, FilesError> {
        let place = Place::create(path, caller.owner()).map_err(no_inodes("make the directory of", path))?;
        let (file, staged) = match replace {
            Replace::InPlace => (Arc::new(open(caller, &place, path)?), None),
            Replace::Atomic => {
                let place = place.followed().map_err(no_inodes("open", path))?;
                let staged = Staged::create(caller, place, path, Suffix::Upload)?;
                (Arc::clone(&staged.file), Some(staged))
            }
        };
        Ok(Self {
            caller: Arc::clone(caller),
            file,
            path: path.to_owned(),
            staged,
            batch: Vec::new(),
            batch_bytes: 0,
            large: None,
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
        if self.batch_bytes >= self.batch_limit() || self.batch.len() >= MOST_PIECES {
            self.settle().await?;
            self.start();
        }
        Ok(())
    }

    /// Writes what is left, and then replaces the metadata of a file in place. A staged file comes back, to be committed.
    ///
    /// # Errors
    ///
    /// Those of [`Destination::write`], and [`FilesError::NoSpaceForMetadata`].
    pub(super) async fn finish(
        mut self,
        metadata: Arc<BTreeMap<String, String>>,
    ) -> Result<Option<Staged>, FilesError> {
        self.settle().await?;
        if self.batch_bytes > 0 {
            self.start();
            self.settle().await?;
        }
        if self.staged.is_some() {
            return Ok(self.staged);
        }
        let (file, path) = (self.file, self.path);
        as_user(&self.caller, move |_| metadata::replace(&file, &path, &metadata)).await?;
        Ok(None)
    }

    fn batch_limit(&mut self) -> usize {
        if self.large.is_none() && self.received > LARGE_UPLOAD {
            self.large = LARGE.try_acquire().ok();
        }
        if self.large.is_some() { LARGE_BATCH } else { BATCH }
    }

    fn start(&mut self) {
        let (caller, file) = (Arc::clone(&self.caller), Arc::clone(&self.file));
        let (batch, written) = (std::mem::take(&mut self.batch), Arc::clone(&self.written));
        self.batch_bytes = 0;
        self.writing = Some(tokio::task::spawn_blocking(move || {
            // What root reserves on a disk is not for users, and their writes clear set-user-id bits.
            let _acting = caller.act()?;
            write_all(&file, &batch, &written)
        }));
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

/// Opens the file in place, empties it, and gives it to the user.
///
/// It is looked at before it is opened, because opening a device can change the machine, and what is opened is what was looked at.
/// An existing file is opened without `O_CREAT`: with `fs.protected_regular` the kernel would refuse even root a file of
/// somebody else's in `/tmp`.
fn open(caller: &Caller, place: &Place, path: &Path) -> Result<File, FilesError> {
    // Each round is one in which the file came or went meanwhile.
    for _ in 0..8 {
        match look_through(&place.parent, &place.name) {
            Ok(found) => {
                regular(path, &found.metadata().map_err(FilesError::io("stat", path))?)?;
                let file =
                    File::from(reopen(&found, WRITE | OFlag::O_TRUNC).map_err(no_inodes("open", path))?);
                keep_or_take(caller, &file, path)?;
                return Ok(file);
            }
            Err(error) if fault(&error) == Fault::NotFound => {}
            Err(error) => return Err(FilesError::io("open", path)(error)),
        }
        let created = match create(place, OFlag::O_EXCL) {
            // A link that leads nowhere, or somebody was faster.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => match place.look() {
                Ok(link) if link.metadata().is_ok_and(|metadata| metadata.is_symlink()) => {
                    create(place, OFlag::empty())
                }
                _ => continue,
            },
            created => created,
        };
        let file = File::from(created.map_err(no_inodes("open", path))?);
        regular(path, &file.metadata().map_err(FilesError::io("stat", path))?)?;
        caller.owner().take(&file).map_err(FilesError::io("change the owner of", path))?;
        return Ok(file);
    }
    Err(FilesError::Changed { path: path.to_owned() })
}

/// `O_NONBLOCK` is for the pipe at the end of a link that led nowhere a moment ago: it must not block, ever.
const WRITE: OFlag = OFlag::O_WRONLY.union(OFlag::O_NONBLOCK).union(OFlag::O_NOCTTY);

fn create(place: &Place, exclusive: OFlag) -> io::Result<OwnedFd> {
    let mode = Mode::from_bits_truncate(0o666);
    open_at(&place.parent, Path::new(&place.name), WRITE | OFlag::O_CREAT | exclusive, mode)
}

/// Root takes what it overwrites (contract: envd.md section 3.5), unless it was reached through a link: that file is somewhere else
/// than the caller thought. A user has no right to take a file, and none is needed to write one.
fn keep_or_take(caller: &Caller, file: &File, path: &Path) -> Result<(), FilesError> {
    let metadata = file.metadata().map_err(FilesError::io("stat", path))?;
    let owner = caller.owner();
    let belongs = (metadata.uid(), metadata.gid()) == (owner.uid, owner.gid);
    if owner.uid != 0 || belongs || real_path(file).is_ok_and(|real| real != path) {
        return Ok(());
    }
    owner.take(file).map_err(FilesError::io("change the owner of", path))
}

pub(super) fn regular(path: &Path, metadata: &std::fs::Metadata) -> Result<(), FilesError> {
    if metadata.is_file() {
        Ok(())
    } else if metadata.is_dir() {
        Err(FilesError::IsDirectory { path: path.to_owned() })
    } else {
        Err(FilesError::NotRegular { path: path.to_owned() })
    }
}

/// Nothing has been written when a file or a directory cannot be created for want of room: it is inodes that are missing.
pub(super) fn no_inodes(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    move |source| match (fault(&source), source.raw_os_error()) {
        (Fault::NoSpace, _) => FilesError::NoInodes,
        (Fault::IsADirectory, _) => FilesError::IsDirectory { path: path.to_owned() },
        (_, Some(libc::ENXIO)) => FilesError::NotRegular { path: path.to_owned() },
        _ => FilesError::io(action, path)(source),
    }
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
    use crate::identity::User;

    fn me() -> User {
        let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
        User { name: "me".to_owned(), uid, gid, home: "/".into(), shell: "/bin/sh".into(), groups: vec![gid] }
    }

    fn destination(path: &Path) -> Destination {
        Destination {
            caller: Arc::new(Caller { user: me(), workdir: None }),
            file: Arc::new(File::options().write(true).open(path).unwrap()),
            path: path.to_owned(),
            staged: None,
            batch: Vec::new(),
            batch_bytes: 0,
            large: None,
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

    #[tokio::test]
    async fn an_upload_that_comes_byte_by_byte_or_in_bulk_is_collected_within_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("f");
        File::create(&path).unwrap();
        let mut destination = destination(&path);
        let mut expected = Vec::new();
        for number in 0..3 * MOST_PIECES {
            for length in [1, if number % 16 == 0 { 100_000 } else { 1 }] {
                let piece = vec![(number % 251) as u8; length];
                expected.extend_from_slice(&piece);
                destination.write(piece.into()).await.unwrap();
                assert!(destination.batch.len() < MOST_PIECES && destination.batch_bytes < LARGE_BATCH);
            }
        }
        destination.finish(Arc::default()).await.unwrap();
        assert!(std::fs::read(&path).unwrap() == expected);
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
