//! What a kernel says: its frames, its signatures and its words are anything. What clients read of it is whole lines of JSON.

use arbitrary::Unstructured;
use axum::body::Bytes;
use guestd::code::event::{self, Heard};
use guestd::code::message::{Message, Signer};
use guestd::code::zmtp::{Kind, Received, Socket};
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::agent;

const KEY: &str = "a-key-that-nobody-guesses";
const GREETING: usize = 64;
const KINDS: [&str; 8] = [
    "stream",
    "display_data",
    "execute_result",
    "error",
    "status",
    "execute_input",
    "execute_reply",
    "comm_open",
];
const WORDS: [&str; 16] = [
    r#"{"name":"stdout","text":"#,
    r#"{"data":{"text/plain":"#,
    r#""image/png":"#,
    r#""application/json":"#,
    r#"{"ename":"E","evalue":"#,
    r#","traceback":["#,
    r#"{"execution_state":"idle"}"#,
    r#"{"execution_count":"#,
    "\"'\\\"",
    "\"\\ud800\"",
    "null",
    "[\"a\",\n\"b\"]",
    "\r\n",
    ",",
    "}",
    "}}",
];

pub fn run(data: &[u8]) {
    let _end_of_data = talk(&mut Unstructured::new(data));
}

fn talk(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    // A kernel that keeps to the protocol is understood, whatever it says.
    let is_honest = input.arbitrary()?;
    let kernel = Signer::new(KEY, "kernel".to_owned());
    let (mut bytes, mut sent) = (Vec::new(), 0);
    while !input.is_empty() && bytes.len() < 16 * 1024 {
        if is_honest || input.arbitrary()? {
            put(&mut bytes, &kernel.seal("1", input.choose(&KINDS)?, &content(input)?));
            sent += 1;
        } else {
            let length = input.int_in_range(0..=32)?;
            bytes.extend_from_slice(input.bytes(usize::min(length, input.len()))?);
        }
    }
    let (heard, unread) = agent::block_on(listen(bytes));
    assert!(!is_honest || (heard.len(), unread) == (sent, 0), "{} of {sent}, {unread} unread", heard.len());
    for message in &heard {
        if let Heard::Line(line) | Heard::Error(line) = event::translate(message) {
            assert!(!line.contains(['\n', '\r']), "{line:?} is more than one line");
            serde_json::from_str::<&RawValue>(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        }
    }
    Ok(())
}

/// JSON, more or less.
fn content(input: &mut Unstructured<'_>) -> arbitrary::Result<String> {
    let mut content = String::new();
    while !input.is_empty() && content.len() < 2048 && input.ratio(7, 8)? {
        match input.int_in_range(0..=2_u8)? {
            0 => content.push_str(input.choose(&WORDS)?),
            1 => content.push_str(&serde_json::Value::from(input.arbitrary::<&str>()?).to_string()),
            _ => content.push_str(input.arbitrary()?),
        }
    }
    Ok(content)
}

/// A message as its frames go over the wire (rfc.zeromq.org/spec/23).
fn put(bytes: &mut Vec<u8>, frames: &[Bytes]) {
    for (place, frame) in frames.iter().enumerate() {
        let more = u8::from(place + 1 < frames.len());
        match u8::try_from(frame.len()) {
            Ok(length) => bytes.extend([more, length]),
            Err(_) => {
                bytes.push(more | 2);
                bytes.extend((frame.len() as u64).to_be_bytes());
            }
        }
        bytes.extend_from_slice(frame);
    }
}

/// Shakes hands and reads to the end: what the kernel of the key said, and how many messages were somebody else's.
async fn listen(bytes: Vec<u8>) -> (Vec<Message>, usize) {
    let (ours, mut theirs) = tokio::io::duplex(4096);
    let kernel = async move {
        let mut greeting = [0; GREETING];
        theirs.read_exact(&mut greeting).await.expect("a greeting");
        theirs.write_all(&greeting).await.expect("a reader");
        theirs.write_all(b"\x04\x06\x05READY").await.expect("a reader");
        theirs.write_all(&bytes).await.expect("a reader");
        theirs.shutdown().await.expect("a reader");
        // What the agent sends is read, so that it never waits.
        while theirs.read(&mut greeting).await.is_ok_and(|length| length > 0) {}
    };
    let agent = async move {
        let mut socket = Socket::open(ours, Kind::Sub).await.expect("a handshake");
        let signer = Signer::new(KEY, "agent".to_owned());
        let (mut heard, mut unread) = (Vec::new(), 0);
        while let Ok(received) = socket.receive().await {
            match received {
                Received::Message(frames) => match signer.open(&frames) {
                    Ok(message) => heard.push(message),
                    Err(_) => unread += 1,
                },
                Received::TooLong => unread += 1,
            }
        }
        (heard, unread)
    };
    let both = async { tokio::join!(agent, kernel).0 };
    tokio::time::timeout(std::time::Duration::from_secs(8), both).await.expect("an end")
}
