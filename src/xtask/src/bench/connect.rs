//! The Connect protocol as far as a client of `process.Process` needs it (contract: envd.md sections 1.2 to 1.6).

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::http::{self, Response};

/// Flag of the last frame of a stream.
const END_OF_STREAM: u8 = 2;

/// How the agent's JSON codec begins a piece of standard output.
const JSON_STDOUT: &[u8] = br#"{"event":{"data":{"stdout":""#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    Json,
    Binary,
}

/// The whole request that starts `command` with its arguments.
pub fn start(codec: Codec, command: &[&str], stdin: bool) -> Vec<u8> {
    let (program, arguments) = command.split_first().unwrap_or((&"", &[]));
    let message = match codec {
        Codec::Json => {
            json!({"process": {"cmd": program, "args": arguments}, "stdin": stdin}).to_string().into_bytes()
        }
        Codec::Binary => {
            let mut process = field(1, program.as_bytes());
            arguments.iter().for_each(|argument| process.extend(field(2, argument.as_bytes())));
            let mut message = field(1, &process);
            message.extend([4 << 3, u8::from(stdin)]);
            message
        }
    };
    stream_request("Start", codec, &message)
}

/// The whole request that attaches to a process.
pub fn attach(pid: u32) -> Vec<u8> {
    stream_request("Connect", Codec::Json, json!({"process": {"pid": pid}}).to_string().as_bytes())
}

/// The whole request that writes to a process's standard input.
pub fn send_input(pid: u32, bytes: &[u8]) -> Vec<u8> {
    let input = json!({"process": {"pid": pid}, "input": {"stdin": STANDARD.encode(bytes)}});
    unary_request("SendInput", &input)
}

pub fn close_stdin(pid: u32) -> Vec<u8> {
    unary_request("CloseStdin", &json!({"process": {"pid": pid}}))
}

pub fn kill(pid: u32) -> Vec<u8> {
    unary_request("SendSignal", &json!({"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"}))
}

fn unary_request(method: &str, message: &Value) -> Vec<u8> {
    let body = message.to_string();
    let headers = [("Content-Type", "application/json"), ("Connect-Protocol-Version", "1")];
    let mut request =
        http::head("POST", &format!("/process.Process/{method}"), &headers, Some(body.len() as u64));
    request.extend_from_slice(body.as_bytes());
    request
}

fn stream_request(method: &str, codec: Codec, message: &[u8]) -> Vec<u8> {
    let kind = match codec {
        Codec::Json => "application/connect+json",
        Codec::Binary => "application/connect+proto",
    };
    let headers = [("Content-Type", kind), ("Connect-Protocol-Version", "1")];
    let length = message.len() + 5;
    let mut request =
        http::head("POST", &format!("/process.Process/{method}"), &headers, Some(length as u64));
    request.push(0);
    request.extend(u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    request.extend_from_slice(message);
    request
}

/// A length-delimited protobuf field.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![(number << 3) | 2];
    let mut length = bytes.len();
    while length >= 0x80 {
        out.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    out.push(length as u8);
    out.extend_from_slice(bytes);
    out
}

/// What a stream of a process says.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    Start {
        pid: u32,
    },
    Output(Output<'a>),
    End {
        exit_code: i32,
    },
    /// A keepalive, or an event that this client does not know.
    Other,
}

/// A piece of output, as it is on the wire: most rows only count it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output<'a> {
    Base64(&'a [u8]),
    Raw(&'a [u8]),
}

impl Output<'_> {
    /// In bytes of what the process wrote.
    pub fn len(&self) -> usize {
        match self {
            Self::Base64(text) => {
                let padding = text.iter().rev().take_while(|byte| **byte == b'=').count();
                text.len() / 4 * 3 - padding
            }
            Self::Raw(bytes) => bytes.len(),
        }
    }

    /// # Errors
    /// When it is no base64.
    pub fn decode(&self) -> Result<Vec<u8>> {
        match self {
            Self::Base64(text) => Ok(STANDARD.decode(text)?),
            Self::Raw(bytes) => Ok(bytes.to_vec()),
        }
    }
}

/// One streaming response, fed in pieces of any size.
#[derive(Debug)]
pub struct StreamReader {
    codec: Codec,
    response: Response,
    /// Frames that are not whole yet.
    pending: Vec<u8>,
    /// How the stream ended.
    closed: bool,
}

impl StreamReader {
    pub fn new(codec: Codec) -> Self {
        Self { codec, response: Response::new(), pending: Vec::new(), closed: false }
    }

