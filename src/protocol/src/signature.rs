//! Signed file URLs (contract: envd.md section 5). guestd checks them; hostd finds by them which sandbox a URL without an id means.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

/// What a signed URL may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Read,
    Write,
}

impl Operation {
    const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
        }
    }
}

/// What is signed. `path` and `username` are exactly as in the query, empty when absent.
#[derive(Clone, Copy, Debug)]
pub struct Signed<'a> {
    pub path: &'a [u8],
    pub operation: Operation,
    pub username: &'a str,
    /// The `signature_expiration` parameter as it stands in the query.
    pub expiration: Option<&'a str>,
}

impl Signed<'_> {
    /// `v1_` and the unpadded base64 of the SHA-256 over the fields joined by colons.
    pub fn sign(&self, token: &str) -> String {
        let mut hasher = Sha256::new_with_prefix(self.path);
        hasher.update(format!(":{}:{}:{token}", self.operation.name(), self.username));
        if let Some(expiration) = self.expiration {
            hasher.update(format!(":{expiration}"));
        }
        format!("v1_{}", STANDARD_NO_PAD.encode(hasher.finalize()))
    }

    /// Whether `signature` was made with `token`, in constant time.
    pub fn matches(&self, signature: &str, token: &str) -> bool {
        self.sign(token).as_bytes().ct_eq(signature.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0tQG31xiMp0IOQfaz9dcwi72L1CPo8e0";

    #[test]
    fn a_signature_is_the_one_that_the_sdks_make() {
        let signed =
            Signed { path: b"hello.txt", operation: Operation::Read, username: "user", expiration: None };
        assert_eq!(signed.sign(TOKEN), "v1_gUtH/s9YCJWgCizjfUxuWfhFE4QSydOWEIIvfLwDr6E");
    }

    #[test]
    fn a_signature_is_bound_to_operation_and_expiry() {
        let read = Signed { path: b"a", operation: Operation::Read, username: "", expiration: Some("10") };
        let signature = read.sign(TOKEN);
        assert!(read.matches(&signature, TOKEN));
        assert!(!Signed { operation: Operation::Write, ..read }.matches(&signature, TOKEN));
        assert!(!Signed { expiration: Some("11"), ..read }.matches(&signature, TOKEN));
        assert!(!Signed { expiration: None, ..read }.matches(&signature, TOKEN));
        assert!(!read.matches(&signature, "other"));
    }

    #[test]
    fn names_that_are_no_text_have_signatures_of_their_own() {
        let read = Signed { path: b"\xfe", operation: Operation::Read, username: "", expiration: None };
        let signature = read.sign(TOKEN);
        for path in [&b"\xff"[..], "\u{fffd}".as_bytes()] {
            assert!(!Signed { path, ..read }.matches(&signature, TOKEN));
        }
    }
}
