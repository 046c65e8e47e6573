//! `/files`: contents in and out over plain HTTP (contract: envd.md sections 4.5 to 4.7).
//!
//! Owns the handlers, their query and their errors. The access token and the signature are checked by the middleware in front;
//! the user comes from the query and not from a Basic header. [`download`], [`upload`] and [`compose`] are the handlers, [`content`]
//! opens for reading, [`destination`] for writing in place and [`staged`] for replacing at once, [`negotiation`] chooses the encoding,
//! [`body`], [`gzip`], [`multipart`], [`digest`] and [`metadata`] read requests, [`error`] says what went wrong.

mod body;
mod compose;
mod content;
mod destination;
mod digest;
mod download;
mod error;
mod gzip;
mod head;
mod metadata;
mod multipart;
mod negotiation;
mod reader;
mod staged;
#[cfg(test)]
mod tests;
mod upload;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::DefaultBodyLimit;
use axum::middleware::map_request;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use http::{StatusCode, header};

use super::{Caller, Filesystem};

pub use digest::expected_sha256;
pub use error::FilesError;

/// The routes of this folder, for merging into the agent's router: `GET` and `POST /files` with bodies of any size, and
/// `POST /files/compose`.
///
/// `HEAD` stays 405, as it is in envd: a middleware that guards the two methods by name must not be passed by a third one.
pub fn routes(filesystem: Arc<Filesystem>) -> axum::Router {
    let files = get(download::download).post(upload::upload).head(not_allowed).fallback(not_allowed);
    axum::Router::new()
        .route("/files", files)
        .route("/files/compose", post(compose::compose))
        .layer(DefaultBodyLimit::disable())
        // Removes the header of what it decodes; the upload refuses a request that still has one.
        .layer(map_request(gzip::decode))
        .layer(map_request(body::keep_wire_body))
        .with_state(filesystem)
}

async fn not_allowed() -> impl IntoResponse {
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, "GET, POST")])
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

impl Caller {
    /// Runs file work of `/files` as the user.
    fn files_work<T>(&self, work: impl FnOnce() -> Result<T, FilesError>) -> Result<T, FilesError> {
        let _acting =
            self.act().map_err(|source| FilesError::Credentials { user: self.user.name.clone(), source })?;
        work().map_err(|error| error.of(&self.user))
    }
}

/// Runs file work on a blocking thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FilesError> + Send + 'static,
) -> Result<T, FilesError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_cancelled| Err(FilesError::Stopped))
}

/// Runs file work on a blocking thread, as the caller's user.
async fn as_user<T: Send + 'static>(
    caller: &Arc<Caller>,
    work: impl FnOnce(&Arc<Caller>) -> Result<T, FilesError> + Send + 'static,
) -> Result<T, FilesError> {
    let caller = Arc::clone(caller);
    blocking(move || caller.files_work(|| work(&caller))).await
}

/// As [`as_user`], for work that makes something at `path`.
async fn as_user_at<T: Send + 'static>(
    caller: &Arc<Caller>,
    path: PathBuf,
    work: impl FnOnce(&Arc<Caller>, &Path) -> Result<T, FilesError> + Send + 'static,
) -> Result<T, FilesError> {
    let caller = Arc::clone(caller);
    blocking(move || {
        caller.prepare_home(&path);
        caller.files_work(|| work(&caller, &path))
    })
    .await
}
