//! The envelope of the Jupyter messaging protocol 5.3 (jupyter-client.readthedocs.io, "The wire protocol"): five JSON frames behind a
//! delimiter, signed with HMAC-SHA256. What is inside is passed on as it is, not parsed into types.

use bytes::Bytes;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::Sha256;

const DELIMITER: &[u8] = b"<IDS|MSG>";

/// How many frames a message may have: identities before the delimiter, buffers after the content.
const FRAMES_LIMIT: usize = 64;

/// What a kernel says.
#[derive(Clone, Debug)]
pub struct Message {
    pub kind: String,
    /// The id of the request that it belongs to; empty when it belongs to none.
    pub parent: String,
    /// When the kernel made it, as JSON text.
    pub date: Option<Box<RawValue>>,
    /// JSON text in UTF-8, where it was read: it may be many megabytes.
    content: Bytes,
}

impl Message {
    #[cfg(test)]
    pub fn new(kind: &str, date: Option<Box<RawValue>>, content: &str) -> Self {
        let content = Bytes::copy_from_slice(content.as_bytes());
        Self { kind: kind.to_owned(), parent: String::new(), date, content }
    }

    pub fn content(&self) -> &str {
        std::str::from_utf8(&self.content).unwrap_or_default()
    }
}

/// Why something that came is no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MessageError {
    #[error("no delimiter, or frames are missing")]
    Frames,
    #[error("the signature is wrong")]
    Signature,
    #[error("the header is not a header")]
    Header,
}

#[derive(Serialize)]
struct Header<'a> {
    msg_id: &'a str,
    session: &'a str,
    username: &'a str,
    date: &'a str,
    msg_type: &'a str,
    version: &'a str,
}

#[derive(Deserialize)]
struct TheirHeader {
    msg_type: String,
    #[serde(default)]
    date: Option<Box<RawValue>>,
}

#[derive(Default, Deserialize)]
struct Parent {
    #[serde(default)]
    msg_id: String,
}

/// Signs and checks the messages of one kernel.
#[derive(Clone)]
pub struct Signer {
    key: Hmac<Sha256>,
    session: String,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Signer").finish_non_exhaustive()
    }
}

impl Signer {
    /// # Panics
    /// Never: HMAC takes keys of any length.
    pub fn new(key: &str, session: String) -> Self {
        let key =
            Hmac::new_from_slice(key.as_bytes()).unwrap_or_else(|_| unreachable!("any key length is valid"));
        Self { key, session }
    }

    fn sign(&self, parts: &[&[u8]]) -> String {
        let mut mac = self.key.clone();
        for part in parts {
            mac.update(part);
        }
        hex(&mac.finalize().into_bytes())
    }

    /// The frames of a request.
    pub fn seal(&self, id: &str, kind: &str, content: &str) -> Vec<Bytes> {
        let header = Header {
            msg_id: id,
            session: &self.session,
            username: "guestd",
            // Kernels do not read it; a clock of the guest means nothing here.
            date: "1970-01-01T00:00:00Z",
            msg_type: kind,
            version: "5.3",
        };
        let header = serde_json::to_string(&header).unwrap_or_default();
        let signature = self.sign(&[header.as_bytes(), b"{}", b"{}", content.as_bytes()]);
        [DELIMITER.to_vec(), signature.into_bytes(), header.into_bytes(), b"{}".to_vec(), b"{}".to_vec()]
            .into_iter()
            .chain([content.as_bytes().to_vec()])
            .map(Bytes::from)
            .collect()
    }

    /// Checks and reads what a kernel sent.
    ///
    /// # Errors
    /// [`MessageError`] for anything that the kernel of this key did not send.
    pub fn open(&self, frames: &[Bytes]) -> Result<Message, MessageError> {
        if frames.len() > FRAMES_LIMIT {
            return Err(MessageError::Frames);
        }
        let start = frames.iter().position(|frame| frame == DELIMITER).ok_or(MessageError::Frames)?;
        let [signature, header, parent, metadata, content, ..] = &frames[start + 1..] else {
            return Err(MessageError::Frames);
        };
        let mut mac = self.key.clone();
        for part in [header, parent, metadata, content] {
            mac.update(part);
        }
        let given = unhex(signature).ok_or(MessageError::Signature)?;
        mac.verify_slice(&given).map_err(|_| MessageError::Signature)?;
        let header: TheirHeader = serde_json::from_slice(header).map_err(|_| MessageError::Header)?;
        let parent: Parent = serde_json::from_slice(parent).unwrap_or_default();
        // Python writes file names that are not UTF-8 as they are.
        let content = match std::str::from_utf8(content) {
            Ok(_) => content.clone(),
            Err(_) => String::from_utf8_lossy(content).into_owned().into(),
        };
        Ok(Message { kind: header.msg_type, parent: parent.msg_id, date: header.date, content })
    }
}

pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _infallible = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || text.len() > 128 {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    text.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer() -> Signer {
        Signer::new("secret", "s".to_owned())
    }

    #[test]
    fn the_signature_is_that_of_the_protocol() {
        // HMAC-SHA256("key", "The quick brown fox jumps over the lazy dog"), a published vector.
        let signer = Signer::new("key", String::new());
        assert_eq!(
            signer.sign(&[b"The quick brown fox ", b"jumps over the lazy dog"]),
            "f7bc83f430538424b13298e6aa6fb143ef4d59a14946175997479dbc2d1a3cd8"
        );
    }

    #[test]
    fn what_was_sealed_is_opened_with_identities_before_and_buffers_behind() {
        let mut frames = signer().seal("7", "stream", r#"{"name":"stdout"}"#);
        frames.insert(0, Bytes::from_static(b"kernel.1.stream"));
        frames.push(Bytes::from_static(b"buffer"));
        let message = signer().open(&frames).unwrap();
        assert_eq!(
            (message.kind.as_str(), message.parent.as_str(), message.content()),
            ("stream", "", r#"{"name":"stdout"}"#)
        );
    }

    #[test]
    fn what_somebody_else_signed_or_changed_is_refused() {
        let frames = signer().seal("7", "stream", "{}");
        assert_eq!(Signer::new("other", String::new()).open(&frames).unwrap_err(), MessageError::Signature);
        for (place, frame) in frames.iter().enumerate().skip(1) {
            let mut changed = frames.clone();
            changed[place] = Bytes::from([frame.as_ref(), b"0"].concat());
            assert!(signer().open(&changed).is_err(), "{place}");
        }
        for length in 0..frames.len() {
            assert!(signer().open(&frames[..length]).is_err(), "{length}");
        }
        assert_eq!(signer().open(&vec![Bytes::new(); 1000]).unwrap_err(), MessageError::Frames);
    }

    #[test]
    fn text_that_is_not_utf_8_is_shown_and_not_lost() {
        let signer = signer();
        let (header, content) = (br#"{"msg_type":"stream"}"#, b"{\"text\":\"a\xffb\"}");
        let signature = signer.sign(&[header, b"{}", b"{}", content]);
        let frames: Vec<Bytes> = [DELIMITER, signature.as_bytes(), header, b"{}", b"{}", content]
            .into_iter()
            .map(Bytes::copy_from_slice)
            .collect();
        assert_eq!(signer.open(&frames).unwrap().content(), "{\"text\":\"a\u{fffd}b\"}");
    }
}
