//! Status and headers of a download: ranges, conditions, dates, and the type that an extension stands for.
//!
//! These rules are tower-http's. It is asked with `HEAD`, for which it only needs the size and the date of a file, and those are
//! answered from the file that is already open: it never sees the file system.

use std::future::{Ready, ready};
use std::io::{self, Cursor};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, header};
use tokio::io::{AsyncRead, AsyncSeek, ReadBuf};
use tower::ServiceExt as _;
use tower_http::services::ServeDir;
use tower_http::services::fs::{Backend, File, Metadata};

use super::content::Content;

/// The end of the year 9999. Dates after it, and those before 1970, have no form in HTTP, and the code that prints them panics.
const LAST_DATE: Duration = Duration::from_secs(253_402_300_799);

/// The head of the answer to `request`. A file of unknown size has no ranges, no conditions and no length.
///
/// `packs` says of the content type that the extension stands for whether the client would get the whole file in gzip. That form has a
/// tag of its own ([`packed_tag`]): a client that holds the start of it must not be given the end of the file itself.
pub(super) async fn head(
    path: &Path,
    content: &Content,
    request: &HeaderMap,
    packs: impl Fn(Option<&HeaderValue>) -> bool,
) -> Response<()> {
    let facts = Facts { size: content.size().unwrap_or(0), modified: content.modified };
    let Some(size) = content.size() else {
        let mut response = ask(path, &facts, HeaderMap::new()).await;
        for name in [header::CONTENT_LENGTH, header::ACCEPT_RANGES, header::ETAG] {
            response.headers_mut().remove(name);
        }
        return response;
    };
    let mut asked = request.clone();
    if size == 0 {
        // No range lies in an empty file, and some clients ask for one each time: they get all that there is, as from envd.
        asked.remove(header::RANGE);
    }
    let mut holds = None;
    if TAGGED.iter().any(|name| asked.contains_key(name)) {
        let current = ask(path, &facts, HeaderMap::new()).await;
        let (tag, kind) = (current.headers().get(header::ETAG), current.headers().get(header::CONTENT_TYPE));
        if let Some(validator) = asked.remove(header::IF_RANGE) {
            // A weak tag never equals the tags that are sent, which are strong. A date is that of both forms.
            let is_date = current.headers().get(header::LAST_MODIFIED) == Some(&validator) && !packs(kind);
            if tag != Some(&validator) && !is_date {
                asked.remove(header::RANGE);
            }
        }
        if let Some((tag, packed)) = tag.and_then(|tag| Some((tag, packed_tag(tag)?))) {
            if replace_tag(&mut asked, &header::IF_NONE_MATCH, &packed, tag) {
                holds = Some(packed.clone());
            }
            // With a range it is about the bytes that the client holds.
            if !asked.contains_key(header::RANGE) {
                replace_tag(&mut asked, &header::IF_MATCH, &packed, tag);
            }
        }
    }
    if asked.get(header::RANGE).is_some_and(|range| is_longer_than(range, size)) {
        asked.insert(header::RANGE, HeaderValue::from_static("bytes=0-"));
    }
    let mut response = ask(path, &facts, asked).await;
    if let Some(packed) = holds.filter(|_| response.status() == StatusCode::NOT_MODIFIED) {
        response.headers_mut().insert(header::ETAG, packed);
    }
    response
}

/// The conditions that can hold a tag.
const TAGGED: [HeaderName; 3] = [header::IF_RANGE, header::IF_MATCH, header::IF_NONE_MATCH];

/// The tag of the gzip form of what has this tag: `"abc-gzip"` for `"abc"`.
pub(super) fn packed_tag(tag: &HeaderValue) -> Option<HeaderValue> {
    let open = tag.to_str().ok()?.strip_suffix('"')?;
    HeaderValue::from_str(&format!("{open}-gzip\"")).ok()
}

