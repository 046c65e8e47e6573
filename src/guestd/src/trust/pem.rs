//! PEM as far as a bundle of certificates needs it (RFC 7468).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

const BEGIN: &str = "-----BEGIN ";
const DASHES: &str = "-----";
const CERTIFICATE: &str = "CERTIFICATE";

/// What is wrong with a bundle; the text is the 400's.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    #[error("caBundle holds no certificate: it must be PEM with at least one CERTIFICATE block")]
    Empty,
    #[error("caBundle must hold certificates only, and has a block of the kind {0:?}")]
    OtherKind(String),
    #[error("caBundle: certificate {0} has no END line")]
    Unended(usize),
    #[error("caBundle: certificate {0} is not base64")]
    NotBase64(usize),
    #[error("caBundle: certificate {0} is not the DER encoding of a certificate")]
    NotDer(usize),
}

/// A bundle that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bundle {
    text: String,
}

impl Bundle {
    /// Checks that `text` is certificates and nothing else; text between them is allowed and thrown away.
    ///
    /// # Errors
    /// A [`PemError`] that says which certificate it is about, counted from 1.
    pub fn parse(text: &str) -> Result<Self, PemError> {
        let mut kept = String::new();
        let mut lines = text.lines();
        let mut number = 0;
        while let Some(line) = lines.next() {
            let Some(kind) = line.trim().strip_prefix(BEGIN) else { continue };
            let kind = kind.strip_suffix(DASHES).unwrap_or(kind);
            if kind != CERTIFICATE {
                return Err(PemError::OtherKind(kind.chars().take(40).collect()));
            }
            number += 1;
            let mut body = String::new();
            loop {
                let line = lines.next().ok_or(PemError::Unended(number))?.trim();
                if line == "-----END CERTIFICATE-----" {
                    break;
                }
                if line.starts_with(DASHES) {
                    return Err(PemError::Unended(number));
                }
                body.push_str(line);
            }
            let der = STANDARD.decode(&body).map_err(|_| PemError::NotBase64(number))?;
            if !is_one_sequence(&der) {
                return Err(PemError::NotDer(number));
            }
            kept.push_str(&block(&body));
        }
        if number == 0 { Err(PemError::Empty) } else { Ok(Self { text: kept }) }
    }

    /// The certificates, in one form for all spellings.
    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

fn block(body: &str) -> String {
    let mut text = format!("{BEGIN}{CERTIFICATE}{DASHES}\n");
    let mut rest = body;
    while !rest.is_empty() {
        // Base64 is ASCII: every byte is a character's end.
        let (line, more) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = more;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

/// Whether the bytes are one DER SEQUENCE (X.690 section 8.9) with another inside, as a certificate's are. Signatures and dates are for who
/// verifies with it.
fn is_one_sequence(der: &[u8]) -> bool {
    let content = match der {
        [0x30, length @ 0..=0x7f, content @ ..] if content.len() == usize::from(*length) => content,
        [0x30, size @ 0x81..=0x84, rest @ ..] => {
            let size = usize::from(size & 0x7f);
            let Some((length, content)) = rest.split_at_checked(size) else { return false };
            let length = length.iter().fold(0usize, |sum, byte| sum << 8 | usize::from(*byte));
            if content.len() != length {
                return false;
            }
            content
        }
        _ => return false,
    };
    content.first() == Some(&0x30)
}

/// `store` without the certificates of `earlier`, and with those of `bundle` at its end. Of each earlier one only the last copy goes: the
/// machine may have had the same certificate before.
pub(super) fn replace(store: &str, earlier: &str, bundle: &Bundle) -> String {
    if !earlier.is_empty() && earlier == bundle.text() && store.ends_with(bundle.text()) {
        return store.to_owned();
    }
    let mut next = store.to_owned();
    if let Ok(earlier) = Bundle::parse(earlier) {
        for certificate in earlier.text().split_inclusive("-----END CERTIFICATE-----\n") {
            if let Some(at) = next.rfind(certificate) {
                next.replace_range(at..at + certificate.len(), "");
            }
        }
    }
    if !next.is_empty() && !next.ends_with('\n') {
        next.push('\n');
    }
    next.push_str(bundle.text());
    next
}
