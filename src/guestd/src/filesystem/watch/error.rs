//! What can go wrong with a watch, and which Connect code says so (contract: envd.md section 1.10).

use std::io;
use std::path::{Path, PathBuf};

use connectrpc::{ConnectError, ErrorCode};

use super::{DIRECTORY_LIMIT, WATCHER_LIMIT};
use crate::filesystem::FilesystemError;

/// A watch that cannot be had, or a watcher that cannot answer.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    #[error("path {} not found", path.display())]
    NotFound { path: PathBuf },
    #[error("path {} not a directory", path.display())]
    NotADirectory { path: PathBuf },
    #[error("cannot watch path on network filesystem: {}", path.display())]
    Network { path: PathBuf },
    #[error("watcher with id {id} not found")]
    UnknownWatcher { id: String },
    /// Told once; the watcher lives on.
    #[error("events were lost: {reason}; list the directory to see what is there now")]
    Lost { reason: String },
    #[error("too many watchers: {WATCHER_LIMIT} are open; remove one first")]
    TooManyWatchers,
    #[error(
        "cannot watch all of {}: one watcher holds at most {DIRECTORY_LIMIT} directories, {} levels deep",
        path.display(),
        super::DEPTH_LIMIT
    )]
    TooLarge { path: PathBuf },
    /// inotify_add_watch(2) says ENOSPC.
    #[error("no inotify watch is left for {}: the limit fs.inotify.max_user_watches is reached", path.display())]
    NoWatches { path: PathBuf },
    /// inotify_init1(2) says EMFILE or ENFILE.
    #[error(
        "no inotify instance is left: the limit fs.inotify.max_user_instances or that of open files is reached"
    )]
    NoInstances,
}

impl WatchError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        FilesystemError::io("watch", path)(source).into()
    }

    /// The operating system's error, where that is all there is to say.
    pub(super) fn source_error(&self) -> Option<&io::Error> {
        match self {
            Self::Filesystem(FilesystemError::Io { source, .. }) => Some(source),
            _ => None,
        }
    }

    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Filesystem(error) => error.code(),
            Self::NotFound { .. } | Self::UnknownWatcher { .. } => ErrorCode::NotFound,
            Self::NotADirectory { .. } | Self::Network { .. } => ErrorCode::InvalidArgument,
            Self::Lost { .. } => ErrorCode::Internal,
            Self::TooManyWatchers | Self::TooLarge { .. } | Self::NoWatches { .. } | Self::NoInstances => {
                ErrorCode::ResourceExhausted
            }
        }
    }
}

impl From<WatchError> for ConnectError {
    fn from(error: WatchError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}
