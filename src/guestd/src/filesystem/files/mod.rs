//! `/files`: contents in and out over plain HTTP (contract: envd.md sections 4.5 and 4.6).
//!
//! Owns the two handlers, their query and their errors. The access token and the signature are checked by the middleware in front;
//! the user comes from the query and not from a Basic header. [`download`] and [`upload`] are the handlers, [`content`] opens for
//! reading, [`destination`] for writing, [`negotiation`] chooses the encoding, [`multipart`] and [`metadata`] read requests.

mod content;
mod destination;
mod download;
mod head;
mod metadata;
mod multipart;
mod negotiation;
#[cfg(test)]
mod tests;
mod upload;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::middleware::map_request;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{HeaderValue, StatusCode, header};
use tower_http::decompression::RequestDecompressionLayer;

use super::error::{Fault, fault};
use super::{Caller, Filesystem};
use crate::identity::{AccountsError, PathError};

pub(super) use metadata::MetadataError;

/// The routes of this folder, for merging into the agent's router: `GET` and `POST /files`, bodies of any size.
///
/// `HEAD` stays 405, as it is in envd: a middleware that guards the two methods by name must not be passed by a third one.
pub fn routes(filesystem: Arc<Filesystem>) -> axum::Router {
    let files = get(download::download).post(upload::upload).head(async || StatusCode::METHOD_NOT_ALLOWED);
    axum::Router::new()
        .route("/files", files)
        .layer(DefaultBodyLimit::disable())
        // Removes the header of what it decodes; the upload refuses a request that still has one.
        .layer(RequestDecompressionLayer::new().pass_through_unaccepted(true))
        .layer(map_request(upload::keep_wire_body))
        .with_state(filesystem)
}

/// The query of both methods. The signature's fields belong to the middleware.
#[derive(Debug, serde::Deserialize)]
struct FilesQuery {
    path: Option<String>,
    username: Option<String>,
}

impl FilesQuery {
    /// An empty parameter is an absent one, as SDKs that build their queries from optional values send it.
    fn path(&self) -> Option<&str> {
        self.path.as_deref().filter(|path| !path.is_empty())
    }

    fn username(&self) -> Option<&str> {
        self.username.as_deref().filter(|name| !name.is_empty())
    }
}

impl Filesystem {
    /// Blocking: reads the account files.
    fn files_caller(&self, username: Option<&str>) -> Result<Caller, FilesError> {
        let values = self.settings.snapshot();
        let name = username.unwrap_or(&values.default_user);
        let user =
            self.accounts.user(name).map_err(|source| FilesError::User { name: name.to_owned(), source })?;
        Ok(Caller { user, workdir: values.default_workdir })
    }
}

/// A failed transfer; the texts are those of envd.md sections 4.5 and 4.6.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    #[error("error looking up user '{name}': {source}")]
    User { name: String, source: AccountsError },
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
    #[error("not enough inodes available")]
    NoInodes,
    #[error(
        "attempted to write {attempted} bytes: not enough disk space available ({written} bytes were written)"
    )]
    NoSpace { attempted: u64, written: u64 },
    #[error("not enough space for file metadata")]
    NoSpaceForMetadata,
    #[error("cannot {action} '{}': {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// The agent is going down and took the thread that worked on the transfer with it.
    #[error("the agent is shutting down")]
    Stopped,
}

impl FilesError {
    /// For `map_err`: keeps what was being done, and to which path.
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    /// The HTTP status of this failure.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::User { source: AccountsError::UnknownUser { .. }, .. } => StatusCode::UNAUTHORIZED,
            Self::User { source: AccountsError::Read { .. }, .. } => StatusCode::INTERNAL_SERVER_ERROR,
            Self::NotFound { .. } => StatusCode::NOT_FOUND,
            Self::NotAcceptable => StatusCode::NOT_ACCEPTABLE,
            Self::Path(_)
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
            | Self::Metadata(_) => StatusCode::BAD_REQUEST,
            Self::NoInodes | Self::NoSpace { .. } | Self::NoSpaceForMetadata => {
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
        let body = serde_json::json!({ "code": status.as_u16(), "message": self.to_string() });
        let nosniff = [(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"))];
        (status, nosniff, axum::Json(body)).into_response()
    }
}

/// Runs file work on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FilesError> + Send + 'static,
) -> Result<T, FilesError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_cancelled| Err(FilesError::Stopped))
}