    /// The response is over, to its last byte.
    pub fn is_done(&self) -> bool {
        self.closed && self.response.is_done()
    }

    /// # Errors
    /// When the stream is broken, ends with an error, or `on` fails.
    pub fn feed(&mut self, input: &[u8], on: &mut dyn FnMut(Event<'_>) -> Result<()>) -> Result<()> {
        let Self { codec, response, pending, closed } = self;
        let mut outcome = Ok(());
        let taken = response.feed(input, &mut |piece| {
            if outcome.is_ok() {
                outcome = frames(*codec, pending, piece, closed, on);
            }
        })?;
        outcome?;
        if response.status() != 0 && response.status() != 200 {
            bail!("a stream was refused with status {}", response.status());
        }
        if taken < input.len() {
            bail!("{} bytes after the end of a stream", input.len() - taken);
        }
        if response.is_done() && !*closed {
            bail!("a stream without its last frame");
        }
        Ok(())
    }
}

fn frames(
    codec: Codec,
    pending: &mut Vec<u8>,
    piece: &[u8],
    closed: &mut bool,
    on: &mut dyn FnMut(Event<'_>) -> Result<()>,
) -> Result<()> {
    // The agent flushes whole frames: most pieces need no copy.
    let joined = if pending.is_empty() {
        None
    } else {
        pending.extend_from_slice(piece);
        Some(std::mem::take(pending))
    };
    let mut rest = joined.as_deref().unwrap_or(piece);
    while let Some((flags, message, after)) = split_frame(rest) {
        if *closed {
            bail!("a frame after the last");
        }
        if flags & END_OF_STREAM != 0 {
            let end: Value = serde_json::from_slice(message).context("the last frame is no JSON")?;
            if let Some(error) = end.get("error") {
                bail!("a stream ended with {error}");
            }
            *closed = true;
        } else {
            on(event(codec, message)?)?;
        }
        rest = after;
    }
    pending.extend_from_slice(rest);
    Ok(())
}

fn split_frame(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<5>()?;
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let (message, after) = rest.split_at_checked(length)?;
    Some((head[0], message, after))
}

fn event(codec: Codec, message: &[u8]) -> Result<Event<'_>> {
    match codec {
        Codec::Json => json_event(message),
        Codec::Binary => binary_event(message),
    }
}

fn json_event(message: &[u8]) -> Result<Event<'_>> {
    if let Some(text) = message.strip_prefix(JSON_STDOUT).and_then(|rest| rest.strip_suffix(br#""}}}"#)) {
        return Ok(Event::Output(Output::Base64(text)));
    }
    let value: Value = serde_json::from_slice(message).context("an event is no JSON")?;
    let event = &value["event"];
    if let Some(pid) = event["start"]["pid"].as_u64() {
        return Ok(Event::Start { pid: u32::try_from(pid)? });
    }
    if let Some(end) = event.get("end") {
        let code = end.get("exitCode").and_then(Value::as_i64).unwrap_or(0);
        return Ok(Event::End { exit_code: i32::try_from(code)? });
    }
    if event.get("data").is_some() {
        bail!("an output event that is not standard output: {value}");
    }
    Ok(Event::Other)
}

fn binary_event(message: &[u8]) -> Result<Event<'_>> {
    let event = find_field(message, 1)?.and_then(Field::bytes).unwrap_or_default();
    if let Some(start) = find_field(event, 1)?.and_then(Field::bytes) {
        let pid = find_field(start, 1)?.and_then(Field::number).unwrap_or_default();
        return Ok(Event::Start { pid: u32::try_from(pid)? });
    }
    if let Some(data) = find_field(event, 2)?.and_then(Field::bytes) {
        let Some(bytes) = find_field(data, 1)?.and_then(Field::bytes) else {
            bail!("an output event that is not standard output")
        };
        return Ok(Event::Output(Output::Raw(bytes)));
    }
    if let Some(end) = find_field(event, 3)?.and_then(Field::bytes) {
        let zigzag = find_field(end, 1)?.and_then(Field::number).unwrap_or_default();
        let code = (zigzag >> 1) as i64 ^ -((zigzag & 1) as i64);
        return Ok(Event::End { exit_code: i32::try_from(code)? });
    }
    Ok(Event::Other)
}

enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

impl<'a> Field<'a> {
    fn bytes(self) -> Option<&'a [u8]> {
        if let Self::Bytes(bytes) = self { Some(bytes) } else { None }
    }

    fn number(self) -> Option<u64> {
        if let Self::Number(number) = self { Some(number) } else { None }
    }
}

