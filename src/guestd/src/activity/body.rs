//! A message body that holds while it is alive, and counts what passes.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use http_body::{Frame, SizeHint};

use super::HoldGuard;

/// Ends its hold when it was sent to its end or dropped.
#[derive(Debug)]
pub(super) struct HeldBody {
    body: Body,
    hold: Option<Arc<HoldGuard>>,
}

impl HeldBody {
    pub(super) fn wrap(body: Body, hold: Arc<HoldGuard>) -> Body {
        Body::new(Self { body, hold: Some(hold) })
    }
}

impl HttpBody for HeldBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(hold), Some(data)) = (&self.hold, frame.data_ref()) {
                    hold.progress(data.len() as u64);
                }
            }
            Some(Err(_)) | None => self.hold = None,
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
