//! Bodies on their way through the proxy: each keeps its request's hold, and ends at once when the sandbox is over.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;

use crate::lifetime::{HostHold, Sandbox};

/// How much of a refused upload is read, and for how long: clients look for an answer when they have sent what they had to send.
const DRAIN_LIMIT: usize = 64 * 1024 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Reads and forgets a request's body, within bounds.
pub(super) async fn drain(mut body: Body) {
    let reading = async {
        let mut read = 0;
        while let Some(Ok(frame)) = body.frame().await {
            read += frame.data_ref().map_or(0, Bytes::len);
            if read > DRAIN_LIMIT {
                break;
            }
        }
    };
    let _slow_client = tokio::time::timeout(DRAIN_TIME, reading).await;
}

/// A body that ends with its sandbox.
pub(super) struct ProxiedBody {
    body: Body,
    hold: Option<Arc<HostHold>>,
    over: BoxFuture<'static, ()>,
    /// The rest of a request is read when nobody wants it any more: an answer that came early would be lost with the connection.
    drain: bool,
}

impl ProxiedBody {
    pub(super) fn request(body: Body, sandbox: &Arc<Sandbox>, hold: Option<Arc<HostHold>>) -> Body {
        Self::wrap(body, sandbox, hold, true)
    }

    pub(super) fn response(body: Body, sandbox: &Arc<Sandbox>, hold: Option<Arc<HostHold>>) -> Body {
        Self::wrap(body, sandbox, hold, false)
    }

    fn wrap(body: Body, sandbox: &Arc<Sandbox>, hold: Option<Arc<HostHold>>, drain: bool) -> Body {
        let sandbox = Arc::clone(sandbox);
        Body::new(Self { body, hold, over: Box::pin(async move { sandbox.over().await }), drain })
    }
}

impl Drop for ProxiedBody {
    fn drop(&mut self) {
        if self.drain && !self.body.is_end_stream() {
            tokio::spawn(drain(std::mem::take(&mut self.body)));
        }
    }
}

impl HttpBody for ProxiedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        // What has come already is delivered first: an answer that was whole when the sandbox ended stays whole.
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            match &frame {
                Some(Ok(frame)) => {
                    if let (Some(hold), Some(data)) = (&self.hold, frame.data_ref()) {
                        hold.progress(data.len() as u64);
                    }
                }
                Some(Err(_)) | None => {
                    self.hold = None;
                    self.drain = false;
                }
            }
            return Poll::Ready(frame);
        }
        ready!(self.over.poll_unpin(cx));
        self.hold = None;
        Poll::Ready(Some(Err(axum::Error::new(std::io::Error::other("the sandbox ended")))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
