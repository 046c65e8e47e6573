//! Files and directories as clients see them: the `filesystem.Filesystem` service and `/files`.
//!
//! [`Filesystem`] owns the operations. `rpc` speaks Connect for it and [`routes`] speaks HTTP; both are thin. All file work happens
//! on the blocking threads, never on the runtime's own, and there with the credentials of the request's user: what that user may
//! not do, the agent does not do for it. envd does everything as root (envd.md section 3).
//!
//! Where to look: `credentials` makes a thread act as a user, `place` looks paths up, `walk` goes through trees, `entry` describes one
//! file, `list` lists, `change` and `transfer` alter the tree, `files` moves contents, `watch` tells clients what changes, `sys` has the
//! system calls for extended attributes, `error` the failures.

mod change;
mod credentials;
mod entry;
mod error;
mod files;
mod list;
mod place;
mod rpc;
mod sys;
#[cfg(test)]
mod tests;
mod transfer;
mod walk;
mod watch;

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use guestd_protocol::wire::filesystem::EntryInfo;

use self::watch::Watchers;
use crate::activity::Activity;
use crate::identity::{Accounts, Names, RequestUser, User, clean, effective_user, resolve_path};
use crate::settings::Settings;

use credentials::ActingAs;
use place::{Owner, Place};

pub use error::FilesystemError;
pub use files::{FilesError, expected_sha256, routes};
pub use watch::{WatchError, WatcherState};

/// The filesystem operations of one agent.
#[derive(Clone, Debug)]
pub struct Filesystem {
    accounts: Arc<Accounts>,
    settings: Arc<Settings>,
    activity: Arc<Activity>,
    watchers: Arc<Watchers>,
}

/// For whom an operation runs.
#[derive(Debug)]
struct Caller {
    user: User,
    workdir: Option<String>,
}

impl Caller {
    fn resolve(&self, path: impl AsRef<OsStr>) -> Result<PathBuf, crate::identity::PathError> {
        resolve_path(path, &self.user, self.workdir.as_deref())
    }

    fn owner(&self) -> Owner {
        Owner::from(&self.user)
    }

    /// Makes the calling thread act as the user.
    ///
    /// # Errors
    ///
    /// Those of [`ActingAs::user`].
    fn act(&self) -> io::Result<ActingAs> {
        ActingAs::user(&self.user)
    }

    /// Runs one operation of the service as the user.
    fn work<T>(&self, work: impl FnOnce() -> Result<T, FilesystemError>) -> Result<T, FilesystemError> {
        let _acting = self
            .act()
            .map_err(|source| FilesystemError::Credentials { user: self.user.name.clone(), source })?;
        work().map_err(|error| error.of(&self.user))
    }

    /// Makes the user's home directory when it is missing and `path` is in it: only root can, and the first upload to a fresh image
    /// must not fail for it.
    ///
    /// Root looks up this path and no other. The directory above must exist, be root's, and be closed to the renames of others,
    /// so that what gets the new owner is what was made. Where it is not so, or anything fails, the call itself says what is missing.
    fn prepare_home(&self, path: &Path) {
        let home = clean(&Path::new("/").join(&self.user.home));
        if self.user.uid == 0 || !path.starts_with(&home) || home.symlink_metadata().is_ok() {
            return;
        }
        let Ok(place) = Place::open(&home) else { return };
        let safe = nix::sys::stat::fstat(&place.parent).is_ok_and(|status| {
            status.st_uid == 0 && (status.st_mode & 0o022 == 0 || status.st_mode & libc::S_ISVTX != 0)
        });
        if safe && let Err(error) = place::create_dir(&place.parent, &place.name, self.owner()) {
            tracing::warn!(home = %home.display(), %error, "a home directory cannot be made");
        }
    }
}

fn not_empty(field: &'static str, path: &str) -> Result<(), FilesystemError> {
    if path.is_empty() { Err(FilesystemError::NoPath { field }) } else { Ok(()) }
}

impl Filesystem {
    pub fn new(accounts: Arc<Accounts>, settings: Arc<Settings>, activity: Arc<Activity>) -> Self {
        let watchers = Watchers::new(Arc::clone(&accounts));
        Self { accounts, settings, activity, watchers }
    }

    /// What is at a path, without following a link there (contract: envd.md sections 3.2 and 3.3).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::FileNotFound`], or what the operating system said.
    pub async fn stat(&self, user: RequestUser, path: String) -> Result<EntryInfo, FilesystemError> {
        self.run(user, move |caller, names| {
            let path = caller.resolve(&path)?;
            let described = Place::open(&path)
                .and_then(|place| entry::describe(&place.parent, &place.name, &path, names));
            described.map_err(|source| match error::fault(&source) {
                // Below a file there is nothing: whoever asks whether something exists gets a plain no.
                error::Fault::NotFound | error::Fault::NotADirectory => {
                    FilesystemError::FileNotFound { path: path.clone() }
                }
                _ => FilesystemError::io("stat", &path)(source),
            })
        })
        .await
    }

