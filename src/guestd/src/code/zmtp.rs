//! The client's side of ZMTP 3.0 with the mechanism NULL (rfc.zeromq.org/spec/23), as much as a kernel's sockets need: DEALER and SUB.
//!
//! The other end is code of the sandbox: what it announces is believed only as far as [`LIMIT`] goes.

use std::io;

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// What one message may hold, in bytes: no more of a cell is kept unread. A longer one is read to its end and left out.
const LIMIT: usize = 64 << 20;

/// How many frames a message may have.
const FRAMES: usize = 64;

/// The longest command, in bytes: a READY with the socket's properties.
const COMMAND_LIMIT: usize = 4096;

const GREETING: usize = 64;

const MORE: u8 = 1;
const LONG: u8 = 2;
const COMMAND: u8 = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Dealer,
    /// Subscribed to everything.
    Sub,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Dealer => "DEALER",
            Self::Sub => "SUB",
        }
    }
}

/// What came.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    Message(Vec<Bytes>),
    /// A message that was too long, or of too many frames.
    TooLong,
}

/// What is read at the moment.
#[derive(Clone, Copy, Debug)]
struct Frame {
    flags: u8,
    /// What is missing of it, in bytes.
    left: u64,
}

/// A byte stream of a Unix socket or of TCP.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// One connection after its handshake.
pub struct Socket {
    stream: Box<dyn Stream>,
    input: BytesMut,
    frame: Option<Frame>,
    frames: Vec<Bytes>,
    /// The bytes of `frames`.
    size: usize,
    too_long: bool,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket").field("frame", &self.frame).field("size", &self.size).finish_non_exhaustive()
    }
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Socket {
    /// Shakes hands over a new connection. Whoever waits bounds it.
    ///
    /// # Errors
    /// The stream's; `InvalidData` for a peer that speaks something else.
    pub async fn open(stream: impl Stream + 'static, kind: Kind) -> io::Result<Self> {
        let mut socket = Self {
            stream: Box::new(stream),
            input: BytesMut::new(),
            frame: None,
            frames: Vec::new(),
            size: 0,
            too_long: false,
        };
        let mut greeting = [0; GREETING];
        (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
        greeting[12..16].copy_from_slice(b"NULL");
        socket.stream.write_all(&greeting).await?;
        let mut theirs = [0; GREETING];
        socket.stream.read_exact(&mut theirs).await?;
        if theirs[0] != 0xff || theirs[9] & 1 == 0 || theirs[10] < 3 {
            return Err(invalid("the peer does not speak ZMTP 3"));
        }
        if &theirs[12..17] != b"NULL\0" {
            return Err(invalid("the peer asks for a security mechanism"));
        }
        socket.stream.write_all(&ready(kind)).await?;
        let answer = socket.command().await?;
        if !answer.starts_with(b"\x05READY") {
            return Err(invalid("the peer refused the connection"));
        }
        if kind == Kind::Sub {
            // A one and a topic: the empty one is every one's prefix.
            socket.send(&[Bytes::from_static(&[1])]).await?;
        }
        Ok(socket)
    }

    async fn command(&mut self) -> io::Result<Vec<u8>> {
        let flags = self.stream.read_u8().await?;
        let length = if flags & LONG == 0 {
            u64::from(self.stream.read_u8().await?)
        } else {
            self.stream.read_u64().await?
        };
        let length = usize::try_from(length).ok().filter(|length| *length <= COMMAND_LIMIT);
        let (Some(length), COMMAND) = (length, flags & COMMAND) else {
            return Err(invalid("no command came first"));
        };
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        Ok(body)
    }

    /// Sends a message. After an error, or when the future was dropped, the connection is of no use.
    ///
    /// # Errors
    /// The stream's.
    pub async fn send(&mut self, frames: &[Bytes]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 9).sum());
        for (place, frame) in frames.iter().enumerate() {
            let more = if place + 1 < frames.len() { MORE } else { 0 };
            match u8::try_from(frame.len()) {
                Ok(length) => bytes.extend([more, length]),
                Err(_) => {
                    bytes.push(more | LONG);
                    bytes.extend((frame.len() as u64).to_be_bytes());
                }
            }
            bytes.extend_from_slice(frame);
        }
        self.stream.write_all(&bytes).await
    }

    /// The next message. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The stream's; `UnexpectedEof` when the peer closed it.
    pub async fn receive(&mut self) -> io::Result<Received> {
        loop {
            if let Some(received) = self.take() {
                return Ok(received);
            }
            // What is known to come is made room for at once, within the limit.
            let wanted = self.frame.map_or(0, |frame| usize::try_from(frame.left).unwrap_or(LIMIT));
            if !self.too_long {
                self.input.reserve(wanted.saturating_sub(self.input.len()).clamp(4096, LIMIT));
            } else if self.input.capacity() == self.input.len() {
                self.input.reserve(4096);
            }
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Takes apart what was read; None when more is needed.
    fn take(&mut self) -> Option<Received> {
        loop {
            let Frame { flags, left } = match self.frame {
                Some(frame) => frame,
                None => self.header()?,
            };
            if self.too_long && flags & COMMAND == 0 {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(self.input.len());
                self.input.advance(here);
                let left = left - here as u64;
                self.frame = Some(Frame { flags, left });
                if left > 0 {
                    return None;
                }
            } else {
                // Within the limit.
                let length = usize::try_from(left).ok()?;
                if self.input.len() < length {
                    return None;
                }
                let body = self.input.split_to(length).freeze();
                if flags & COMMAND == 0 {
                    self.size += body.len();
                    self.frames.push(body);
                }
            }
            self.frame = None;
            if self.input.is_empty() {
                // A large message's room goes with it.
                self.input = BytesMut::new();
            }
            if flags & (MORE | COMMAND) == 0 {
                self.size = 0;
                let frames = std::mem::take(&mut self.frames);
                return Some(if std::mem::take(&mut self.too_long) {
                    Received::TooLong
                } else {
                    Received::Message(frames)
                });
            }
        }
    }

    /// The beginning of a frame, if it is here.
    fn header(&mut self) -> Option<Frame> {
        let flags = *self.input.first()?;
        let left = if flags & LONG == 0 {
            let length = *self.input.get(1)?;
            self.input.advance(2);
            u64::from(length)
        } else {
            let length = self.input.get(1..9)?.try_into().ok().map(u64::from_be_bytes)?;
            self.input.advance(9);
            length
        };
        let fits = usize::try_from(left).is_ok_and(|length| length <= LIMIT - self.size.min(LIMIT));
        if !fits || self.frames.len() >= FRAMES {
            // A command of that length is no command; it is skipped as what it says it is not.
            self.too_long = true;
            (self.frames, self.size) = (Vec::new(), 0);
        }
        let flags = if fits { flags } else { flags & !COMMAND };
        let frame = Frame { flags, left };
        self.frame = Some(frame);
        Some(frame)
    }
}

/// The READY command of a socket without an identity.
fn ready(kind: Kind) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    for (name, value) in [("Socket-Type", kind.name()), ("Identity", "")] {
        body.push(u8::try_from(name.len()).unwrap_or_default());
        body.extend_from_slice(name.as_bytes());
        body.extend(u32::try_from(value.len()).unwrap_or_default().to_be_bytes());
        body.extend_from_slice(value.as_bytes());
    }
    let mut command = vec![COMMAND, u8::try_from(body.len()).unwrap_or_default()];
    command.extend(body);
    command
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    /// A peer that shakes hands as libzmq does: what it got after its READY, and its end of the connection.
    async fn peer(kind: Kind) -> (Socket, DuplexStream) {
        let (ours, mut theirs) = tokio::io::duplex(1 << 20);
        let opening = tokio::spawn(async move { Socket::open(ours, kind).await });
        let mut greeting = [0; GREETING];
        theirs.read_exact(&mut greeting).await.unwrap();
        assert_eq!((&greeting[..1], &greeting[9..17]), (&b"\xff"[..], &b"\x7f\x03\0NULL\0"[..]));
        theirs.write_all(&greeting).await.unwrap();
        let mut head = [0; 2];
        theirs.read_exact(&mut head).await.unwrap();
        let mut body = vec![0; usize::from(head[1])];
        theirs.read_exact(&mut body).await.unwrap();
        assert!(body.starts_with(b"\x05READY\x0bSocket-Type"));
        theirs.write_all(b"\x04\x06\x05READY").await.unwrap();
        (opening.await.unwrap().unwrap(), theirs)
    }

    fn message(parts: &[&'static [u8]]) -> Received {
        Received::Message(parts.iter().map(|part| Bytes::from_static(part)).collect())
    }

    #[tokio::test]
    async fn a_subscriber_asks_for_everything() {
        let (_socket, mut theirs) = peer(Kind::Sub).await;
        let mut asked = [0; 3];
        theirs.read_exact(&mut asked).await.unwrap();
        assert_eq!(asked, [0, 1, 1]);
    }

    #[tokio::test]
    async fn messages_come_whole_however_they_are_cut() {
        let (mut socket, mut theirs) = peer(Kind::Dealer).await;
        let bytes = b"\x01\x02ab\x00\x00\x04\x03\x04PIN\x03\0\0\0\0\0\0\0\x01c\x00\x01d";
        for byte in bytes {
            theirs.write_all(&[*byte]).await.unwrap();
            // Dropped while it waits, again and again.
            let early = tokio::time::timeout(std::time::Duration::from_millis(1), socket.receive()).await;
            if let Ok(received) = early {
                let received = received.unwrap();
                assert!(
                    received == message(&[b"ab", b""]) || received == message(&[b"c", b"d"]),
                    "{received:?}"
                );
            }
        }
    }

    #[tokio::test]
    async fn what_is_sent_can_be_read_back() {
        let (mut socket, mut theirs) = peer(Kind::Dealer).await;
        let long = Bytes::from(vec![b'x'; 300]);
        let frames = [Bytes::from_static(b"a"), long, Bytes::new()];
        socket.send(&frames).await.unwrap();
        let mut sent = vec![0; 3 + 9 + 300 + 2];
        theirs.read_exact(&mut sent).await.unwrap();
        theirs.write_all(&sent).await.unwrap();
        assert_eq!(socket.receive().await.unwrap(), Received::Message(frames.to_vec()));
    }

    #[tokio::test]
    async fn a_length_that_is_a_lie_takes_no_memory_and_ends_nothing() {
        let (mut socket, mut theirs) = peer(Kind::Dealer).await;
        theirs.write_all(&[LONG]).await.unwrap();
        theirs.write_all(&u64::MAX.to_be_bytes()).await.unwrap();
        theirs.write_all(&[0; 4096]).await.unwrap();
        drop(theirs);
        let error = socket.receive().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(socket.input.capacity() < 1 << 20, "{}", socket.input.capacity());
    }

    #[tokio::test]
    async fn a_message_that_is_too_long_is_left_out_and_the_next_one_comes() {
        let (mut socket, mut theirs) = peer(Kind::Dealer).await;
        let sending = tokio::spawn(async move {
            theirs.write_all(b"\x01\x01a").await.unwrap();
            theirs.write_all(&[LONG | MORE]).await.unwrap();
            theirs.write_all(&(LIMIT as u64 + 1).to_be_bytes()).await.unwrap();
            let piece = vec![0; 1 << 20];
            for _ in 0..LIMIT >> 20 {
                theirs.write_all(&piece).await.unwrap();
            }
            theirs.write_all(b"x\x00\x01z\x00\x02ok").await.unwrap();
            theirs.write_all(&[&b"\x01\x00"[..]; FRAMES + 5].concat()).await.unwrap();
            theirs.write_all(b"\x00\x00\x00\x01e").await.unwrap();
            theirs
        });
        assert_eq!(socket.receive().await.unwrap(), Received::TooLong);
        assert!(socket.input.capacity() < 8 << 20, "{}", socket.input.capacity());
        assert_eq!(socket.receive().await.unwrap(), message(&[b"ok"]));
        assert_eq!(socket.receive().await.unwrap(), Received::TooLong);
        assert_eq!(socket.receive().await.unwrap(), message(&[b"e"]));
        drop(sending.await.unwrap());
    }

    #[tokio::test]
    async fn a_peer_that_speaks_something_else_is_refused() {
        for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], &[0xff; GREETING][..], &[0; GREETING][..]] {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            theirs.write_all(answer).await.unwrap();
            theirs.shutdown().await.unwrap();
            assert!(Socket::open(ours, Kind::Dealer).await.is_err());
        }
    }
}
