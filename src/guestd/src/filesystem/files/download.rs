//! `GET /files` (contract: envd.md section 4.5).
//!
//! One descriptor serves the whole answer, so the path cannot turn into something else between the checks and the read. The head
//! of the answer comes from [`head`], the body from [`Content`].

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use guestd_protocol::files_query::FilesQuery;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use tower::ServiceExt as _;
use tower_http::CompressionLevel;
use tower_http::compression::Compression;
use tower_http::compression::predicate::SizeAbove;

use super::content::Content;
use super::digest;
use super::head::{head, packed_tag};
use super::negotiation::{Encoding, negotiate, of_the_whole};
use super::{FilesError, Filesystem, blocking};

/// RFC 9530.
const REPR_DIGEST: HeaderName = HeaderName::from_static("repr-digest");
const OCTET_STREAM: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Answers with the content of one file.
///
/// # Errors
///
/// Those of envd.md section 4.5, in the JSON form; see [`FilesError::status`].
pub(super) async fn download(
    State(filesystem): State<Arc<Filesystem>>,
    uri: Uri,
    headers: HeaderMap,
) -> Result<Response, FilesError> {
    let query = FilesQuery::parse(uri.query().unwrap_or_default())?;
    let (path, content) = blocking(move || {
        let caller = Arc::new(filesystem.files_caller(query.username())?);
        let path = caller.resolve(OsStr::from_bytes(query.path().unwrap_or_default()))?;
        let content = caller.files_work(|| Content::open(&caller, &path))?;
        Ok((path, content))
    })
    .await?;
    let mut encoding = negotiate(&headers);
    if encoding == Encoding::None {
        return Err(FilesError::NotAcceptable);
    }
    // A digest is that of the file itself, so the file itself is what goes out, unless the client takes only gzip (RFC 9530, section 3).
    let wanted = digest::wanted(&headers).filter(|_| encoding != Encoding::Gzip { only: true });
    let mut whole = of_the_whole(&headers);
    if wanted.is_some() {
        (encoding, whole) = (Encoding::Identity, Encoding::Identity);
    }
    let packs = |kind: Option<&HeaderValue>| whole.packs(&content_type(kind, &content.start));
    let mut head = head(&path, &content, &headers, packs).await;
    let has_body = matches!(head.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT);
    if has_body {
        let kind = content_type(head.headers().get(header::CONTENT_TYPE), &content.start);
        head.headers_mut().insert(header::CONTENT_TYPE, kind);
    }
    head.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept-Encoding"));
    if let Some(disposition) = disposition(&path) {
        head.headers_mut().insert(header::CONTENT_DISPOSITION, disposition);
    }
    if let Some(algorithm) = wanted.filter(|_| has_body) {
        let digest = content.digest(algorithm).await.map_err(FilesError::io("read", &path))?;
        if let Some(Ok(value)) = digest.map(|digest| HeaderValue::from_str(&digest.to_string())) {
            head.headers_mut().insert(REPR_DIGEST, value);
        }
    }
    let (mut parts, ()) = head.into_parts();
    let body = match parts.status {
        StatusCode::OK => content.all(),
        StatusCode::PARTIAL_CONTENT => {
            let (from, length) = served_range(&parts.headers).unwrap_or_default();
            content.range(from, length)
        }
        _ => Body::empty(),
    };
    if has_body && parts.headers.get(header::CONTENT_TYPE).is_some_and(|kind| encoding.packs(kind)) {
        let tag = parts.headers.get(header::ETAG).and_then(packed_tag);
        parts.headers.remove(header::ETAG);
        parts.headers.extend(tag.map(|tag| (header::ETAG, tag)));
        // The size of the compressed answer is not known, and no range of it can be asked for.
        parts.headers.remove(header::CONTENT_LENGTH);
        parts.headers.remove(header::ACCEPT_RANGES);
        return Ok(gzip(Response::from_parts(parts, body)).await);
    }
    Ok(Response::from_parts(parts, body))
}

/// First byte and length of a range, from the header that announces it.
fn served_range(headers: &HeaderMap) -> Option<(u64, u64)> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, _size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    Some((first, last.checked_sub(first)? + 1))
}

/// The fastest level: envd's default one makes a download as slow as one core can compress (envd.md section 11, number 21).
async fn gzip(response: Response) -> Response {
    let request = http::Request::builder().header(header::ACCEPT_ENCODING, "gzip").body(());
    let (Ok(request), mut response) = (request, Some(response)) else { return Response::default() };
    let inner = tower::service_fn(move |_: http::Request<()>| {
        std::future::ready(Ok::<_, std::convert::Infallible>(response.take().unwrap_or_default()))
    });
    let layered = Compression::new(inner).quality(CompressionLevel::Fastest).compress_when(SizeAbove::new(0));
    match layered.oneshot(request).await {
        Ok(response) => response.map(Body::new),
        Err(never) => match never {},
    }
}

impl Encoding {
    /// Whether content of this type goes out compressed.
    fn packs(self, kind: &HeaderValue) -> bool {
        matches!(self, Self::Gzip { only } if only || compressible(kind))
    }
}

/// Content that is compressed already only costs time to compress again.
fn compressible(kind: &HeaderValue) -> bool {
    let kind = kind.to_str().unwrap_or_default();
    let (family, kind) = kind.split_once('/').unwrap_or_default();
    match family {
        "image" => kind.starts_with("svg") || kind.starts_with("bmp"),
        "video" | "audio" => false,
        _ => !matches!(
            kind,
            "zip"
                | "gzip"
                | "x-gzip"
                | "zstd"
                | "x-xz"
                | "x-bzip2"
                | "x-7z-compressed"
                | "vnd.rar"
                | "x-rar-compressed"
        ),
    }
}

