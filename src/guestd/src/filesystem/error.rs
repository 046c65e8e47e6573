//! What can go wrong in the filesystem service, and which Connect code says so.
//!
//! The operating system's errors are sorted once, by [`fault`], for both wire protocols: envd calls most of them internal
//! (envd.md section 11, number 15), so that a client could not tell a wrong path from a broken disk.

use std::io;
use std::path::{Path, PathBuf};

use connectrpc::{ConnectError, ErrorCode};

use crate::identity::{IdentityError, PathError, User};

/// A failed operation of the filesystem service; the texts are those of envd.md sections 1.10 and 3.2.
#[derive(Debug, thiserror::Error)]
pub enum FilesystemError {
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("file not found: {}", path.display())]
    FileNotFound { path: PathBuf },
    #[error("path not found: {}", path.display())]
    PathNotFound { path: PathBuf },
    #[error("source file not found: {}", path.display())]
    SourceNotFound { path: PathBuf },
    #[error("path is a cyclic link: {}", path.display())]
    CyclicLink { path: PathBuf },
    #[error("path is not a directory: {}", path.display())]
    NotADirectory { path: PathBuf },
    #[error("directory already exists: {}", path.display())]
    DirectoryExists { path: PathBuf },
    #[error("path already exists, and it is not a directory: {}", path.display())]
    NotADirectoryInTheWay { path: PathBuf },
    #[error("the root directory cannot be removed")]
    Root,
    /// An absent path means the home directory, which nobody loses by leaving a field out.
    #[error("{field}: must not be empty")]
    NoPath { field: &'static str },
    /// The user's own rights do not suffice.
    #[error("user '{user}' may not {action} {}: {source}", path.display())]
    Denied { user: String, action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot act as user '{user}': {source}")]
    Credentials { user: String, source: io::Error },
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// The agent is going down and took the thread that worked on the call with it.
    #[error("the agent is shutting down")]
    Stopped,
}

impl FilesystemError {
    /// For `map_err`: keeps what was being done, and to which path.
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// Says whose rights did not suffice, when that was the trouble.
    pub(super) fn of(self, user: &User) -> Self {
        match self {
            Self::Io { action, path, source } if fault(&source) == Fault::Denied => {
                Self::Denied { user: user.name.clone(), action, path, source }
            }
            error => error,
        }
    }

    /// The Connect code of this failure (contract: envd.md sections 1.8 and 3.2).
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Identity(error) => error.code(),
            Self::Path(PathError::OtherHome | PathError::Nul) => ErrorCode::InvalidArgument,
            Self::FileNotFound { .. } | Self::PathNotFound { .. } | Self::SourceNotFound { .. } => {
                ErrorCode::NotFound
            }
            Self::CyclicLink { .. } => ErrorCode::FailedPrecondition,
            Self::NotADirectory { .. }
            | Self::NotADirectoryInTheWay { .. }
            | Self::Root
            | Self::NoPath { .. } => ErrorCode::InvalidArgument,
            Self::DirectoryExists { .. } => ErrorCode::AlreadyExists,
            Self::Denied { .. } => ErrorCode::PermissionDenied,
            Self::Credentials { .. } => ErrorCode::Internal,
            Self::Io { source, .. } => match fault(source) {
                Fault::NotFound => ErrorCode::NotFound,
                Fault::NotADirectory | Fault::IsADirectory | Fault::Invalid => ErrorCode::InvalidArgument,
                Fault::Denied => ErrorCode::PermissionDenied,
                Fault::Precondition => ErrorCode::FailedPrecondition,
                Fault::NoSpace | Fault::Exhausted => ErrorCode::ResourceExhausted,
                Fault::Other => ErrorCode::Internal,
            },
            Self::Stopped => ErrorCode::Unavailable,
        }
    }
}

