//! Answers of streams in envelopes of our own (contract: envd.md section 2.2).
//!
//! `connectrpc` (0.9.1) gathers what a stream sends in a buffer that lives as long as the stream: with 2,000 clients of processes that said
//! 8 KiB once, 22 MiB. So a service whose streams are many and long may leave its messages in the request's [`Outlet`] and answer with an
//! empty stream: the answer's head is `connectrpc`'s, its body [`Envelopes`], which keeps nothing while there is nothing to say.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use axum::http::{HeaderMap, header};
use bytes::{BufMut, Bytes, BytesMut};
use connectrpc::{CodecFormat, ConnectError, EncodedBody, RequestContext};
use futures_util::Stream;
use http_body::{Body, Frame};

/// The messages of an answer, each encoded.
pub type Messages = Pin<Box<dyn Stream<Item = Result<EncodedBody, ConnectError>> + Send>>;

/// Flags of an envelope that ends a stream.
const END: u8 = 2;

/// The length of an envelope's head.
const HEAD: usize = 5;

/// From this size on a message is passed on as it is, behind its envelope's head; smaller ones are put together.
const LARGE: usize = 16 * 1024;

/// Where the service that answers a request may leave its messages.
#[derive(Clone)]
pub struct Outlet {
    codec: CodecFormat,
    left: Arc<Mutex<Option<Messages>>>,
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet").field("codec", &self.codec).finish_non_exhaustive()
    }
}

impl Outlet {
    /// For who speaks plain Connect: gRPC has envelopes of its own, and what is to be compressed goes the usual way.
    pub(super) fn new(headers: &HeaderMap) -> Option<Self> {
        let codec = match headers.get(header::CONTENT_TYPE)?.as_bytes() {
            b"application/connect+json" => CodecFormat::Json,
            b"application/connect+proto" => CodecFormat::Proto,
            _ => return None,
        };
        let is_plain = |name| headers.get(name).is_none_or(|encoding| encoding == "identity");
        let plain = is_plain("connect-content-encoding") && is_plain("connect-accept-encoding");
        plain.then(|| Self { codec, left: Arc::default() })
    }

    /// The outlet of a call, if it has one.
    pub fn of(context: &RequestContext) -> Option<Self> {
        context.extensions().get::<Self>().cloned()
    }

    /// What messages are to be encoded with.
    pub fn codec(&self) -> CodecFormat {
        self.codec
    }

    /// Leaves the messages of the answer.
    pub fn leave(&self, messages: Messages) {
        *self.left.lock().unwrap_or_else(PoisonError::into_inner) = Some(messages);
    }

    /// The answer's body, when the service left its messages here.
    pub(super) fn body(&self) -> Option<Envelopes> {
        let messages = self.left.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Envelopes { messages: Some(messages), ready: VecDeque::new() })
    }
}

/// A stream's messages, each in its envelope, and the end of the stream.
pub(super) struct Envelopes {
    /// None after the last.
    messages: Option<Messages>,
    ready: VecDeque<Bytes>,
}

impl Envelopes {
    /// Makes ready what there is to say now, up to a large message or the end.
    fn gather(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(messages) = &mut self.messages else { return Poll::Ready(()) };
        let mut small = BytesMut::new();
        while small.len() < LARGE {
            match messages.as_mut().poll_next(cx) {
                Poll::Pending if small.is_empty() => return Poll::Pending,
                Poll::Pending => break,
                Poll::Ready(Some(Ok(message))) if message.len() < LARGE => {
                    put_head(&mut small, 0, message.len());
                    message.segments().iter().for_each(|segment| small.put_slice(segment));
                }
                Poll::Ready(Some(Ok(message))) => {
                    put_head(&mut small, 0, message.len());
                    self.ready.push_back(small.freeze());
                    self.ready.extend(message.segments().iter().cloned());
                    return Poll::Ready(());
                }
                Poll::Ready(last) => {
                    self.messages = None;
                    if !small.is_empty() {
                        self.ready.push_back(small.split().freeze());
                    }
                    let end = end(last.and_then(Result::err).as_ref());
                    put_head(&mut small, END, end.len());
                    small.put_slice(&end);
                    break;
                }
            }
        }
        self.ready.push_back(small.freeze());
        Poll::Ready(())
    }
}

