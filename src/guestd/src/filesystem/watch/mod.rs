//! Watching directories: `WatchDir` streams and watchers that are polled (contract: envd.md section 3.4).
//!
//! [`Watchers`] owns all of it: one inotify instance for all watchers, one task that waits for it, and what each client has not heard
//! yet. Nothing of this exists while nobody watches, and nothing runs while nothing happens.
//!
//! Where to look: `engine` turns the kernel's events into those of clients, `tree` knows what a watched directory is called, `walk`
//! covers a whole tree, `directory` looks at the disk, `kernel` is inotify, `outbox` the queue to one client, `stream` the answer to
//! `WatchDir`, `polled` the watchers with an id.

mod directory;
mod engine;
mod error;
mod kernel;
mod outbox;
mod polled;
pub(super) mod stream;
#[cfg(test)]
mod tests;
mod tree;
mod walk;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex as StdMutex, PoisonError, Weak};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use self::directory::{Directory, Identity};
use self::engine::{Engine, Key};
use self::kernel::Kernel;
use self::outbox::Outbox;
use super::FilesystemError;
use super::credentials::ActingAs;
use crate::identity::{Accounts, User};

pub use error::WatchError;
pub use polled::WatcherState;

/// The most watchers at a time, streams and polled ones together.
const WATCHER_LIMIT: usize = 1024;

/// The most directories of one recursive watcher; each costs about 1 KiB of kernel memory.
const DIRECTORY_LIMIT: usize = 65_536;

/// The deepest directory of a recursive watcher, in levels below its root.
const DEPTH_LIMIT: usize = 100;

/// How many whole trees are walked at a time; the other blocking threads are for others.
const WALKS: usize = 4;

/// How long the second half of a move may take to be queued.
const SETTLE: Duration = Duration::from_millis(20);

/// How a client wants to watch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Options {
    pub recursive: bool,
    /// Describe what was created, written or changed.
    pub include_entry: bool,
    pub allow_network_mounts: bool,
}

/// What is watched, how, and for whom.
#[derive(Clone, Debug)]
pub struct Spec {
    pub path: PathBuf,
    pub options: Options,
    pub user: User,
}

impl Spec {
    /// Looks at the disk with the eyes of the watcher's user, on a blocking thread: what that user may not list is not told.
    fn look<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _acting = ActingAs::user(&self.user)?;
        work()
    }

    /// The directory at a path relative to the root, if the root is still where it was.
    fn open(&self, root: Identity, relative: &Path) -> io::Result<Directory> {
        self.look(|| {
            let moved = || io::Error::other("the watched directory is not at its path any more");
            let directory = Directory::root(&self.path).map_err(|_| moved())?;
            if directory.identity != root {
                return Err(moved());
            }
            directory.descend(relative)
        })
    }

    /// # Errors
    /// Those of envd.md section 1.10.
    fn open_root(&self) -> Result<Directory, WatchError> {
        let path = || self.path.clone();
        let directory =
            self.look(|| Directory::root(&self.path)).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT) => WatchError::NotFound { path: path() },
                Some(libc::ENOTDIR) => WatchError::NotADirectory { path: path() },
                _ => FilesystemError::io("watch", &self.path)(error).into(),
            })?;
        let network = directory.is_network().map_err(FilesystemError::io("watch", &self.path))?;
        if network && !self.options.allow_network_mounts {
            return Err(WatchError::Network { path: path() });
        }
        Ok(directory)
    }
}

#[derive(Debug)]
pub struct Watchers {
    shared: Arc<Shared>,
    polled: polled::Polled,
    /// Where the keepalive times of all streams are counted from, so that they fall together.
    origin: Instant,
}

/// What the watchers, their handles and the reading task have in common.
#[derive(Debug)]
struct Shared {
    engine: Arc<Mutex<Engine>>,
    walks: Semaphore,
    /// Wakes the reading task for another pass.
    unsettled: Notify,
    reader: StdMutex<Option<AbortHandle>>,
    /// Bytes in all outboxes.
    bytes: Arc<AtomicUsize>,
}

/// A live watcher; dropping it ends it.
#[derive(Debug)]
struct Watch {
    key: Key,
    outbox: Arc<Outbox>,
    shared: Arc<Shared>,
}

impl Watchers {
    pub fn new(accounts: Arc<Accounts>) -> Arc<Self> {
        let shared = Arc::new(Shared {
            engine: Arc::new(Mutex::new(Engine::new(accounts))),
            walks: Semaphore::new(WALKS),
            unsettled: Notify::new(),
            reader: StdMutex::default(),
            bytes: Arc::default(),
        });
        Arc::new(Self { shared, polled: polled::Polled::default(), origin: Instant::now() })
    }

