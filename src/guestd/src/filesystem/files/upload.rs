//! `POST /files` (contract: envd.md section 4.6).

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::multipart::{Field, MultipartError};
use axum::extract::{FromRequest as _, Multipart, Query, Request, State};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::stream::Fuse;
use futures_util::{Stream, StreamExt as _};
use http::{HeaderMap, header};
use serde::Serialize;

use super::destination::Destination;
use super::multipart::{Disposition, Held, Paced, TooMuchHeld, as_form_data, is_multipart};
use super::{FilesError, FilesQuery, Filesystem, blocking, metadata};
use crate::filesystem::Caller;

/// How long the rest of a body is read that nobody wants any more.
const DRAIN: Duration = Duration::from_secs(10);

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
pub(super) async fn upload(
    State(filesystem): State<Arc<Filesystem>>,
    Query(query): Query<FilesQuery>,
    request: Request,
) -> Result<Response, FilesError> {
    let (mut parts, body) = request.into_parts();
    let wire = parts.extensions.remove::<WireBody>();
    let result = receive(&filesystem, &query, parts, body.into_data_stream()).await;
    if let (Err(_), Some(wire)) = (&result, wire) {
        wire.drain().await;
    }
    result.map(|uploaded| axum::Json(uploaded).into_response())
}

async fn receive(
    filesystem: &Arc<Filesystem>,
    query: &FilesQuery,
    mut parts: http::request::Parts,
    body: BodyDataStream,
) -> Result<Vec<Uploaded>, FilesError> {
    let metadata = Arc::new(metadata::parse(&parts.headers)?);
    refuse_encodings(&parts.headers)?;
    let (filesystem, username) = (Arc::clone(filesystem), query.username().map(str::to_owned));
    let caller = Arc::new(blocking(move || filesystem.files_caller(username.as_deref())).await?);
    let mut upload = Upload { caller, metadata, seen: HashSet::new(), uploaded: Vec::new() };
    let content_type =
        parts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/octet-stream" {
        upload.octet_stream(query.path().ok_or(FilesError::MissingPath)?, body).await?;
    } else if is_multipart(&essence) {
        as_form_data(&mut parts.headers);
        upload.multipart(query.path(), parts, body).await?;
    } else {
        return Err(FilesError::ContentType { content_type: content_type.to_owned() });
    }
    Ok(upload.uploaded)
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
    seen: HashSet<PathBuf>,
    uploaded: Vec<Uploaded>,
}

impl Upload {
    async fn octet_stream(&mut self, path: &str, mut body: BodyDataStream) -> Result<(), FilesError> {
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
        path: Option<&str>,
        parts: http::request::Parts,
        body: BodyDataStream,
    ) -> Result<(), FilesError> {
        let held = Held::default();
        let body = Body::from_stream(Paced::new(body, held.clone()));
        let request = Request::from_parts(parts, body);
        let malformed = |message: String| FilesError::Multipart { message };
        let mut multipart =
            Multipart::from_request(request, &()).await.map_err(|error| malformed(error.body_text()))?;
        while let Some(mut field) = multipart.next_field().await.map_err(multipart_error)? {
            held.release();
            let disposition = Disposition::of(field.headers());
            if disposition.name.as_deref() == Some("file") {
                let path = path.map(str::to_owned).or(disposition.file_name).filter(|path| !path.is_empty());
                let mut file = self.open(&path.ok_or(FilesError::MissingFileName)?).await?;
                while let Some(bytes) = chunk(&mut field, &held).await? {
                    file.write(bytes).await?;
                }
                self.finish(file).await?;
            } else {
                while chunk(&mut field, &held).await?.is_some() {}
            }
        }
        Ok(())
    }

    async fn open(&mut self, path: &str) -> Result<OpenFile, FilesError> {
        let path = self.caller.resolve(path)?;
        if !self.seen.insert(path.clone()) {
            return Err(FilesError::SamePath { path });
        }
        let caller = Arc::clone(&self.caller);
        blocking(move || {
            let destination = Destination::open(&path, caller.owner())?;
            Ok(OpenFile { path, destination })
        })
        .await
    }

    async fn finish(&mut self, file: OpenFile) -> Result<(), FilesError> {
        file.destination.finish(Arc::clone(&self.metadata)).await?;
        self.uploaded.push(Uploaded {
            name: file.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            path: file.path.to_string_lossy().into_owned(),
            r#type: "file",
            metadata: self.metadata.as_ref().clone(),
        });
        Ok(())
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

async fn chunk(field: &mut Field<'_>, held: &Held) -> Result<Option<Bytes>, FilesError> {
    let chunk = field.chunk().await.map_err(multipart_error)?;
    held.release();
    Ok(chunk)
}

/// The body's own error, which the parser passes on, or the parser's.
fn multipart_error(error: MultipartError) -> FilesError {
    match cause_of(&error) {
        Some(cause) => cause,
        None => FilesError::Multipart { message: error.body_text() },
    }
}

fn body_error(error: axum::Error) -> FilesError {
    cause_of(&error).unwrap_or_else(|| FilesError::BodyBroken { message: error.to_string() })
}

/// What was wrong with the body, when the body is what was wrong: the connection's failures are marked where the body comes in,
/// and the decoder's are those of std.
fn cause_of(error: &(dyn std::error::Error + 'static)) -> Option<FilesError> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let message = error.to_string();
        if error.is::<TooMuchHeld>() {
            return Some(FilesError::Multipart { message });
        } else if error.is::<BrokenOff>() {
            return Some(FilesError::BodyBroken { message });
        } else if error.is::<std::io::Error>() {
            return Some(FilesError::BadGzip { message });
        }
        cause = error.source();
    }
    None
}

/// Makes the body available twice: to the upload, decoded, and to its end, as it comes from the wire.
pub(super) async fn keep_wire_body(request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    let wire = WireBody(Arc::new(Mutex::new(body.into_data_stream().fuse())));
    parts.extensions.insert(wire.clone());
    Request::from_parts(parts, Body::from_stream(wire))
}

/// The request body in two hands: the one that decodes and parses it, and the one that empties it when that has failed.
///
/// A server that answers in the middle of a request and closes sends a reset, and the answer is lost with it: most clients read
/// nothing until they have sent everything.
#[derive(Clone, Debug)]
struct WireBody(Arc<Mutex<Fuse<BodyDataStream>>>);

impl WireBody {
    /// Reads the rest, for a while.
    async fn drain(mut self) {
        let emptied = async { while let Some(Ok(_)) = self.next().await {} };
        // Whether it ended or the time is up, the answer goes out now.
        let _ = tokio::time::timeout(DRAIN, emptied).await;
    }
}

impl Stream for WireBody {
    type Item = Result<Bytes, BrokenOff>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut body = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body.poll_next_unpin(cx).map_err(|error| BrokenOff(error.to_string()))
    }
}

/// The client went, or its connection did.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BrokenOff(String);