/// Writes `tag` for `packed` in a condition; says whether the client holds the gzip form and not the other.
fn replace_tag(headers: &mut HeaderMap, name: &HeaderName, packed: &HeaderValue, tag: &HeaderValue) -> bool {
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).unwrap_or_default();
    let (packed, tag) = (text(packed), text(tag));
    let Some(tags) = headers.get(name).map(text).filter(|tags| tags.contains(&packed)) else { return false };
    // Tags are quoted, so none is found within another.
    let Ok(replaced) = HeaderValue::from_str(&tags.replace(&packed, &tag)) else { return false };
    headers.insert(name, replaced);
    !tags.contains(&tag)
}

/// Whether a range asks for more of the end than there is, which is the whole (RFC 9110, section 14.1.2); tower-http refuses it.
fn is_longer_than(range: &HeaderValue, size: u64) -> bool {
    let last = range.to_str().ok().and_then(|text| text.strip_prefix("bytes=-"));
    let digits = last.filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()));
    // More digits than a number can have are a large one.
    size > 0 && digits.is_some_and(|text| text.parse::<u64>().map_or(true, |length| length > size))
}

async fn ask(path: &Path, facts: &Facts, headers: HeaderMap) -> Response<()> {
    // Only the extension matters; an odd one stands for no type, and would not fit in a URI.
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let uri = if !extension.is_empty() && extension.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        format!("/file.{extension}")
    } else {
        "/file".to_owned()
    };
    let failed = || {
        let mut response = Response::new(());
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
        response
    };
    let Ok(mut request) =
        Request::builder().method(Method::HEAD).uri(uri).body(http_body_util::Empty::<Bytes>::new())
    else {
        return failed();
    };
    *request.headers_mut() = headers;
    let service = ServeDir::with_backend("/", facts.clone())
        .append_index_html_on_directories(false)
        .ignore_multi_range_requests(true);
    match service.oneshot(request).await {
        Ok(response) => response.map(|_empty| ()),
        Err(never) => match never {},
    }
}

/// What is known of the open file.
#[derive(Clone, Debug)]
struct Facts {
    size: u64,
    modified: Option<SystemTime>,
}

impl Metadata for Facts {
    fn is_dir(&self) -> bool {
        false
    }

    fn modified(&self) -> io::Result<SystemTime> {
        let since_1970 = |time: &SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).ok();
        self.modified
            .filter(|time| since_1970(time).is_some_and(|duration| duration <= LAST_DATE))
            .ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn len(&self) -> u64 {
        self.size
    }
}

impl Backend for Facts {
    type File = Unopened;
    type Metadata = Self;
    type OpenFuture = Ready<io::Result<Unopened>>;
    type MetadataFuture = Ready<io::Result<Self>>;

    fn open(&self, _path: PathBuf) -> Self::OpenFuture {
        ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn metadata(&self, _path: PathBuf) -> Self::MetadataFuture {
        ready(Ok(self.clone()))
    }
}

/// The file that `HEAD` never opens.
struct Unopened(Cursor<Bytes>, Facts);

impl AsyncRead for Unopened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buffer)
    }
}

impl AsyncSeek for Unopened {
    fn start_seek(mut self: Pin<&mut Self>, position: io::SeekFrom) -> io::Result<()> {
        Pin::new(&mut self.0).start_seek(position)
    }

    fn poll_complete(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<u64>> {
        Pin::new(&mut self.0).poll_complete(cx)
    }
}

impl File for Unopened {
    type Metadata = Facts;
    type MetadataFuture<'a> = Ready<io::Result<Facts>>;

    fn metadata(&self) -> Self::MetadataFuture<'_> {
        ready(Ok(self.1.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_more_than_there_is_from_the_end_is_recognised() {
        for (range, size, longer) in [
            ("bytes=-100", 10, true),
            ("bytes=-99999999999999999999999", 10, true),
            ("bytes=-10", 10, false),
            ("bytes=-100", 0, false),
            ("bytes=-", 10, false),
            ("bytes=-1-5", 10, false),
            ("bytes=-100,0-1", 10, false),
            ("bytes=100-", 10, false),
        ] {
            assert_eq!(is_longer_than(&HeaderValue::from_static(range), size), longer, "{range}");
        }
    }
}