impl Body for Envelopes {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.ready.is_empty() {
            ready!(self.gather(cx));
        }
        let bytes = self.ready.pop_front();
        if self.ready.is_empty() {
            self.ready = VecDeque::new();
        }
        Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// The head of an envelope: flags and length. Room for all of it is made at once, and no more.
fn put_head(out: &mut BytesMut, flags: u8, length: usize) {
    let room = if length < LARGE { length } else { 0 };
    out.reserve(HEAD + room);
    out.put_u8(flags);
    // No message is larger than a piece of output or an error's text.
    out.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
}

/// The whole answer of a stream that failed before it said anything.
pub(super) fn only_end(error: &ConnectError) -> Bytes {
    let (mut out, end) = (BytesMut::new(), end(Some(error)));
    put_head(&mut out, END, end.len());
    out.put_slice(&end);
    out.freeze()
}

/// What the last envelope says.
fn end(error: Option<&ConnectError>) -> Vec<u8> {
    match error {
        None => b"{}".to_vec(),
        Some(error) => [b"{\"error\":", &error.to_json()[..], b"}"].concat(),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::BodyExt;

    use super::*;

    type Item = Result<EncodedBody, ConnectError>;

    fn headers(given: &[(&'static str, &'static str)]) -> HeaderMap {
        given.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn body(messages: impl Stream<Item = Item> + Send + 'static) -> Envelopes {
        let outlet = Outlet::new(&headers(&[("content-type", "application/connect+json")])).unwrap();
        outlet.leave(Box::pin(messages));
        outlet.body().unwrap()
    }

    async fn said(mut body: Envelopes) -> Vec<Bytes> {
        let mut said = Vec::new();
        while let Some(frame) = body.frame().await {
            said.push(frame.unwrap().into_data().unwrap());
        }
        said
    }

    #[test]
    fn who_asks_for_grpc_or_compression_gets_it() {
        let kind = |kind| ("content-type", kind);
        for taken in ["application/connect+json", "application/connect+proto"] {
            assert!(Outlet::new(&headers(&[kind(taken)])).is_some());
            assert!(Outlet::new(&headers(&[kind(taken), ("connect-accept-encoding", "identity")])).is_some());
            for asks in ["connect-accept-encoding", "connect-content-encoding"] {
                assert!(Outlet::new(&headers(&[kind(taken), (asks, "gzip")])).is_none());
            }
        }
        for other in
            ["application/grpc", "application/grpc-web+json", "application/json", "application/connect+x"]
        {
            assert!(Outlet::new(&headers(&[kind(other)])).is_none());
        }
    }

    #[tokio::test]
    async fn small_messages_go_together_and_a_large_one_is_not_copied() {
        let large = Bytes::from(vec![b'x'; LARGE]);
        let messages = [Bytes::from_static(b"one"), Bytes::from_static(b"two"), large.clone()];
        let said = said(body(stream::iter(messages).map(|message| Ok(message.into())))).await;
        assert_eq!(said[0][..], *b"\0\0\0\0\x03one\0\0\0\0\x03two\0\0\0\x40\0");
        assert_eq!(said[1].as_ptr(), large.as_ptr());
        assert_eq!(said[2][..], *b"\x02\0\0\0\x02{}");
        assert_eq!(said.len(), 3);
    }

    #[tokio::test]
    async fn what_was_said_is_not_held_back_for_what_comes() {
        let first = stream::iter([Ok(EncodedBody::from(Bytes::from_static(b"one")))]);
        let mut body = body(first.chain(stream::pending()));
        let frame = body.frame().now_or_never().unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap()[..], *b"\0\0\0\0\x03one");
        assert!(body.frame().now_or_never().is_none());
        assert_eq!(body.ready.capacity(), 0, "a quiet stream keeps nothing");
    }

    #[tokio::test]
    async fn an_error_ends_a_stream_behind_what_was_said_before() {
        let messages = [Ok(Bytes::from_static(b"one").into()), Err(ConnectError::unavailable("gone"))];
        let said = said(body(stream::iter(messages))).await.concat();
        let end = br#"{"error":{"code":"unavailable","message":"gone"}}"#;
        assert_eq!(said[..], [b"\0\0\0\0\x03one\x02\0\0\0", &[end.len() as u8][..], end].concat());
    }
}
