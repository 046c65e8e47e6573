//! Files and directories as clients see them: the `filesystem.Filesystem` service and `/files`.
//!
//! [`Filesystem`] owns the operations. `rpc` speaks Connect for it and [`routes`] speaks HTTP; both are thin. Everything runs
//! with the agent's own privileges: the user of a request decides what a path means and who owns what is created, and nothing
//! else (contract: envd.md section 3). All file work happens on the blocking threads, never on the runtime's own.
//!
//! Where to look: `entry` describes one file, `list` walks, `change` and `transfer` alter the tree, `files` moves contents, `sys`
//! has the system calls for extended attributes, `watch` tells clients what changes, `error` the failures.

mod change;
mod entry;
mod error;
mod files;
mod list;
mod rpc;
mod sys;
#[cfg(test)]
mod tests;
mod transfer;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use guestd_protocol::wire::filesystem::EntryInfo;

use self::watch::Watchers;
use crate::activity::Activity;
use crate::identity::{Accounts, RequestUser, User, effective_user, resolve_path};
use crate::settings::Settings;

pub use error::FilesystemError;
pub use files::{FilesError, routes};

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
    fn resolve(&self, path: &str) -> Result<PathBuf, crate::identity::PathError> {
        resolve_path(path, &self.user, self.workdir.as_deref())
    }

    fn owner(&self) -> change::Owner {
        change::Owner::from(&self.user)
    }
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
        self.run(user, move |this, caller| {
            let path = caller.resolve(&path)?;
            entry::describe(&path, &this.accounts.names()).map_err(|source| match error::fault(&source) {
                error::Fault::NotFound => FilesystemError::FileNotFound { path: path.clone() },
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
        self.run(user, move |this, caller| list::list(&caller.resolve(&path)?, depth, &this.accounts.names()))
            .await
    }

    /// Makes a directory and those above it, owned by the caller (contract: envd.md sections 3.2 and 3.5).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::DirectoryExists`], [`FilesystemError::NotADirectoryInTheWay`], or what the operating system said.
    pub async fn make_dir(&self, user: RequestUser, path: String) -> Result<EntryInfo, FilesystemError> {
        self.run(user, move |this, caller| {
            let path = caller.resolve(&path)?;
            change::make_dir(&path, caller.owner())?;
            entry::describe(&path, &this.accounts.names()).map_err(FilesystemError::io("stat", &path))
        })
        .await
    }

    /// Moves a file or a tree, also to another file system (contract: envd.md section 3.2).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::SourceNotFound`], or what the operating system said.
    pub async fn rename(
        &self,
        user: RequestUser,
        source: String,
        destination: String,
    ) -> Result<EntryInfo, FilesystemError> {
        self.run(user, move |this, caller| {
            let (source, destination) = (caller.resolve(&source)?, caller.resolve(&destination)?);
            change::rename(&source, &destination, caller.owner())?;
            entry::describe(&destination, &this.accounts.names())
                .map_err(FilesystemError::io("stat", &destination))
        })
        .await
    }

    /// Removes a file or a tree; a missing path is success (contract: envd.md section 3.2).
    ///
    /// # Errors
    ///
    /// [`FilesystemError::Root`], or what the operating system said.
    pub async fn remove(&self, user: RequestUser, path: String) -> Result<(), FilesystemError> {
        self.run(user, move |_, caller| change::remove(&caller.resolve(&path)?)).await
    }

    /// What a watch of a client's path is about.
    async fn watch_spec(
        &self,
        user: RequestUser,
        path: String,
        options: watch::Options,
    ) -> Result<watch::Spec, FilesystemError> {
        self.run(user, move |_, caller| {
            Ok(watch::Spec { path: caller.resolve(&path)?, options, user: caller.user.clone() })
        })
        .await
    }

    /// Runs one operation on a blocking thread, where the caller's user is looked up as well.
    async fn run<T: Send + 'static>(
        &self,
        user: RequestUser,
        work: impl FnOnce(&Self, &Caller) -> Result<T, FilesystemError> + Send + 'static,
    ) -> Result<T, FilesystemError> {
        let this = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let user = effective_user(&user, &this.accounts, &this.settings)?;
            let caller = Caller { user, workdir: this.settings.snapshot().default_workdir };
            work(&this, &caller)
        });
        task.await.unwrap_or_else(|_cancelled| Err(FilesystemError::Stopped))
    }
}
