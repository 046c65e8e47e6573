//! Request bodies in gzip (contract: envd.md section 4.6).
//!
//! Such a body is one member after the other to its last byte (RFC 1952, section 2.2): joined files, and what parallel compressors and
//! log rotation make. A decoder that stops at the first one would make a short file of it and say nothing.

use std::io;

use async_compression::tokio::bufread::GzipDecoder;
use axum::BoxError;
use axum::body::Body;
use axum::extract::Request;
use futures_util::TryStreamExt as _;
use http::{HeaderMap, header};
use tokio_util::io::{ReaderStream, StreamReader};

/// How much is decoded at once: a small body can stand for a large one, and is to fill no memory.
const CHUNK: usize = 32 * 1024;

/// Decodes the body of a request that says it is gzip and nothing else, and takes away the headers that were about the encoded one.
///
/// The decoded body fails with the [`io::Error`] of the decoder when it is not valid gzip, an empty one included, and with what the
/// body itself failed with.
pub(super) async fn decode(request: Request) -> Request {
    let (mut parts, body) = request.into_parts();
    if !is_gzip(&parts.headers) {
        return Request::from_parts(parts, body);
    }
    parts.headers.remove(header::CONTENT_ENCODING);
    parts.headers.remove(header::CONTENT_LENGTH);
    let encoded = StreamReader::new(body.into_data_stream().map_err(io::Error::other));
    let mut decoder = GzipDecoder::new(encoded);
    decoder.multiple_members(true);
    let decoded = ReaderStream::with_capacity(decoder, CHUNK).map_err(cause);
    Request::from_parts(parts, Body::from_stream(decoded))
}

/// Codings are named without regard to case (RFC 9110, section 8.4.1).
fn is_gzip(headers: &HeaderMap) -> bool {
    let mut encodings = headers.get_all(header::CONTENT_ENCODING).iter();
    let only = encodings.next().filter(|_| encodings.next().is_none());
    only.is_some_and(|encoding| encoding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"gzip"))
}

/// The body's own error, which went through the decoder, or the decoder's.
fn cause(error: io::Error) -> BoxError {
    error.downcast::<axum::Error>().map_or_else(BoxError::from, BoxError::from)
}
