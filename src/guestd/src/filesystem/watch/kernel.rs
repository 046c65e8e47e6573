//! The one inotify instance of all watchers (inotify(7)).
//!
//! One for all, because there are only 128 to a user (`fs.inotify.max_user_instances`), and every process in the machine that runs as
//! root draws on the same number.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags as Mask, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::WatchError;
use super::directory::Directory;

/// What a watcher hears of (contract: envd.md section 3.4).
const HEARD: Mask = Mask::IN_CREATE
    .union(Mask::IN_MOVED_TO)
    .union(Mask::IN_MOVED_FROM)
    .union(Mask::IN_MOVE_SELF)
    .union(Mask::IN_MODIFY)
    .union(Mask::IN_ATTRIB)
    .union(Mask::IN_DELETE)
    .union(Mask::IN_DELETE_SELF)
    .union(Mask::IN_ONLYDIR);

/// The kernel's default of `fs.inotify.max_queued_events`.
const QUEUE_DEFAULT: usize = 16_384;

#[derive(Debug)]
pub(super) struct Kernel {
    inotify: Inotify,
    /// The most events that the queue holds. The kernel fixes it when the instance is made.
    pub(super) queue_limit: usize,
}

impl Kernel {
    /// # Errors
    /// [`WatchError::NoInstances`], or what inotify_init1(2) says.
    pub(super) fn open() -> Result<Self, WatchError> {
        let queue_limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(QUEUE_DEFAULT);
        match Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK) {
            Ok(inotify) => Ok(Self { inotify, queue_limit }),
            Err(Errno::EMFILE | Errno::ENFILE) => Err(WatchError::NoInstances),
            Err(error) => Err(WatchError::io(Path::new("inotify"), error.into())),
        }
    }

    /// Watches a directory; one that is watched already keeps its descriptor. `path` is what a message calls it.
    ///
    /// # Errors
    /// [`WatchError::NoWatches`], or what inotify_add_watch(2) says.
    pub(super) fn add(&self, directory: &Directory, path: &Path) -> Result<WatchDescriptor, WatchError> {
        self.inotify.add_watch(&directory.address(), HEARD).map_err(|error| match error {
            Errno::ENOSPC => WatchError::NoWatches { path: path.to_owned() },
            error => WatchError::io(path, error.into()),
        })
    }

    /// A watch that went with its directory is gone already.
    pub(super) fn remove(&self, watch: WatchDescriptor) {
        let _ = self.inotify.rm_watch(watch);
    }

    /// A buffer full of events; none when the queue is empty.
    ///
    /// # Errors
    /// Those of read(2).
    pub(super) fn read(&self) -> io::Result<Vec<InotifyEvent>> {
        loop {
            match self.inotify.read_events() {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(Vec::new()),
                read => return read.map_err(io::Error::from),
            }
        }
    }
}

/// For waiting until there are events.
///
/// # Errors
/// Those of epoll_ctl(2).
pub(super) fn readiness(kernel: Arc<Kernel>) -> io::Result<AsyncFd<Arc<Kernel>>> {
    // SAFETY: the descriptor is the instance's own. It is open, always the same one, and closed only with the last `Arc`, of which the
    // result has one.
    let registered = unsafe { AsyncFd::register_with_interest(kernel, Interest::READABLE) };
    registered.map_err(io::Error::from)
}

impl AsFd for Kernel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