/// The first field of that number.
fn find_field(mut message: &[u8], wanted: u64) -> Result<Option<Field<'_>>> {
    while !message.is_empty() {
        let key = varint(&mut message)?;
        let value = match key & 7 {
            0 => Field::Number(varint(&mut message)?),
            2 => {
                let length = usize::try_from(varint(&mut message)?)?;
                let (bytes, rest) = message.split_at_checked(length).context("a field is cut short")?;
                message = rest;
                Field::Bytes(bytes)
            }
            kind => bail!("a protobuf field of kind {kind}"),
        };
        if key >> 3 == wanted {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

fn varint(message: &mut &[u8]) -> Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first().context("a number is cut short")?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    bail!("a number does not end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(flags: u8, message: &[u8]) -> Vec<u8> {
        let mut out = vec![flags];
        out.extend((message.len() as u32).to_be_bytes());
        out.extend_from_slice(message);
        out
    }

    fn response(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut out = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n".to_vec();
        for frame in frames {
            out.extend(format!("{:x}\r\n", frame.len()).bytes().chain(frame.clone()).chain(*b"\r\n"));
        }
        out.extend(b"0\r\n\r\n");
        out
    }

    fn read(codec: Codec, pieces: &[&[u8]]) -> Result<(String, bool)> {
        let mut reader = StreamReader::new(codec);
        let mut seen = String::new();
        for piece in pieces {
            reader.feed(piece, &mut |event| {
                match event {
                    Event::Start { pid } => seen.push_str(&format!("start {pid};")),
                    Event::Output(output) => {
                        assert_eq!(output.len(), output.decode()?.len());
                        seen.push_str(&String::from_utf8_lossy(&output.decode()?));
                    }
                    Event::End { exit_code } => seen.push_str(&format!(";end {exit_code}")),
                    Event::Other => seen.push('.'),
                }
                Ok(())
            })?;
        }
        Ok((seen, reader.is_done()))
    }

    #[test]
    fn both_codecs_say_the_same_however_the_network_cuts_it() {
        let json = response(&[
            frame(0, br#"{"event":{"start":{"pid":7}}}"#),
            frame(0, br#"{"event":{"data":{"stdout":"aGVsbG8="}}}"#),
            frame(0, br#"{"event":{"keepalive":{}}}"#),
            frame(0, br#"{"event":{"end":{"exitCode":-1,"status":"signal: killed"}}}"#),
            frame(END_OF_STREAM, b"{}"),
        ]);
        let event = |number, inner: &[u8]| frame(0, &field(1, &field(number, inner)));
        let binary = response(&[
            event(1, &[1 << 3, 7]),
            event(2, &field(1, b"hello")),
            event(4, b""),
            event(3, &[1 << 3, 1, (3 << 3) | 2, 0]),
            frame(END_OF_STREAM, b"{}"),
        ]);
        for (codec, bytes) in [(Codec::Json, json), (Codec::Binary, binary)] {
            for cut in 0..=bytes.len() {
                let (seen, done) = read(codec, &[&bytes[..cut], &bytes[cut..]]).unwrap();
                assert_eq!(seen, "start 7;hello.;end -1", "{codec:?} cut at {cut}");
                assert!(done);
            }
        }
    }

    #[test]
    fn an_error_in_the_last_frame_is_an_error() {
        let bytes = response(&[frame(END_OF_STREAM, br#"{"error":{"code":"not_found"}}"#)]);
        assert!(read(Codec::Json, &[&bytes]).unwrap_err().to_string().contains("not_found"));
    }

    #[test]
    fn a_stream_that_breaks_off_is_not_taken_for_its_end() {
        let bytes = response(&[frame(0, br#"{"event":{"start":{"pid":7}}}"#)]);
        assert!(read(Codec::Json, &[&bytes]).is_err());
        let bytes = response(&[frame(END_OF_STREAM, b"{}"), frame(0, b"{}")]);
        assert!(read(Codec::Json, &[&bytes]).is_err());
    }

    #[test]
    fn long_fields_carry_a_long_length() {
        let bytes = field(1, &[b'x'; 300]);
        assert_eq!(&bytes[..3], [10, 0xac, 2]);
        assert_eq!(find_field(&bytes, 1).unwrap().and_then(Field::bytes).map(<[u8]>::len), Some(300));
    }
}
