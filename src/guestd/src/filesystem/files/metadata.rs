//! The client's own metadata of a file: `X-Metadata-<key>` headers, kept as extended attributes `user.e2b.<key>`
//! (contract: envd.md section 4.6).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use http::HeaderMap;

use super::FilesError;
use crate::filesystem::entry::METADATA_PREFIX;
use crate::filesystem::error::{Fault, fault};
use crate::filesystem::sys;

const HEADER_PREFIX: &str = "x-metadata-";
/// What the kernel leaves of an attribute name of 255 bytes once [`METADATA_PREFIX`] is off.
const MOST_KEY_BYTES: usize = 255 - METADATA_PREFIX.len();
/// Keys and values together; many file systems keep all attributes of a file in one block.
const MOST_BYTES: usize = 4096;

/// Why the metadata of a request is refused, before anything is written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    #[error("metadata key is empty")]
    EmptyKey,
    #[error("metadata key '{key}' is longer than {MOST_KEY_BYTES} bytes")]
    KeyTooLong { key: String },
    #[error("metadata value of '{key}' must be printable ASCII")]
    Value { key: String },
    #[error("metadata is {bytes} bytes in all, the limit is {MOST_BYTES}")]
    TooLarge { bytes: usize },
}

/// The metadata in the headers of an upload, keys in lower case. HTTP has already made sure that they are tokens.
///
/// # Errors
///
/// One variant for each limit of the contract.
pub(super) fn parse(headers: &HeaderMap) -> Result<BTreeMap<String, String>, MetadataError> {
    let mut metadata = BTreeMap::new();
    let mut bytes = 0;
    for name in headers.keys() {
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else { continue };
        let key = key.to_owned();
        if key.is_empty() {
            return Err(MetadataError::EmptyKey);
        }
        if key.len() > MOST_KEY_BYTES {
            return Err(MetadataError::KeyTooLong { key });
        }
        let value = headers.get(name).map_or(&[][..], |value| value.as_bytes());
        if !value.iter().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(MetadataError::Value { key });
        }
        bytes += key.len() + value.len();
        metadata.insert(key, String::from_utf8_lossy(value).into_owned());
    }
    if bytes > MOST_BYTES { Err(MetadataError::TooLarge { bytes }) } else { Ok(metadata) }
}

/// Replaces whatever metadata the file had. Blocking.
///
/// # Errors
///
/// [`FilesError::NoSpaceForMetadata`], or what the operating system said: among others that the file system keeps no attributes,
/// which matters only when there are some to keep.
pub(super) fn replace(
    file: &File,
    path: &Path,
    metadata: &BTreeMap<String, String>,
) -> Result<(), FilesError> {
    apply(file, metadata).map_err(|source| match (fault(&source), source.raw_os_error()) {
        (Fault::NoSpace, _) | (_, Some(libc::E2BIG)) => {
            FilesError::NoSpaceForMetadata { written: file.metadata().map_or(0, |metadata| metadata.len()) }
        }
        _ => FilesError::io("store the metadata of", path)(source),
    })
}

fn apply(file: &File, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    // A file system without attributes has nothing stale; setting one below says what is wrong.
    let stale = sys::list(&sys::Carrier::File(file.as_fd())).unwrap_or_default();
    for name in stale {
        if sys::text(&name).as_bytes().starts_with(METADATA_PREFIX.as_bytes()) {
            sys::remove(file.as_fd(), &name)?;
        }
    }
    for (key, value) in metadata {
        let name = CString::new(format!("{METADATA_PREFIX}{key}"))?;
        sys::set(file.as_fd(), &name, value.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, HeaderValue};

    use super::*;

    fn headers(entries: &[(&str, &[u8])]) -> HeaderMap {
        let entry = |(name, value): &(&str, &[u8])| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value).unwrap())
        };
        entries.iter().map(entry).collect()
    }

    #[test]
    fn keys_are_lower_case_and_other_headers_are_left_alone() {
        let headers =
            headers(&[("X-Metadata-Author", b"Ada L"), ("X-Other", b"x"), ("x-metadata-empty", b"")]);
        let metadata = parse(&headers).unwrap();
        let expected =
            [("author", "Ada L"), ("empty", "")].map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(metadata, BTreeMap::from(expected));
    }

    #[test]
    fn each_limit_is_met_exactly_and_passed_by_one() {
        let key = |length: usize| format!("x-metadata-{}", "k".repeat(length));
        assert!(parse(&headers(&[(&key(246), b"v")])).is_ok());
        assert!(matches!(parse(&headers(&[(&key(247), b"v")])), Err(MetadataError::KeyTooLong { .. })));
        assert!(parse(&headers(&[(&key(1), &[b'v'; 4095])])).is_ok());
        let too_large = parse(&headers(&[(&key(1), &[b'v'; 2048]), (&key(2), &[b'v'; 2048])]));
        assert_eq!(too_large, Err(MetadataError::TooLarge { bytes: 4099 }));
        assert_eq!(parse(&headers(&[(&key(0), b"v")])), Err(MetadataError::EmptyKey));
    }

    #[test]
    fn values_that_are_not_printable_ascii_are_refused() {
        for value in [&b"a\tb"[..], "ü".as_bytes(), b"\xff"] {
            assert!(matches!(parse(&headers(&[("x-metadata-k", value)])), Err(MetadataError::Value { .. })));
        }
        assert!(parse(&headers(&[("x-metadata-k", b" ~!")])).is_ok());
    }
}
