//! What can go wrong in a transfer, and which HTTP status says so.

use std::io;
use std::path::{Path, PathBuf};

use axum::response::{IntoResponse, Response};
use guestd_protocol::files_query::FilesQueryError;
use http::{HeaderValue, StatusCode, header};

use super::digest::DigestError;
use super::metadata::MetadataError;
use crate::filesystem::error::{Fault, fault};
use crate::identity::{AccountsError, PathError, User};

/// A failed transfer; the texts are those of envd.md sections 4.5 and 4.6.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("error looking up user '{name}': {source}")]
    User { name: String, source: AccountsError },
    #[error(transparent)]
    Query(#[from] FilesQueryError),
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("path '{}' does not exist", path.display())]
    NotFound { path: PathBuf },
    #[error("path '{}' is a directory", path.display())]
    IsDirectory { path: PathBuf },
    /// A pipe, a socket or a device: transferring it could block for ever or change the machine.
    #[error("path '{}' is not a regular file", path.display())]
    NotRegular { path: PathBuf },
    #[error(
        "no acceptable encoding: both gzip and identity are refused, or a range or a condition needs identity"
    )]
    NotAcceptable,
    #[error("unsupported content type: {content_type}")]
    ContentType { content_type: String },
    #[error("unsupported content encoding: {encoding}")]
    ContentEncoding { encoding: String },
    #[error("the body is not valid gzip: {message}")]
    BadGzip { message: String },
    #[error("the request body broke off: {message}")]
    BodyBroken { message: String },
    #[error("malformed multipart body: {message}")]
    Multipart { message: String },
    #[error("an upload of application/octet-stream needs the query parameter 'path'")]
    MissingPath,
    #[error("a part named 'file' has no filename, and the query has no 'path'")]
    MissingFileName,
    #[error("path '{}' is given twice in one upload", path.display())]
    SamePath { path: PathBuf },
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    DigestHeader(#[from] DigestError),
    #[error("the {field} of the request is {expected}, and what arrived has {actual}; {consequence}")]
    Digest { field: &'static str, expected: String, actual: String, consequence: &'static str },
    #[error("header 'Guestd-Replace' is '{value}', and the only value that it can have is 'atomic'")]
    ReplaceMode { value: String },
    #[error("more than {limit} files in one upload that replaces atomically")]
    TooManyStaged { limit: usize },
    #[error("the upload stalled: {message}")]
    Idle { message: String },
    #[error("malformed JSON: {message}")]
    Json { message: String },
    #[error("the request is larger than {limit} bytes")]
    TooLarge { limit: usize },
    #[error("'source_paths' is empty")]
    NoSources,
    #[error("'destination' is missing")]
    NoDestination,
    #[error("source and destination are the same file: '{}'", path.display())]
    SourceIsDestination { path: PathBuf },
    /// Somebody else is at work in the same place.
    #[error("path '{}' became another file during the call", path.display())]
    Changed { path: PathBuf },
    #[error("not enough inodes available")]
    NoInodes,
    #[error(
        "attempted to write {attempted} bytes: not enough disk space available ({written} bytes were written)"
    )]
    NoSpace { attempted: u64, written: u64 },
    #[error("not enough space for file metadata")]
    NoSpaceForMetadata { written: u64 },
    /// The user's own rights do not suffice.
    #[error("user '{user}' may not {action} '{}': {source}", path.display())]
    Denied { user: String, action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot act as user '{user}': {source}")]
    Credentials { user: String, source: io::Error },
    #[error("the kernel has no random numbers yet")]
    NoRandom,
    #[error("cannot {action} '{}': {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// The agent is going down and took the thread that worked on the transfer with it.
    #[error("the agent is shutting down")]
    Stopped,
}

impl FilesError {
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

    /// How much of the file was written when the disk was full, in bytes.
    fn written(&self) -> Option<u64> {
        match self {
            Self::NoInodes => Some(0),
            Self::NoSpace { written, .. } | Self::NoSpaceForMetadata { written } => Some(*written),
            _ => None,
        }
    }

    /// The HTTP status of this failure.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::User { source: AccountsError::UnknownUser { .. }, .. } => StatusCode::UNAUTHORIZED,
            Self::User { source, .. } if source.is_exhaustion() => StatusCode::SERVICE_UNAVAILABLE,
            Self::User { source: AccountsError::Read { .. }, .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Self::Query(_)
            | Self::Path(_)
            | Self::IsDirectory { .. }
            | Self::NotRegular { .. }
            | Self::ContentType { .. }
            | Self::ContentEncoding { .. }
            | Self::BadGzip { .. }
            | Self::BodyBroken { .. }
            | Self::Multipart { .. }
            | Self::MissingPath
            | Self::MissingFileName
            | Self::SamePath { .. }
            | Self::Metadata(_)
            | Self::DigestHeader(_)
            | Self::Digest { .. }
            | Self::ReplaceMode { .. }
            | Self::TooManyStaged { .. }
            | Self::Json { .. }
            | Self::NoSources
            | Self::NoDestination
            | Self::SourceIsDestination { .. } => StatusCode::BAD_REQUEST,
            Self::Idle { .. } => StatusCode::REQUEST_TIMEOUT,
            Self::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Changed { .. } => StatusCode::CONFLICT,
            Self::Denied { .. } => StatusCode::FORBIDDEN,
            Self::Credentials { .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NoRandom => StatusCode::SERVICE_UNAVAILABLE,
            Self::NoInodes | Self::NoSpace { .. } | Self::NoSpaceForMetadata { .. } => {
                StatusCode::INSUFFICIENT_STORAGE
            }
            Self::Io { source, .. } => match fault(source) {
                Fault::NotFound => StatusCode::NOT_FOUND,
                Fault::NotADirectory | Fault::IsADirectory | Fault::Invalid => StatusCode::BAD_REQUEST,
                Fault::Denied => StatusCode::FORBIDDEN,
                Fault::Precondition => StatusCode::CONFLICT,
                Fault::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
                Fault::Exhausted => StatusCode::SERVICE_UNAVAILABLE,
                Fault::Other => StatusCode::INTERNAL_SERVER_ERROR,
            },
            Self::Stopped => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

impl IntoResponse for FilesError {
    fn into_response(self) -> Response {
        let status = self.status();
        if let Self::Query(error) = &self {
            // In front of the handlers this is told in plain text as well (contract: envd.md section 4).
            return (status, error.to_string()).into_response();
        }
        let mut body = serde_json::json!({ "code": status.as_u16(), "message": self.to_string() });
        if let Some(written) = self.written() {
            body["written"] = written.into();
        }
        let nosniff = [(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
        // A cache must not give this refusal to a client that accepts more.
        let vary = matches!(self, Self::NotAcceptable).then_some(("vary", "Accept-Encoding"));
        (status, nosniff, vary.map(|vary| [vary]), axum::Json(body)).into_response()
    }
}
