//! Calls that are refused before a service sees them: in the form of their protocol, and so that their connection can be used again.

use std::fmt::Write as _;
use std::time::Duration;

use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, Version, header};
use axum::response::{IntoResponse, Response};
use connectrpc::{CodecFormat, ConnectError, Protocol, RequestProtocol};
use http_body_util::{BodyExt, Limited};
use tokio::time::timeout;

use super::{media, outlet};

/// How much of a refused request's body is read, in bytes, and for how long.
const DRAIN_LIMIT: usize = 64 * 1024;
const DRAIN_TIME: Duration = Duration::from_secs(1);

/// Answers after what the client is still sending, so that the connection can be used again: its other calls may be on their way
/// already. What is too long or too slow for that ends the connection, and the client is told.
pub async fn after_body(request: Request, mut answer: Response) -> Response {
    let version = request.version();
    let rest = Limited::new(request.into_body(), DRAIN_LIMIT).collect();
    let drained = matches!(timeout(DRAIN_TIME, rest).await, Ok(Ok(_)));
    // HTTP/2 ends the one stream, and has no such header (RFC 9113 section 8.2.2).
    if !drained && version < Version::HTTP_2 {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// The answer to a call that failed with `error`. A stream is answered with 200 and ends in the error, as it does when it fails later; a
/// gRPC call has it in its status; everything else is a status of HTTP with the error as JSON (contract: envd.md sections 1.6 and 1.7).
pub fn failed(request: &Request, error: &ConnectError) -> Response {
    match media::protocol(request.headers()) {
        Some(RequestProtocol { protocol: Protocol::Connect, codec_format, is_streaming: true, .. }) => {
            let kind = Protocol::Connect.response_content_type(codec_format, true);
            ([(header::CONTENT_TYPE, kind)], outlet::only_end(error)).into_response()
        }
        Some(RequestProtocol {
            protocol: protocol @ (Protocol::Grpc | Protocol::GrpcWeb),
            codec_format,
            ..
        }) => without_messages(protocol, codec_format, error),
        _ => {
            let kind = [(header::CONTENT_TYPE, "application/json")];
            (error.http_status(), kind, error.to_json()).into_response()
        }
    }
}

/// gRPC's "Trailers-Only": status and text are headers, and there is no body.
fn without_messages(protocol: Protocol, codec: CodecFormat, error: &ConnectError) -> Response {
    let text = percent_encoded(error.message.as_deref().unwrap_or_default());
    let head = [
        ("content-type", protocol.response_content_type(codec, true).to_owned()),
        ("grpc-status", error.code.grpc_code().to_string()),
        ("grpc-message", text),
    ];
    (StatusCode::OK, head).into_response()
}

/// A status text as gRPC has it in a header: printable ASCII but `%` stays, every other byte is escaped.
fn percent_encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => encoded.push(char::from(byte)),
            // Writing to a string does not fail.
            _ => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    async fn answer(kind: &str) -> (u16, Vec<(String, String)>, Vec<u8>) {
        let request = Request::post("/x").header(header::CONTENT_TYPE, kind).body(Body::empty()).unwrap();
        let response = failed(&request, &ConnectError::unauthenticated("no '100%' ü"));
        let (head, body) = response.into_parts();
        let headers = head.headers.iter().filter(|(name, _)| *name != header::CONTENT_LENGTH);
        let headers = headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
        (head.status.as_u16(), headers.collect(), body.collect().await.unwrap().to_bytes().to_vec())
    }

    fn kind(kind: &str) -> (String, String) {
        ("content-type".to_owned(), kind.to_owned())
    }

    #[tokio::test]
    async fn a_stream_is_200_and_has_its_error_in_the_end_frame() {
        for (given, said) in [
            ("application/connect+json", "application/connect+json"),
            ("Application/Connect+Proto", "application/connect+proto"),
        ] {
            let (status, headers, body) = answer(given).await;
            assert_eq!((status, headers), (200, vec![kind(said)]));
            assert_eq!(
                (body[0], u32::from_be_bytes(body[1..5].try_into().unwrap())),
                (2, body.len() as u32 - 5)
            );
            let told: serde_json::Value = serde_json::from_slice(&body[5..]).unwrap();
            let error = serde_json::json!({"code": "unauthenticated", "message": "no '100%' ü"});
            assert_eq!(told, serde_json::json!({ "error": error }));
        }
    }

    #[tokio::test]
    async fn grpc_has_its_status_in_the_headers_and_nothing_behind_them() {
        for (given, said) in [
            ("application/grpc", "application/grpc+proto"),
            ("application/grpc-web+json", "application/grpc-web+json"),
        ] {
            let (status, headers, body) = answer(given).await;
            let text = ("grpc-message".to_owned(), "no '100%25' %C3%BC".to_owned());
            let expected = vec![kind(said), ("grpc-status".to_owned(), "16".to_owned()), text];
            assert_eq!((status, headers, body), (200, expected, Vec::new()));
        }
    }

    #[tokio::test]
    async fn everything_else_is_json_with_the_status_of_its_code() {
        for given in ["application/json", "application/proto", "text/plain"] {
            let (status, headers, body) = answer(given).await;
            assert_eq!((status, headers), (401, vec![kind("application/json")]));
            assert!(body.starts_with(br#"{"code":"unauthenticated","message":"no '100%' "#));
        }
    }
}
