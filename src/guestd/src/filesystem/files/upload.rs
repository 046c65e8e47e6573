//! `POST /files` (contract: envd.md section 4.6).

use std::collections::{BTreeMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::BoxError;
use axum::body::{Body, BodyDataStream};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest as _, Multipart, Request, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::StreamExt as _;
use guestd_protocol::files_query::FilesQuery;
use http::{HeaderMap, header};
use serde::Serialize;

use super::body::{WireBody, WireError};
use super::destination::{Destination, Replace};
use super::digest::{self, Hashers};
use super::multipart::{Disposition, Paced, TooMuchHeld, as_form_data, is_multipart};
use super::staged::Staged;
use super::{FilesError, Filesystem, as_user, as_user_at, blocking, metadata};
use crate::filesystem::Caller;

/// How the files of an upload take their places; additive to envd's protocol.
const REPLACE: &str = "guestd-replace";
/// How many files one request may replace at once: each is open until its end.
const MOST_STAGED: usize = 100;
/// How long the end of a multipart body may take once its last boundary was there.
const EPILOGUE: Duration = Duration::from_secs(60);

/// One file of the answer.
#[derive(Debug, Serialize)]
struct Uploaded {
    path: String,
    name: String,
    r#type: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: BTreeMap<String, String>,
}

/// Writes the files of one request and answers with what it wrote.
///
/// # Errors
///
/// Those of envd.md section 4.6, in the JSON form; see [`FilesError::status`]. Files before the failing one stay.
pub(super) async fn upload(State(filesystem): State<Arc<Filesystem>>, request: Request) -> Response {
    let (mut parts, body) = request.into_parts();
    let wire = parts.extensions.remove::<WireBody>();
    let Some(wire) = wire else { return FilesError::Stopped.into_response() };
    let version = parts.version;
    let result = receive(&filesystem, parts, body.into_data_stream(), &wire).await;
    wire.answer(version, result.map(axum::Json)).await
}

async fn receive(
    filesystem: &Arc<Filesystem>,
    mut parts: http::request::Parts,
    body: BodyDataStream,
    wire: &WireBody,
) -> Result<Vec<Uploaded>, FilesError> {
    let query = FilesQuery::parse(parts.uri.query().unwrap_or_default())?;
    let path = query.path().map(OsStr::from_bytes);
    let metadata = Arc::new(metadata::parse(&parts.headers)?);
    let replace = replace(&parts.headers)?;
    let digests = digest::expected(&parts.headers)?;
    refuse_encodings(&parts.headers)?;
    if !digests.is_empty() {
        wire.hash(Hashers::new(&digests));
    }
    let (filesystem, username) = (Arc::clone(filesystem), query.username().map(str::to_owned));
    let caller = Arc::new(blocking(move || filesystem.files_caller(username.as_deref())).await?);
    let mut upload =
        Upload { caller, metadata, replace, seen: HashSet::new(), staged: Vec::new(), uploaded: Vec::new() };
    let content_type =
        parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/octet-stream" {
        upload.octet_stream(path.ok_or(FilesError::MissingPath)?, body).await?;
    } else if is_multipart(&essence) {
        as_form_data(&mut parts.headers);
        upload.multipart(path, parts, body).await?;
    } else {
        return Err(FilesError::ContentType { content_type: content_type.to_owned() });
    }
    if !digests.is_empty() {
        let hashers = wire.clone().hashed().await.map_err(|error| broken(&error))?;
        if let Some((expected, actual)) = hashers.and_then(|hashers| hashers.mismatch(digests)) {
            return Err(FilesError::Digest {
                field: expected.field,
                expected: expected.value.to_string(),
                actual: actual.to_string(),
                consequence: match replace {
                    Replace::InPlace => "it is written all the same, because the upload was in place",
                    Replace::Atomic => "nothing was replaced",
                },
            });
        }
    }
    upload.commit().await
}

/// `Guestd-Replace: atomic`, or nothing for in place.
fn replace(headers: &HeaderMap) -> Result<Replace, FilesError> {
    let mut values = headers.get_all(REPLACE).iter();
    match (values.next().map(|value| value.as_bytes()), values.next()) {
        (None, _) => Ok(Replace::InPlace),
        (Some(b"atomic"), None) => Ok(Replace::Atomic),
        (Some(value), _) => {
            Err(FilesError::ReplaceMode { value: String::from_utf8_lossy(value).into_owned() })
        }
    }
}

/// Gzip has been decoded on the way here, and its header removed.
fn refuse_encodings(headers: &HeaderMap) -> Result<(), FilesError> {
    let encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    for encoding in encodings.map(|value| String::from_utf8_lossy(value.as_bytes())) {
        if !encoding.trim().is_empty() && !encoding.trim().eq_ignore_ascii_case("identity") {
            return Err(FilesError::ContentEncoding { encoding: encoding.into_owned() });
        }
    }
    Ok(())
}

/// The files of one request.
struct Upload {
    caller: Arc<Caller>,
    metadata: Arc<BTreeMap<String, String>>,
    replace: Replace,
    seen: HashSet<PathBuf>,
    /// What waits for the end of the request, so that a request that fails replaces nothing.
    staged: Vec<Staged>,
    uploaded: Vec<Uploaded>,
}

