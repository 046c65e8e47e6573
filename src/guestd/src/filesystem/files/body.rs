//! The body of a request as it comes from the wire: in two hands, counted on to keep coming, and hashed on demand.

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::Fuse;
use futures_util::{Stream, StreamExt as _};
use http::{HeaderValue, Version, header};
use tokio::time::{Instant, Sleep};

use super::FilesError;
use super::digest::Hashers;

/// How long a client may send nothing in the middle of its request (envd.md section 12, upload).
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the rest of a body is read that nobody wants any more.
const DRAIN: Duration = Duration::from_secs(10);

/// Makes the body available twice: to the handler, decoded, and to its end, as it comes from the wire.
pub(super) async fn keep_wire_body(request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    let wire = Wire { body: body.into_data_stream().fuse(), patience: None, waiting: false, hashers: None };
    let wire = WireBody(Arc::new(Mutex::new(wire)));
    parts.extensions.insert(wire.clone());
    Request::from_parts(parts, Body::from_stream(wire))
}

/// The request body in two hands: the one that decodes and parses it, and the one that empties it when that has failed.
///
/// A server that answers in the middle of a request and closes sends a reset, and the answer is lost with it: most clients read
/// nothing until they have sent everything.
#[derive(Clone, Debug)]
pub(super) struct WireBody(Arc<Mutex<Wire>>);

#[derive(Debug)]
struct Wire {
    body: Fuse<BodyDataStream>,
    /// Made when the client first keeps the upload waiting.
    patience: Option<Pin<Box<Sleep>>>,
    /// Whether `patience` is running out.
    waiting: bool,
    hashers: Option<Hashers>,
}

/// Why there is no more of the body.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    /// The client went, or its connection did.
    #[error("{0}")]
    BrokenOff(String),
    #[error("the client sent nothing for {} seconds", PATIENCE.as_secs())]
    Idle,
}

impl WireBody {
    fn lock(&self) -> MutexGuard<'_, Wire> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hashes everything that is still to come.
    pub(super) fn hash(&self, hashers: Hashers) {
        self.lock().hashers = Some(hashers);
    }

    /// Reads to the end what a parser left over, and gives back what [`WireBody::hash`] gave.
    ///
    /// # Errors
    ///
    /// Those of the body.
    pub(super) async fn hashed(mut self) -> Result<Option<Hashers>, WireError> {
        while let Some(bytes) = self.next().await {
            bytes?;
        }
        Ok(self.lock().hashers.take())
    }

    /// Answers the request. After a failure its rest is read first.
    pub(super) async fn answer(
        self,
        version: Version,
        result: Result<impl IntoResponse, FilesError>,
    ) -> Response {
        let emptied = match &result {
            Ok(_) => true,
            // Nobody is there to be listened to.
            Err(FilesError::Idle { .. } | FilesError::BodyBroken { .. }) => false,
            Err(_) => self.drain().await,
        };
        let mut response = result.into_response();
        // The rest of this request is in the way of the next one. HTTP/2 ends the one stream, and has no such header.
        if !emptied && version < Version::HTTP_2 {
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Reads the rest, for a while; says whether the connection has come to the end of the request and can take another.
    async fn drain(mut self) -> bool {
        let emptied = async {
            loop {
                match self.next().await {
                    Some(Ok(_)) => {}
                    Some(Err(_)) => return false,
                    None => return true,
                }
            }
        };
        // Whether it ended or the time is up, the answer goes out now.
        tokio::time::timeout(DRAIN, emptied).await.unwrap_or(false)
    }
}

impl Stream for WireBody {
    type Item = Result<Bytes, WireError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut wire = self.lock();
        let wire = &mut *wire;
        let Poll::Ready(next) = wire.body.poll_next_unpin(cx) else {
            // Only the client's silence counts, not the time that the disk takes.
            let patience = wire.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(PATIENCE)));
            if !std::mem::replace(&mut wire.waiting, true) {
                patience.as_mut().reset(Instant::now() + PATIENCE);
            }
            ready!(patience.as_mut().poll(cx));
            return Poll::Ready(Some(Err(WireError::Idle)));
        };
        wire.waiting = false;
        Poll::Ready(next.map(|next| {
            let bytes = next.map_err(|error| WireError::BrokenOff(error.to_string()))?;
            if let Some(hashers) = &mut wire.hashers {
                hashers.update(&bytes);
            }
            Ok(bytes)
        }))
    }
}
