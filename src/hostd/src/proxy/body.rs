//! Bodies on their way through the proxy: each keeps its request's hold, and ends at once when the sandbox is over.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body::{Frame, SizeHint};

use crate::lifetime::{HostHold, Sandbox};

/// A body that ends with its sandbox.
pub(super) struct ProxiedBody {
    body: Body,
    hold: Option<Arc<HostHold>>,
    over: BoxFuture<'static, ()>,
}

impl ProxiedBody {
    pub(super) fn wrap(body: Body, sandbox: &Arc<Sandbox>, hold: Option<Arc<HostHold>>) -> Body {
        let sandbox = Arc::clone(sandbox);
        Body::new(Self { body, hold, over: Box::pin(async move { sandbox.over().await }) })
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
                Some(Err(_)) | None => self.hold = None,
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