impl Upload {
    async fn octet_stream(&mut self, path: &OsStr, mut body: BodyDataStream) -> Result<(), FilesError> {
        // The first bytes tell whether it is gzip at all, before the file is touched.
        let mut next = body.next().await.transpose().map_err(body_error)?;
        let mut file = self.open(path).await?;
        while let Some(bytes) = next {
            file.write(bytes).await?;
            next = body.next().await.transpose().map_err(body_error)?;
        }
        self.finish(file).await
    }

    async fn multipart(
        &mut self,
        path: Option<&OsStr>,
        parts: http::request::Parts,
        body: BodyDataStream,
    ) -> Result<(), FilesError> {
        let body = Paced::new(body);
        let request = Request::from_parts(parts, Body::from_stream(body.clone()));
        let malformed = |message: String| FilesError::Multipart { message };
        let mut multipart =
            Multipart::from_request(request, &()).await.map_err(|error| malformed(error.body_text()))?;
        while let Some(mut field) = multipart.next_field().await.map_err(multipart_error)? {
            body.release();
            let disposition = Disposition::of(field.headers());
            if disposition.name.as_deref() == Some(b"file") {
                let path = path
                    .map(OsStr::to_owned)
                    .or(disposition.file_name.map(OsString::from_vec))
                    .filter(|path| !path.is_empty());
                let mut file = self.open(&path.ok_or(FilesError::MissingFileName)?).await?;
                while let Some(bytes) = chunk(&mut field, &body).await? {
                    file.write(bytes).await?;
                }
                self.finish(file).await?;
            } else {
                while chunk(&mut field, &body).await?.is_some() {}
            }
        }
        drop(multipart);
        let finished = tokio::time::timeout(EPILOGUE, body.finish()).await;
        finished
            .map_err(|_elapsed| FilesError::Idle {
                message: format!("it did not end within {} seconds of its last boundary", EPILOGUE.as_secs()),
            })?
            .map_err(body_error)
    }

    async fn open(&mut self, path: &OsStr) -> Result<OpenFile, FilesError> {
        let path = self.caller.resolve(path)?;
        if !self.seen.insert(path.clone()) {
            return Err(FilesError::SamePath { path });
        }
        if self.replace == Replace::Atomic && self.seen.len() > MOST_STAGED {
            return Err(FilesError::TooManyStaged { limit: MOST_STAGED });
        }
        let replace = self.replace;
        let destination = as_user_at(&self.caller, path.clone(), move |caller, path| {
            Destination::open(caller, path, replace)
        })
        .await?;
        Ok(OpenFile { path, destination })
    }

    async fn finish(&mut self, file: OpenFile) -> Result<(), FilesError> {
        self.staged.extend(file.destination.finish(Arc::clone(&self.metadata)).await?);
        self.uploaded.push(Uploaded {
            name: file.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            path: file.path.to_string_lossy().into_owned(),
            r#type: "file",
            metadata: self.metadata.as_ref().clone(),
        });
        Ok(())
    }

    /// Puts what was staged in its place.
    async fn commit(self) -> Result<Vec<Uploaded>, FilesError> {
        for staged in self.staged {
            let metadata = Arc::clone(&self.metadata);
            as_user(&self.caller, move |_| staged.commit(&metadata)).await?;
        }
        Ok(self.uploaded)
    }
}

struct OpenFile {
    path: PathBuf,
    destination: Destination,
}

impl OpenFile {
    async fn write(&mut self, bytes: Bytes) -> Result<(), FilesError> {
        self.destination.write(bytes).await
    }
}

async fn chunk(field: &mut Field<'_>, body: &Paced<BodyDataStream>) -> Result<Option<Bytes>, FilesError> {
    let chunk = field.chunk().await.map_err(multipart_error)?;
    body.release();
    Ok(chunk)
}

/// The body's own error, which the parser passes on, or the parser's.
fn multipart_error(error: MultipartError) -> FilesError {
    match cause_of(&error) {
        Some(cause) => cause,
        None => FilesError::Multipart { message: error.body_text() },
    }
}

pub(super) fn body_error(error: impl Into<BoxError>) -> FilesError {
    let error = error.into();
    cause_of(error.as_ref()).unwrap_or_else(|| FilesError::BodyBroken { message: error.to_string() })
}

fn broken(error: &WireError) -> FilesError {
    let message = error.to_string();
    match error {
        WireError::BrokenOff(_) => FilesError::BodyBroken { message },
        WireError::Idle => FilesError::Idle { message },
    }
}

/// What was wrong with the body, when the body is what was wrong: the connection's failures are marked where the body comes in,
/// and the decoder's are those of std.
fn cause_of(error: &(dyn std::error::Error + 'static)) -> Option<FilesError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let message = error.to_string();
        if error.is::<TooMuchHeld>() {
            return Some(FilesError::Multipart { message });
        } else if let Some(error) = error.downcast_ref::<WireError>() {
            return Some(broken(error));
        } else if error.is::<std::io::Error>() {
            return Some(FilesError::BadGzip { message });
        }
        cause = error.source();
    }
    None
}
