//! Digests of what is transferred: `Content-Digest`, `Repr-Digest` and `Want-Repr-Digest` (RFC 9530).
//!
//! In a request both digests cover the same bytes: the body as it is on the wire, with its content coding and, for multipart, with
//! its boundaries. SHA-256 and SHA-512 are known; other algorithms are passed over, as the RFC has it.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use sha2::{Digest as _, Sha256, Sha512};

const CONTENT: &str = "content-digest";
const REPR: &str = "repr-digest";
const WANT_REPR: &str = "want-repr-digest";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Sha256,
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 2] = [Self::Sha256, Self::Sha512];

    fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha-256",
            Self::Sha512 => "sha-512",
        }
    }

    fn length(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|algorithm| algorithm.name() == name)
    }
}

/// A digest, which prints as it stands in a header: `sha-256=:...:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Value {
    pub algorithm: Algorithm,
    bytes: Vec<u8>,
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=:{}:", self.algorithm.name(), STANDARD.encode(&self.bytes))
    }
}

/// A digest that a request announces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Expected {
    pub field: &'static str,
    pub value: Value,
}

/// A digest header that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {field}: {problem}")]
pub struct DigestError {
    field: &'static str,
    problem: String,
}

/// The digests in the headers of a request that can be verified.
///
/// # Errors
///
/// [`DigestError`] for anything that is no dictionary of byte sequences, and for a digest of another length than its algorithm's.
pub(super) fn expected(headers: &HeaderMap) -> Result<Vec<Expected>, DigestError> {
    let mut found = Vec::new();
    for (header, field) in [(CONTENT, "Content-Digest"), (REPR, "Repr-Digest")] {
        for line in headers.get_all(header) {
            let malformed = |problem: String| DigestError { field, problem };
            let line = line.to_str().map_err(|_| malformed("it is not ASCII".to_owned()))?;
            for member in line.split(',').map(str::trim).filter(|member| !member.is_empty()) {
                let problem = || malformed(format!("'{member}' is not of the form sha-256=:<base64>:"));
                let (name, value) = member.split_once('=').ok_or_else(problem)?;
                // Parameters may follow the second colon; none is defined.
                let (encoded, _parameters) =
                    value.strip_prefix(':').and_then(|value| value.split_once(':')).ok_or_else(problem)?;
                let bytes = STANDARD.decode(encoded).map_err(|_| problem())?;
                let Some(algorithm) = Algorithm::named(name) else { continue };
                if bytes.len() != algorithm.length() {
                    let (name, wanted) = (algorithm.name(), algorithm.length());
                    return Err(malformed(format!(
                        "a {name} digest has {wanted} bytes, not {}",
                        bytes.len()
                    )));
                }
                found.push(Expected { field, value: Value { algorithm, bytes } });
            }
        }
    }
    Ok(found)
}

/// The SHA-256 of the content, as often as the request announces it.
///
/// # Errors
///
/// Those of [`expected`].
pub fn expected_sha256(headers: &HeaderMap) -> Result<Vec<Vec<u8>>, DigestError> {
    let of_content = |expected: &Expected| {
        expected.field == "Content-Digest" && expected.value.algorithm == Algorithm::Sha256
    };
    Ok(expected(headers)?.into_iter().filter(of_content).map(|expected| expected.value.bytes).collect())
}

/// The digest that a client would like to have, if it is one of those known. A header that cannot be read is no wish.
pub(super) fn wanted(headers: &HeaderMap) -> Option<Algorithm> {
    let lines = headers.get_all(WANT_REPR).iter().filter_map(|line| line.to_str().ok());
    let wishes = lines.flat_map(|line| line.split(',')).filter_map(|member| {
        let (name, weight) = member.trim().split_once('=')?;
        let weight = weight.parse::<u8>().ok().filter(|weight| (1..=10).contains(weight))?;
        Some((Algorithm::named(name)?, weight))
    });
    // Of equals the first: the last is what `max_by_key` takes.
    wishes
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .max_by_key(|(_, weight)| *weight)
        .map(|(algorithm, _)| algorithm)
}

/// One digest in the making.
#[derive(Clone, Debug)]
pub(super) enum Hasher {
    Sha256(Sha256),
    Sha512(Sha512),
}

impl Hasher {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    pub(super) fn value(self) -> Value {
        match self {
            Self::Sha256(hasher) => {
                Value { algorithm: Algorithm::Sha256, bytes: hasher.finalize().as_slice().to_vec() }
            }
            Self::Sha512(hasher) => {
                Value { algorithm: Algorithm::Sha512, bytes: hasher.finalize().as_slice().to_vec() }
            }
        }
    }
}