impl From<FilesystemError> for ConnectError {
    fn from(error: FilesystemError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// What kind of trouble an error of the operating system is, as far as a client can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    NotFound,
    /// A component of the path is a file.
    NotADirectory,
    IsADirectory,
    /// The request can never work as it is: a name too long, a directory moved into itself, a loop of links.
    Invalid,
    Denied,
    /// It could work if the state of the file system were another one.
    Precondition,
    /// No room for data or for inodes, or above the quota.
    NoSpace,
    /// Some other resource of the machine ran out.
    Exhausted,
    Other,
}

pub(super) fn fault(error: &io::Error) -> Fault {
    match error.raw_os_error() {
        Some(libc::ENOENT) => Fault::NotFound,
        Some(libc::ENOTDIR) => Fault::NotADirectory,
        Some(libc::EISDIR) => Fault::IsADirectory,
        Some(libc::EINVAL | libc::ENAMETOOLONG | libc::ELOOP | libc::ENXIO | libc::ENODEV) => Fault::Invalid,
        Some(libc::EACCES | libc::EPERM) => Fault::Denied,
        Some(
            libc::ENOTEMPTY
            | libc::EEXIST
            | libc::EBUSY
            | libc::ETXTBSY
            | libc::EROFS
            | libc::EXDEV
            | libc::EMLINK,
        ) => Fault::Precondition,
        Some(libc::ENOSPC | libc::EDQUOT) => Fault::NoSpace,
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::EAGAIN | libc::EFBIG) => Fault::Exhausted,
        Some(_) => Fault::Other,
        None => match error.kind() {
            io::ErrorKind::NotFound => Fault::NotFound,
            io::ErrorKind::PermissionDenied => Fault::Denied,
            io::ErrorKind::InvalidInput => Fault::Invalid,
            _ => Fault::Other,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::AccountsError;

    fn path() -> PathBuf {
        "/p".into()
    }

    fn io(errno: i32) -> FilesystemError {
        FilesystemError::io("do", Path::new("/p"))(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn every_failure_has_its_connect_code() {
        use ErrorCode as C;
        use FilesystemError as E;
        let unreadable = AccountsError::Read { path: path(), source: io::Error::other("x") };
        let full = io::Error::from_raw_os_error(libc::EMFILE);
        let exhausted = AccountsError::Read { path: path(), source: full };
        let table = [
            (E::Identity(IdentityError::InvalidUsername { name: "x".into() }), C::Unauthenticated),
            (E::Identity(IdentityError::NoUser), C::Unauthenticated),
            (E::Identity(IdentityError::InvalidDefaultUser { name: "x".into() }), C::Unauthenticated),
            (E::Identity(IdentityError::Accounts(unreadable)), C::Internal),
            (E::Identity(IdentityError::Accounts(exhausted)), C::ResourceExhausted),
            (E::NoPath { field: "path" }, C::InvalidArgument),
            (E::Path(PathError::OtherHome), C::InvalidArgument),
            (E::Path(PathError::Nul), C::InvalidArgument),
            (E::FileNotFound { path: path() }, C::NotFound),
            (E::PathNotFound { path: path() }, C::NotFound),
            (E::SourceNotFound { path: path() }, C::NotFound),
            (E::CyclicLink { path: path() }, C::FailedPrecondition),
            (E::NotADirectory { path: path() }, C::InvalidArgument),
            (E::DirectoryExists { path: path() }, C::AlreadyExists),
            (E::NotADirectoryInTheWay { path: path() }, C::InvalidArgument),
            (E::Root, C::InvalidArgument),
            (E::Stopped, C::Unavailable),
            (io(libc::ENOENT), C::NotFound),
            (io(libc::ENOTDIR), C::InvalidArgument),
            (io(libc::EISDIR), C::InvalidArgument),
            (io(libc::ENAMETOOLONG), C::InvalidArgument),
            (io(libc::ELOOP), C::InvalidArgument),
            (io(libc::EACCES), C::PermissionDenied),
            (io(libc::EPERM), C::PermissionDenied),
            (io(libc::ENOTEMPTY), C::FailedPrecondition),
            (io(libc::EROFS), C::FailedPrecondition),
            (io(libc::EBUSY), C::FailedPrecondition),
            (io(libc::ENOSPC), C::ResourceExhausted),
            (io(libc::EDQUOT), C::ResourceExhausted),
            (io(libc::EMFILE), C::ResourceExhausted),
            (io(libc::EIO), C::Internal),
            (E::Io { action: "do", path: path(), source: io::Error::other("odd") }, C::Internal),
        ];
        for (error, code) in table {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn a_failure_names_the_path_and_the_cause() {
        assert_eq!(io(libc::EACCES).to_string(), "cannot do /p: Permission denied (os error 13)");
        let error = FilesystemError::NotADirectory { path: path() };
        assert_eq!(error.to_string(), "path is not a directory: /p");
    }
}