    /// Begins to watch. From the moment that this returns, everything is heard.
    async fn open(&self, spec: Spec) -> Result<Watch, WatchError> {
        let shared = Arc::clone(&self.shared);
        let _permit = if spec.options.recursive { self.shared.walks.acquire().await.ok() } else { None };
        let root = {
            let spec = spec.clone();
            blocking(move || spec.open_root()).await?
        };
        let recursive = spec.options.recursive;
        let watch = {
            let mut engine = Arc::clone(&shared.engine).lock_owned().await;
            if engine.kernel().is_none() {
                let kernel = Arc::new(Kernel::open()?);
                shared.read(Arc::clone(&kernel))?;
                engine.set_kernel(kernel);
            }
            let (watch, pass) = blocking({
                let shared = Arc::clone(&shared);
                move || {
                    let pass = engine.pass();
                    let outbox = Arc::new(Outbox::new(Arc::clone(&shared.bytes)));
                    let begun = engine.begin(spec, &root, Arc::clone(&outbox));
                    if engine.is_empty() {
                        engine.close();
                        shared.stop_reading();
                    }
                    begun.map(|(key, _)| (Watch { key, outbox, shared: Arc::clone(&shared) }, pass))
                }
            })
            .await?;
            shared.follow_up(pass).await;
            watch
        };
        if recursive {
            let key = watch.key;
            blocking(move || shared.walk(key)).await?;
        }
        Ok(watch)
    }
}

impl Shared {
    /// Hears everything that has happened by now.
    async fn catch_up(self: &Arc<Self>) {
        let mut engine = Arc::clone(&self.engine).lock_owned().await;
        let passed = blocking(move || Ok(engine.pass())).await;
        if let Ok(pass) = passed {
            self.follow_up(pass).await;
        }
    }

    async fn follow_up(self: &Arc<Self>, pass: engine::Pass) {
        if pass.unsettled {
            self.unsettled.notify_one();
        }
        for key in pass.stale {
            let shared = Arc::clone(self);
            let walked = blocking(move || {
                if let Err(error) = shared.walk(key) {
                    shared.engine.blocking_lock().lose(key, &error.to_string());
                }
                Ok(())
            });
            let _stopped = walked.await;
        }
    }

    /// Walks through a watcher's whole tree. Blocking.
    fn walk(&self, key: Key) -> Result<(), WatchError> {
        let walked = walk::walk(&self.engine, key);
        if self.engine.blocking_lock().is_unsettled() {
            self.unsettled.notify_one();
        }
        walked
    }

    /// Starts the task that waits for the kernel.
    fn read(self: &Arc<Self>, kernel: Arc<Kernel>) -> Result<(), WatchError> {
        let failed = |source| WatchError::io(Path::new("inotify"), source);
        let kernel = kernel::readiness(kernel).map_err(failed)?;
        let task = tokio::spawn(read(kernel, Arc::downgrade(self)));
        let former = self.reader.lock().unwrap_or_else(PoisonError::into_inner).replace(task.abort_handle());
        if let Some(former) = former {
            former.abort();
        }
        Ok(())
    }

    fn stop_reading(&self) {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(reader) = reader {
            reader.abort();
        }
    }

    fn forget(self: &Arc<Self>, key: Key) {
        let shared = Arc::clone(self);
        let forget = async move {
            let mut engine = Arc::clone(&shared.engine).lock_owned().await;
            let forgotten = blocking(move || {
                engine.remove(key);
                if engine.is_empty() {
                    shared.stop_reading();
                }
                Ok(())
            });
            let _stopped = forgotten.await;
        };
        // Without a runtime the agent is going down, and everything goes with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(forget);
        }
    }
}

/// Passes events on when the kernel has some, for as long as there are watchers.
async fn read(kernel: AsyncFd<Arc<Kernel>>, shared: Weak<Shared>) {
    loop {
        let Some(unsettled) = shared.upgrade() else { return };
        tokio::select! {
            ready = kernel.readable() => match ready {
                // Before the pass: what comes during it makes it ready again.
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return tracing::error!(%error, "inotify cannot be waited for"),
            },
            () = unsettled.unsettled.notified() => tokio::time::sleep(SETTLE).await,
        }
        drop(unsettled);
        let Some(shared) = shared.upgrade() else { return };
        shared.catch_up().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.forget(self.key);
    }
}

/// Runs file work on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, WatchError> + Send + 'static,
) -> Result<T, WatchError> {
    let task = tokio::task::spawn_blocking(work);
    task.await.unwrap_or_else(|_cancelled| Err(FilesystemError::Stopped.into()))
}
