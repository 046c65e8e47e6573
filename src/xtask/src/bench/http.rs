//! HTTP/1.1 as a client that must never be what is slow: a response is taken apart where it was read, without a copy.

use anyhow::{Result, bail};

/// Longer heads than the agent's are no answer of its.
const HEAD_LIMIT: usize = 64 * 1024;

/// One response, fed in pieces of any size.
#[derive(Debug)]
pub struct Response {
    head: Vec<u8>,
    status: u16,
    body: Body,
}

#[derive(Debug)]
enum Body {
    /// The head is not whole yet.
    Unknown,
    Length(u64),
    Chunked(Chunks),
    Done,
}

impl Response {
    pub fn new() -> Self {
        Self { head: Vec::new(), status: 0, body: Body::Unknown }
    }

    /// The status code; 0 before the head is whole.
    pub fn status(&self) -> u16 {
        self.status
    }

    pub fn is_done(&self) -> bool {
        matches!(self.body, Body::Done)
    }

    /// Takes what belongs to this response, hands pieces of its body on, and returns how much it took.
    ///
    /// # Errors
    /// When this is no HTTP/1.1 response that says where its body ends.
    pub fn feed(&mut self, mut input: &[u8], on_body: &mut dyn FnMut(&[u8])) -> Result<usize> {
        let whole = input.len();
        if matches!(self.body, Body::Unknown) {
            input = self.feed_head(input)?;
        }
        match &mut self.body {
            Body::Unknown | Body::Done => {}
            Body::Length(left) => {
                let taken = input.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                on_body(&input[..taken]);
                *left -= taken as u64;
                input = &input[taken..];
                if *left == 0 {
                    self.body = Body::Done;
                }
            }
            Body::Chunked(chunks) => {
                let taken = chunks.feed(input, on_body)?;
                input = &input[taken..];
                if chunks.is_done() {
                    self.body = Body::Done;
                }
            }
        }
        Ok(whole - input.len())
    }

    fn feed_head<'a>(&mut self, input: &'a [u8]) -> Result<&'a [u8]> {
        const END: &[u8] = b"\r\n\r\n";
        let before = self.head.len();
        self.head.extend_from_slice(input);
        let from = before.saturating_sub(END.len() - 1);
        let Some(at) = self.head[from..].windows(END.len()).position(|window| window == END) else {
            if self.head.len() > HEAD_LIMIT {
                bail!("the response's head does not end");
            }
            return Ok(&[]);
        };
        let end = from + at + END.len();
        let text = String::from_utf8_lossy(&self.head[..end]).into_owned();
        self.read_head(&text)?;
        Ok(&input[end - before..])
    }

    fn read_head(&mut self, text: &str) -> Result<()> {
        let mut lines = text.split("\r\n");
        let status =
            lines.next().and_then(|line| line.strip_prefix("HTTP/1.1 ")).and_then(|rest| rest.get(..3));
        let Some(status) = status.and_then(|digits| digits.parse().ok()) else {
            bail!("not an HTTP/1.1 response: {:?}", text.lines().next().unwrap_or_default());
        };
        self.status = status;
        let mut length = (status == 204 || status == 304).then_some(0);
        let mut chunked = false;
        for line in lines {
            let Some((name, value)) = line.split_once(':') else { continue };
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse()?);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                chunked = value.trim().eq_ignore_ascii_case("chunked");
            }
        }
        self.body = match length {
            _ if chunked => Body::Chunked(Chunks::new()),
            Some(0) => Body::Done,
            Some(length) => Body::Length(length),
            None => bail!("a response that ends with its connection: {text:?}"),
        };
        Ok(())
    }
}

/// A chunked body (RFC 9112 section 7.1).
#[derive(Debug)]
struct Chunks {
    state: Chunk,
}

#[derive(Debug)]
enum Chunk {
    /// Digits of the size so far.
    Size {
        size: u64,
        digits: u8,
    },
    /// After a `;`, to the end of the line.
    Extension {
        size: u64,
    },
    SizeEnd {
        size: u64,
    },
    Data {
        left: u64,
    },
    DataReturn,
    DataEnd,
    /// How long the line of the trailer is so far.
    Trailer {
        length: usize,
    },
    TrailerEnd {
        length: usize,
    },
    Done,
}

impl Chunks {
    fn new() -> Self {
        Self { state: Chunk::Size { size: 0, digits: 0 } }
    }

    fn is_done(&self) -> bool {
        matches!(self.state, Chunk::Done)
    }

