//! What multipart uploads need beyond axum's parser: any `multipart/*` type, file names with their directories, and a bound on
//! what the parser holds in memory (contract: envd.md section 4.6).

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use http::{HeaderMap, HeaderValue, header};

/// How much the parser may take in without giving anything out. Only the headers of a part and what precedes the first boundary
/// can get there; what follows the last boundary may be as much.
const MOST_HELD: usize = 4 * 1024 * 1024;

/// Whether this is a multipart type of any kind.
pub(super) fn is_multipart(essence: &str) -> bool {
    essence.starts_with("multipart/")
}

/// Calls the body `multipart/form-data`, the one kind that the parser takes, whatever its kind; the format is the same.
pub(super) fn as_form_data(headers: &mut HeaderMap) {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return };
    let parameters = value.split_once(';').map_or("", |(_, parameters)| parameters);
    if let Ok(value) = HeaderValue::from_str(&format!("multipart/form-data;{parameters}")) {
        headers.insert(header::CONTENT_TYPE, value);
    }
}

/// Field name and file name of a part, byte for byte. The parser's own reading misses a `filename*` that precedes `filename`, and undoes
/// no escapes but one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Disposition {
    pub name: Option<Vec<u8>>,
    pub file_name: Option<Vec<u8>>,
}

impl Disposition {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let value = headers.get(header::CONTENT_DISPOSITION);
        value.map_or_else(Self::default, |value| Self::parse(value.as_bytes()))
    }

    fn parse(value: &[u8]) -> Self {
        let mut found = Self::default();
        let mut extended = None;
        let mut rest = split(value, b';').map_or(&[][..], |(_kind, rest)| rest);
        while let Some((name, after)) = split(rest, b'=') {
            let start = name.iter().position(|byte| !b" \t;".contains(byte)).unwrap_or(name.len());
            let name = name[start..].trim_ascii_end();
            let (value, after) = parameter_value(after.trim_ascii_start());
            if name.eq_ignore_ascii_case(b"name") {
                found.name.get_or_insert(value);
            } else if name.eq_ignore_ascii_case(b"filename") {
                found.file_name.get_or_insert(value);
            } else if name.eq_ignore_ascii_case(b"filename*") {
                extended = extended.or_else(|| decode_extended(&value));
            }
            rest = after;
        }
        // RFC 6266: the extended form is the exact one.
        found.file_name = extended.or(found.file_name);
        found
    }
}

/// What is before and after the first `separator`.
fn split(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let index = memchr::memchr(separator, text)?;
    Some((&text[..index], &text[index + 1..]))
}

/// A token or a quoted string, and what follows it.
fn parameter_value(text: &[u8]) -> (Vec<u8>, &[u8]) {
    let Some(quoted) = text.strip_prefix(b"\"") else {
        let (value, after) = split(text, b';').unwrap_or((text, &[]));
        return (value.trim_ascii_end().to_owned(), after);
    };
    let mut value = Vec::new();
    let mut rest = quoted;
    while let [byte, after @ ..] = rest {
        rest = after;
        match (byte, after) {
            (b'"', _) => {
                let after = after.trim_ascii_start();
                let start = after.iter().position(|byte| *byte != b';').unwrap_or(after.len());
                return (value, &after[start..]);
            }
            // Only a special character is escaped, so that `C:\dir\file` survives, which browsers used to send as it is.
            (b'\\', [escaped, after @ ..]) if br#"()<>@,;:\"/[]?="#.contains(escaped) => {
                value.push(*escaped);
                rest = after;
            }
            (byte, _) => value.push(*byte),
        }
    }
    (value, &[])
}

/// `utf-8'language'%41%42` (RFC 8187).
fn decode_extended(value: &[u8]) -> Option<Vec<u8>> {
    let (charset, rest) = split(value, b'\'')?;
    let (_language, encoded) = split(rest, b'\'')?;
    if !charset.eq_ignore_ascii_case(b"utf-8") {
        return None;
    }
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut input = encoded.iter();
    while let Some(byte) = input.next() {
        if *byte == b'%' {
            let mut digit = || char::from(*input.next()?).to_digit(16);
            let (high, low) = (digit()?, digit()?);
            bytes.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            bytes.push(*byte);
        }
    }
    std::str::from_utf8(&bytes).is_ok().then_some(bytes)
}

/// The parser ate [`MOST_HELD`] bytes and found neither a boundary nor the end of a header, or so many follow the last boundary.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("more than {MOST_HELD} bytes without a boundary or the end of a part's headers")]
pub(super) struct TooMuchHeld;

/// Feeds the parser one chunk at a time, and reads what the parser leaves.
///
/// On its own the parser reads for as long as the body has bytes ready and only then looks at them. A gzip body has a thousand times
/// its size ready at once, so one small request would take all memory. And it stops at the last boundary, where the body goes on: a
/// line break belongs there, a trailer may follow (RFC 2046, section 5.1.1), and gzip has its checksum behind it.
#[derive(Debug)]
pub(super) struct Paced<S>(Arc<Mutex<Feed<S>>>);

#[derive(Debug)]
struct Feed<S> {
    inner: S,
    /// How many bytes the parser took in since it last gave some out.
    held: usize,
    pause: bool,
}

