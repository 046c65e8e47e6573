//! Content types: which protocol a request speaks, and which of them a method takes (contract: envd.md section 1.6).

use axum::http::{HeaderMap, HeaderValue, header};
use connectrpc::{MethodKind, Protocol, RequestProtocol};

/// What `Accept-Post` says of a method with one message each way.
const UNARY: &str = "application/json, application/proto, \
    application/grpc, application/grpc+json, application/grpc+proto, \
    application/grpc-web, application/grpc-web+json, application/grpc-web+proto";

/// What `Accept-Post` says of a method with a stream.
const STREAM: &str = "application/connect+json, application/connect+proto, \
    application/grpc, application/grpc+json, application/grpc+proto, \
    application/grpc-web, application/grpc-web+json, application/grpc-web+proto";

/// Writes the content type in small letters: upper case means the same (RFC 9110 section 8.3.1), and what comes after compares letters.
/// Parameters stay as they are.
pub(super) fn normalise(headers: &mut HeaderMap) {
    let Some(kind) = headers.get_mut(header::CONTENT_TYPE) else { return };
    let essence = kind.as_bytes().split(|byte| *byte == b';').next().unwrap_or_default();
    if !essence.iter().any(u8::is_ascii_uppercase) {
        return;
    }
    let length = essence.len();
    let mut text = kind.as_bytes().to_vec();
    text[..length].make_ascii_lowercase();
    if let Ok(lower) = HeaderValue::from_bytes(&text) {
        *kind = lower;
    }
}

/// The protocol that a request speaks, in whatever case its content type is written.
pub(super) fn protocol(headers: &HeaderMap) -> Option<RequestProtocol> {
    let kind = headers.get(header::CONTENT_TYPE)?.to_str().ok()?;
    Protocol::detect_from_content_type(&kind.to_ascii_lowercase())
}

/// What a method takes instead, as `Accept-Post` names it, when it does not take the type of these normalised headers.
///
/// gRPC has one type for all kinds of methods, and a way of its own to refuse a codec.
pub(super) fn wanted(method: MethodKind, headers: &HeaderMap) -> Option<&'static str> {
    let is_grpc = headers
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let is_stream = method != MethodKind::Unary;
    if is_grpc || protocol(headers).is_some_and(|found| found.is_streaming == is_stream) {
        return None;
    }
    Some(if is_stream { STREAM } else { UNARY })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str) -> HeaderMap {
        HeaderMap::from_iter([(header::CONTENT_TYPE, kind.parse().unwrap())])
    }

    #[test]
    fn a_type_in_upper_case_is_the_same_type_and_its_parameters_stay() {
        for (given, expected) in [
            ("Application/JSON", "application/json"),
            ("APPLICATION/Connect+Proto", "application/connect+proto"),
            ("application/JSON; Charset=UTF-8", "application/json; Charset=UTF-8"),
            ("text/Plain;a=B", "text/plain;a=B"),
            ("", ""),
        ] {
            let mut headers = headers(given);
            normalise(&mut headers);
            assert_eq!(headers[header::CONTENT_TYPE], expected);
        }
    }

    #[test]
    fn what_a_method_is_said_to_take_it_takes() {
        for (method, list) in [(MethodKind::Unary, UNARY), (MethodKind::BidiStreaming, STREAM)] {
            for kind in list.split(", ") {
                assert_eq!(wanted(method, &headers(kind)), None, "{kind}");
            }
        }
    }

    #[test]
    fn a_type_of_the_other_kind_of_method_is_not_taken() {
        for kind in ["application/json", "application/proto", "application/json; charset=utf-8"] {
            for method in
                [MethodKind::ServerStreaming, MethodKind::ClientStreaming, MethodKind::BidiStreaming]
            {
                assert_eq!(wanted(method, &headers(kind)), Some(STREAM), "{kind}");
            }
        }
        for kind in [
            "application/connect+json",
            "application/connect+proto",
            "application/connect+x",
            "text/plain",
            "",
        ] {
            assert_eq!(wanted(MethodKind::Unary, &headers(kind)), Some(UNARY), "{kind}");
        }
        assert_eq!(wanted(MethodKind::Unary, &HeaderMap::new()), Some(UNARY));
    }
}