    /// Everything in a directory, down to `depth` levels; 0 counts as 1 (contract: envd.md section 3.2).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::PathNotFound`], [`FilesystemError::NotADirectory`], [`FilesystemError::CyclicLink`], or what the
    /// operating system said about the directory itself.
    pub async fn list_dir(
        &self,
        user: RequestUser,
        path: String,
        depth: u32,
    ) -> Result<Vec<EntryInfo>, FilesystemError> {
        self.run(user, move |caller, names| list::list(&caller.resolve(&path)?, depth, names)).await
    }

    /// Makes a directory and those above it, owned by the caller (contract: envd.md sections 3.2 and 3.5).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::DirectoryExists`], [`FilesystemError::NotADirectoryInTheWay`], or what the operating system said.
    pub async fn make_dir(&self, user: RequestUser, path: String) -> Result<EntryInfo, FilesystemError> {
        self.run_in(user, path, |caller, names, path| change::make_dir(path, caller.owner(), names)).await
    }

    /// Moves a file or a tree, also to another file system (contract: envd.md section 3.2).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::NoPath`], [`FilesystemError::SourceNotFound`], or what the operating system said.
    pub async fn rename(
        &self,
        user: RequestUser,
        source: String,
        destination: String,
    ) -> Result<EntryInfo, FilesystemError> {
        not_empty("source", &source)?;
        self.run_in(user, destination, move |caller, names, destination| {
            change::rename(&caller.resolve(&source)?, destination, caller.owner(), names)
        })
        .await
    }

    /// Removes a file or a tree; a missing path is success (contract: envd.md section 3.2).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::NoPath`], [`FilesystemError::Root`], or what the operating system said.
    pub async fn remove(&self, user: RequestUser, path: String) -> Result<(), FilesystemError> {
        not_empty("path", &path)?;
        self.run(user, move |caller, _| change::remove(&caller.resolve(&path)?)).await
    }

    /// What a watch of a client's path is about.
    async fn watch_spec(
        &self,
        user: RequestUser,
        path: String,
        options: watch::Options,
    ) -> Result<watch::Spec, FilesystemError> {
        self.run(user, move |caller, _| {
            Ok(watch::Spec { path: caller.resolve(&path)?, options, user: caller.user.clone() })
        })
        .await
    }

    /// The polled watchers as data, with everything that has happened by now: for another agent that takes this one's place.
    pub async fn export_watchers(&self) -> Vec<WatcherState> {
        self.watchers.export().await
    }

    /// Goes on with exported watchers. One whose directory or user is gone is dropped: its client hears that it is not found.
    /// The result is how many were taken over, and how many not.
    pub async fn restore_watchers(&self, states: Vec<WatcherState>) -> (usize, usize) {
        let (mut taken, mut failed) = (0, 0);
        for state in states {
            let (accounts, name) = (Arc::clone(&self.accounts), state.user.clone());
            let user = tokio::task::spawn_blocking(move || accounts.user(&name)).await;
            let id = state.id.clone();
            let error = match user {
                Ok(Ok(user)) => self.watchers.restore(state, user).await.err().map(|error| error.to_string()),
                Ok(Err(error)) => Some(error.to_string()),
                Err(_stopped) => Some("the agent is going down".to_owned()),
            };
            match error {
                None => taken += 1,
                Some(error) => {
                    failed += 1;
                    tracing::warn!(id, error, "a watcher is not taken over");
                }
            }
        }
        (taken, failed)
    }

    /// Runs one operation on a blocking thread as the caller's user, who is looked up there as well.
    async fn run<T: Send + 'static>(
        &self,
        user: RequestUser,
        work: impl FnOnce(&Caller, &Names) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, FilesystemError> {
        self.blocking(user, |caller, names| caller.work(|| work(caller, names))).await
    }

    /// As [`Filesystem::run`], for an operation that makes something at `path`.
    async fn run_in<T: Send + 'static>(
        &self,
        user: RequestUser,
        path: String,
        work: impl FnOnce(&Caller, &Names, &Path) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, FilesystemError> {
        self.blocking(user, move |caller, names| {
            let path = caller.resolve(&path)?;
            caller.prepare_home(&path);
            caller.work(|| work(caller, names, &path))
        })
        .await
    }

    async fn blocking<T: Send + 'static>(
        &self,
        user: RequestUser,
        work: impl FnOnce(&Caller, &Names) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, FilesystemError> {
        let this = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let user = effective_user(&user, &this.accounts, &this.settings)?;
            let caller = Caller { user, workdir: this.settings.snapshot().default_workdir };
            work(&caller, &this.accounts.names())
        });
        task.await.unwrap_or_else(|_cancelled| Err(FilesystemError::Stopped))
    }
}