impl<S> Clone for Paced<S> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<S> Paced<S> {
    pub(super) fn new(inner: S) -> Self {
        Self(Arc::new(Mutex::new(Feed { inner, held: 0, pause: false })))
    }

    fn lock(&self) -> MutexGuard<'_, Feed<S>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called for everything that comes out of the parser.
    pub(super) fn release(&self) {
        self.lock().held = 0;
    }
}

impl<S, E> Paced<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: Into<axum::BoxError>,
{
    /// Reads to the end what follows the last boundary, which means nothing.
    ///
    /// # Errors
    ///
    /// Those of the body, and [`TooMuchHeld`].
    pub(super) async fn finish(mut self) -> Result<(), axum::BoxError> {
        self.release();
        while let Some(bytes) = self.next().await {
            bytes?;
        }
        Ok(())
    }
}

impl<S, E> Stream for Paced<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: Into<axum::BoxError>,
{
    type Item = Result<Bytes, axum::BoxError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut feed = self.lock();
        if std::mem::take(&mut feed.pause) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let item = ready!(Pin::new(&mut feed.inner).poll_next(cx));
        feed.pause = true;
        Poll::Ready(match item {
            Some(Ok(bytes)) => {
                feed.held += bytes.len();
                Some(if feed.held > MOST_HELD { Err(TooMuchHeld.into()) } else { Ok(bytes) })
            }
            Some(Err(error)) => Some(Err(error.into())),
            None => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disposition(name: Option<&str>, file_name: Option<&str>) -> Disposition {
        Disposition { name: name.map(Into::into), file_name: file_name.map(Into::into) }
    }

    #[test]
    fn a_file_name_keeps_its_directories_and_its_odd_letters() {
        let cases: &[(&str, Option<&str>, Option<&str>)] = &[
            (r#"form-data; name="file"; filename="a/b/c.txt""#, Some("file"), Some("a/b/c.txt")),
            (r#"form-data; filename="/abs/c.txt"; name="file""#, Some("file"), Some("/abs/c.txt")),
            (r#"form-data; name=file; filename=c.txt"#, Some("file"), Some("c.txt")),
            (r#"form-data;name="file";filename="x;y=z.txt""#, Some("file"), Some("x;y=z.txt")),
            (r#"form-data; name="file"; filename="q\"uote\\.txt""#, Some("file"), Some(r#"q"uote\.txt"#)),
            (r#"form-data; name="file"; filename="C:\dir\f.txt""#, Some("file"), Some(r"C:\dir\f.txt")),
            (r#"form-data; name="file"; filename="100%25.txt""#, Some("file"), Some("100%25.txt")),
            (r#"form-data; name="file"; filename*=utf-8''na%C3%AFve%20x"#, Some("file"), Some("naïve x")),
            (
                r#"form-data; filename*=UTF-8'en'a%2Fb; filename="ascii"; name=file"#,
                Some("file"),
                Some("a/b"),
            ),
            (r#"form-data; name="file"; filename="plain"; filename*=latin1''x"#, Some("file"), Some("plain")),
            (r#"form-data; NAME="file"; FileName="c""#, Some("file"), Some("c")),
            (r#"form-data; name="file"; filename="unended"#, Some("file"), Some("unended")),
            (r#"form-data; name="file"; filename="""#, Some("file"), Some("")),
            (r#"form-data; name="filename""#, Some("filename"), None),
            ("form-data", None, None),
            ("", None, None),
            ("form-data; name=\"file\"; filename=\"你好/ü.txt\"", Some("file"), Some("你好/ü.txt")),
        ];
        for (value, name, file_name) in cases {
            assert_eq!(Disposition::parse(value.as_bytes()), disposition(*name, *file_name), "{value}");
        }
    }

    #[test]
    fn a_file_name_that_is_no_text_keeps_its_bytes() {
        for (value, file_name) in [
            (&b"form-data; name=file; filename=\"a\xfe\"; x=y"[..], &b"a\xfe"[..]),
            (b"form-data; name=file; filename=\xc3\xa0", b"\xc3\xa0"),
            (b"form-data; filename*=utf-8''%ff; name=file; filename=\"a\xff\"", b"a\xff"),
        ] {
            let expected = Disposition { name: Some(b"file".to_vec()), file_name: Some(file_name.to_vec()) };
            assert_eq!(Disposition::parse(value), expected);
        }
    }

    proptest::proptest! {
        #[test]
        fn any_disposition_is_read_without_a_panic(value in "\\PC{0,40}", header in "[a-z;=\"\\\\*'% ]{0,40}") {
            Disposition::parse(value.as_bytes());
            Disposition::parse(header.as_bytes());
        }

        #[test]
        fn a_quoted_file_name_comes_back_as_it_was(name in "[^\\x00-\\x1f]{0,30}") {
            let escaped = name.replace('\\', r"\\").replace('"', "\\\"");
            let header = format!("form-data; name=\"file\"; filename=\"{escaped}\"; x=y");
            let read = Disposition::parse(header.as_bytes());
            proptest::prop_assert_eq!(read, disposition(Some("file"), Some(&name)));
        }
    }

    #[test]
    fn every_kind_of_multipart_is_read_as_form_data() {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, "multipart/mixed; boundary=\"a b\"".parse().unwrap());
        as_form_data(&mut headers);
        assert_eq!(headers[header::CONTENT_TYPE], "multipart/form-data; boundary=\"a b\"");
    }
}