    fn feed(&mut self, input: &[u8], on_body: &mut dyn FnMut(&[u8])) -> Result<usize> {
        let mut at = 0;
        while at < input.len() {
            if let Chunk::Data { left } = &mut self.state {
                let taken = (input.len() - at).min(usize::try_from(*left).unwrap_or(usize::MAX));
                on_body(&input[at..at + taken]);
                at += taken;
                *left -= taken as u64;
                if *left == 0 {
                    self.state = Chunk::DataReturn;
                }
                continue;
            }
            if self.is_done() {
                break;
            }
            self.state = self.state.step(input[at])?;
            at += 1;
        }
        Ok(at)
    }
}

impl Chunk {
    /// Any state but `Data` and `Done`, which take no single bytes.
    fn step(&self, byte: u8) -> Result<Self> {
        let after_size =
            |size| if size == 0 { Self::Trailer { length: 0 } } else { Self::Data { left: size } };
        Ok(match (self, byte) {
            (Self::Size { digits: 1.., size }, b'\r') => Self::SizeEnd { size: *size },
            (Self::Size { digits: 1.., size }, b';') => Self::Extension { size: *size },
            (Self::Size { size, digits: digits @ 0..=15 }, byte) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).unwrap_or_default();
                Self::Size { size: (size << 4) | u64::from(digit), digits: digits + 1 }
            }
            (Self::Extension { size }, b'\r') => Self::SizeEnd { size: *size },
            (Self::Extension { size }, _) => Self::Extension { size: *size },
            (Self::SizeEnd { size }, b'\n') => after_size(*size),
            (Self::DataReturn, b'\r') => Self::DataEnd,
            (Self::DataEnd, b'\n') => Self::Size { size: 0, digits: 0 },
            (Self::Trailer { length }, b'\r') => Self::TrailerEnd { length: *length },
            (Self::Trailer { length }, _) => Self::Trailer { length: length + 1 },
            (Self::TrailerEnd { length: 0 }, b'\n') => Self::Done,
            (Self::TrailerEnd { .. }, b'\n') => Self::Trailer { length: 0 },
            (state, byte) => bail!("a chunked body with {byte:#04x} in state {state:?}"),
        })
    }
}

/// A request line and its headers; the body follows by itself.
pub fn head(method: &str, target: &str, headers: &[(&str, &str)], length: Option<u64>) -> Vec<u8> {
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: guest\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    if let Some(length) = length {
        text.push_str(&format!("Content-Length: {length}\r\n"));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// The value of a query parameter, escaped.
pub fn escape(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: &[u8] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        5\r\nhello\r\n1;note=\"x\"\r\n,\r\n00a\r\n world\r\nyo\r\n0\r\nTrailer: 1\r\n\r\n";
    const SIZED: &[u8] = b"HTTP/1.1 404 Not Found\r\ncontent-length: 5\r\n\r\nhello";

    fn read(response: &mut Response, input: &[u8]) -> (Vec<u8>, usize) {
        let mut body = Vec::new();
        let taken = response.feed(input, &mut |piece| body.extend_from_slice(piece)).unwrap();
        (body, taken)
    }

    #[test]
    fn a_body_is_the_same_however_the_network_cuts_it() {
        for (input, expected) in [(CHUNKED, &b"hello, world\r\nyo"[..]), (SIZED, b"hello")] {
            for cut in 0..=input.len() {
                let mut response = Response::new();
                let (mut body, taken) = read(&mut response, &input[..cut]);
                assert_eq!(taken, cut);
                assert_eq!(response.is_done(), cut == input.len());
                body.extend(read(&mut response, &input[cut..]).0);
                assert!(response.is_done(), "cut at {cut}");
                assert_eq!(body, expected, "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_comes_after_a_response_is_left_alone() {
        for input in [CHUNKED, SIZED] {
            let mut response = Response::new();
            assert_eq!(read(&mut response, &[input, SIZED].concat()).1, input.len());
            assert!(response.is_done());
        }
    }

    #[test]
    fn a_response_without_a_body_ends_with_its_head() {
        let mut response = Response::new();
        read(&mut response, b"HTTP/1.1 204 No Content\r\n\r\n");
        assert!(response.is_done());
        assert_eq!(response.status(), 204);
    }

    #[test]
    fn broken_framing_is_said_and_not_guessed_at() {
        let chunked = |body: &str| format!("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{body}");
        for input in [
            chunked("\r\n"),
            chunked("xyz\r\n"),
            chunked("11111111111111111\r\n"),
            chunked("1\r\nab\r\n"),
            chunked("0\n"),
            "HTTP/1.0 200 OK\r\n\r\n".to_owned(),
            "HTTP/1.1 200 OK\r\n\r\n".to_owned(),
            "x".repeat(HEAD_LIMIT + 1),
        ] {
            assert!(Response::new().feed(input.as_bytes(), &mut |_| ()).is_err(), "{input:.60}");
        }
    }

    #[test]
    fn a_path_is_escaped() {
        assert_eq!(escape("/a b/ü&c"), "/a%20b/%C3%BC%26c");
    }
}