/// The type that the extension stands for, or else the one that the first bytes show; text is UTF-8.
fn content_type(by_extension: Option<&HeaderValue>, start: &[u8]) -> HeaderValue {
    let known = by_extension.filter(|kind| *kind != OCTET_STREAM).and_then(|kind| kind.to_str().ok());
    let kind = known.unwrap_or_else(|| sniff(start));
    if kind.starts_with("text/") && !kind.contains("charset") {
        return HeaderValue::from_str(&format!("{kind}; charset=utf-8")).unwrap_or(OCTET_STREAM);
    }
    HeaderValue::from_str(kind).unwrap_or(OCTET_STREAM)
}

/// What is worth telling apart without an extension: what a browser shows, what is not worth compressing, and text.
fn sniff(start: &[u8]) -> &'static str {
    const SIGNATURES: [(&[u8], &str); 9] = [
        (b"\x89PNG\r\n\x1a\n", "image/png"),
        (b"\xff\xd8\xff", "image/jpeg"),
        (b"GIF8", "image/gif"),
        (b"%PDF-", "application/pdf"),
        (b"PK\x03\x04", "application/zip"),
        (b"\x1f\x8b\x08", "application/gzip"),
        (b"\x28\xb5\x2f\xfd", "application/zstd"),
        (b"\xfd7zXZ\0", "application/x-xz"),
        (b"BZh", "application/x-bzip2"),
    ];
    if let Some((_, kind)) = SIGNATURES.iter().find(|(signature, _)| start.starts_with(signature)) {
        return kind;
    }
    let looked_at = &start[..start.len().min(512)];
    let is_text = |byte: &u8| !matches!(byte, 0..=8 | 11 | 14..=26 | 28..=31);
    if looked_at.iter().all(is_text) { "text/plain" } else { "application/octet-stream" }
}

/// `inline` with the file's name, so that a browser shows what it can and saves the rest under that name.
fn disposition(path: &Path) -> Option<HeaderValue> {
    let name = path.file_name()?.to_string_lossy();
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$&+-.^_`|~".contains(&byte);
    let mut text = "inline; filename".to_owned();
    if name.bytes().all(is_token) {
        text.push('=');
        text.push_str(&name);
    } else if name.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        text.push_str("=\"");
        for letter in name.chars() {
            if matches!(letter, '"' | '\\') {
                text.push('\\');
            }
            text.push(letter);
        }
        text.push('"');
    } else {
        // RFC 8187; control characters cannot be written in any other way.
        text.push_str("*=utf-8''");
        for byte in name.bytes() {
            if is_token(byte) {
                text.push(char::from(byte));
            } else {
                // Writing to a String cannot fail.
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    HeaderValue::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_cannot_break_out_of_its_header() {
        let cases = [
            ("/a/plain.txt", "inline; filename=plain.txt"),
            ("/a/with space.txt", "inline; filename=\"with space.txt\""),
            ("/a/quo\"te\\.txt", "inline; filename=\"quo\\\"te\\\\.txt\""),
            ("/a/semi;colon", "inline; filename=\"semi;colon\""),
            ("/a/new\r\nline", "inline; filename*=utf-8''new%0D%0Aline"),
            ("/a/ünï 100%", "inline; filename*=utf-8''%C3%BCn%C3%AF%20100%25"),
        ];
        for (path, expected) in cases {
            assert_eq!(disposition(Path::new(path)).unwrap(), expected);
        }
        assert_eq!(disposition(Path::new("/")), None);
    }

    #[test]
    fn the_type_comes_from_the_extension_then_from_the_bytes() {
        let html = HeaderValue::from_static("text/html");
        let cases: [(Option<&HeaderValue>, &[u8], &str); 8] = [
            (Some(&html), b"\x89PNG\r\n\x1a\n", "text/html; charset=utf-8"),
            (Some(&OCTET_STREAM), b"\x89PNG\r\n\x1a\n..", "image/png"),
            (Some(&OCTET_STREAM), "hällo\n\tworld\r\n".as_bytes(), "text/plain; charset=utf-8"),
            (None, b"", "text/plain; charset=utf-8"),
            (None, b"\x1b[31mred", "text/plain; charset=utf-8"),
            (None, b"\x7fELF\x02\x01\x01\0", "application/octet-stream"),
            (None, b"PK\x03\x04", "application/zip"),
            (None, b"%PDF-1.7", "application/pdf"),
        ];
        for (by_extension, start, expected) in cases {
            assert_eq!(content_type(by_extension, start), expected, "{start:?}");
        }
    }

    #[test]
    fn what_is_compressed_already_is_not_compressed_again() {
        let compresses = |kind: &str| compressible(&HeaderValue::from_str(kind).unwrap());
        for kind in
            ["text/plain; charset=utf-8", "application/json", "application/octet-stream", "image/svg+xml"]
        {
            assert!(compresses(kind), "{kind}");
        }
        for kind in ["image/png", "video/mp4", "audio/ogg", "application/zip", "application/gzip"] {
            assert!(!compresses(kind), "{kind}");
        }
    }

    #[test]
    fn a_served_range_is_read_back() {
        let range = |text: &'static str| {
            served_range(&HeaderMap::from_iter([(header::CONTENT_RANGE, HeaderValue::from_static(text))]))
        };
        assert_eq!(range("bytes 0-0/5"), Some((0, 1)));
        assert_eq!(range("bytes 2-4/5"), Some((2, 3)));
        assert_eq!(range("bytes */5"), None);
    }
}