/// One hasher for each algorithm that a request uses.
#[derive(Debug)]
pub(super) struct Hashers(Vec<Hasher>);

impl Hashers {
    pub(super) fn new(expected: &[Expected]) -> Self {
        let used = |algorithm: &Algorithm| expected.iter().any(|digest| digest.value.algorithm == *algorithm);
        Self(Algorithm::ALL.into_iter().filter(used).map(Hasher::new).collect())
    }

    pub(super) fn update(&mut self, bytes: &[u8]) {
        for hasher in &mut self.0 {
            hasher.update(bytes);
        }
    }

    /// The first announced digest that is not that of what came, with what it should have been.
    pub(super) fn mismatch(self, expected: Vec<Expected>) -> Option<(Expected, Value)> {
        let values: Vec<_> = self.0.into_iter().map(Hasher::value).collect();
        expected.into_iter().find_map(|expected| {
            let value = values.iter().find(|value| value.algorithm == expected.value.algorithm)?;
            (*value != expected.value).then(|| (expected, value.clone()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(entries: &[(&'static str, &str)]) -> HeaderMap {
        entries.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    /// The examples of RFC 9530, appendix B.1: `{"hello": "world"}` and a line feed.
    const CONTENT_256: &str = "sha-256=:RK/0qy18MlBSVnWgjwz6lZEWjP/lF5HF9bvEF8FabDg=:";
    const CONTENT_512: &str =
        "sha-512=:YMAam51Jz/jOATT6/zvHrLVgOYTGFy1d6GJiOHTohq4yP+pgk4vf2aCsyRZOtw8MjkM7iw7yZ/WkppmM44T3qg==:";

    #[test]
    fn the_examples_of_the_rfc_are_verified() {
        for value in [CONTENT_256, CONTENT_512] {
            for (bytes, right) in [(&b"{\"hello\": \"world\"}\n"[..], true), (b"something else", false)] {
                let expected = expected(&headers(&[("repr-digest", value)])).unwrap();
                let mut hashers = Hashers::new(&expected);
                hashers.update(&bytes[..5]);
                hashers.update(&bytes[5..]);
                let mismatch = hashers.mismatch(expected);
                assert_eq!(mismatch.is_none(), right);
                if let Some((expected, actual)) = mismatch {
                    assert_eq!(expected.value.to_string(), value);
                    assert_ne!(actual.to_string(), value);
                }
            }
        }
    }

    #[test]
    fn every_known_digest_of_every_line_counts_and_unknown_ones_do_not() {
        let both = format!("md5=:AAAA:, {CONTENT_256} ,{CONTENT_512}");
        let found = expected(&headers(&[("content-digest", &both), ("repr-digest", CONTENT_256)])).unwrap();
        let fields: Vec<_> = found.iter().map(|digest| (digest.field, digest.value.algorithm)).collect();
        assert_eq!(
            fields,
            [
                ("Content-Digest", Algorithm::Sha256),
                ("Content-Digest", Algorithm::Sha512),
                ("Repr-Digest", Algorithm::Sha256)
            ]
        );
        assert_eq!(expected(&headers(&[("content-digest", "unixsum=:AA==:")])).unwrap(), []);
        assert_eq!(expected(&headers(&[("content-digest", "")])).unwrap(), []);
    }

    #[test]
    fn a_digest_that_cannot_be_read_is_an_error_and_no_missing_digest() {
        for value in
            ["sha-256", "sha-256=abc", "sha-256=:abc", "sha-256=:!!!!:", "sha-256=:AAAA:", "=", "md5=5"]
        {
            let error = expected(&headers(&[("repr-digest", value)])).unwrap_err().to_string();
            assert!(error.starts_with("malformed Repr-Digest: "), "{value}: {error}");
        }
    }

    #[test]
    fn the_wish_with_the_highest_weight_wins() {
        let cases = [
            ("sha-256=1", Some(Algorithm::Sha256)),
            ("sha-256=1, sha-512=3", Some(Algorithm::Sha512)),
            ("sha-512=3, sha-256=3", Some(Algorithm::Sha512)),
            ("sha-256=0", None),
            ("md5=10", None),
            ("sha-256=11, sha-512=x", None),
            ("", None),
        ];
        for (value, algorithm) in cases {
            assert_eq!(wanted(&headers(&[("want-repr-digest", value)])), algorithm, "{value}");
        }
    }
}
