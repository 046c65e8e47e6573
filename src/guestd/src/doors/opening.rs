//! The first bytes of a connection, which say whether its client speaks HTTP/1.1 or HTTP/2.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};

use super::ByteStream;

/// What a client says before anything else when it speaks HTTP/2 without having asked (RFC 9113 section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Http1,
    Http2,
}

/// A stream whose first bytes were looked at: reading it gives them again, together with what follows. In a read of their own they would
/// make hyper (1.12) keep a buffer twice as large for each connection.
pub(super) struct Opened {
    stream: Box<dyn ByteStream>,
    head: [u8; PREFACE.len()],
    /// The part of `head` that is still to be given.
    from: usize,
    to: usize,
}

impl Opened {
    /// Reads as much as it takes to know. A stream that ends before is HTTP/1.1.
    ///
    /// # Errors
    /// When the stream breaks.
    pub(super) async fn read(mut stream: Box<dyn ByteStream>) -> io::Result<(Self, Version)> {
        let mut head = [0; PREFACE.len()];
        let mut to = 0;
        let version = loop {
            let count = stream.read(&mut head[to..]).await?;
            to += count;
            if count == 0 || head[..to] != PREFACE[..to] {
                break Version::Http1;
            }
            if to == PREFACE.len() {
                break Version::Http2;
            }
        };
        Ok((Self { stream, head, from: 0, to }, version))
    }
}

impl AsyncRead for Opened {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let me = &mut *self;
        let given = buffer.remaining().min(me.to - me.from);
        buffer.put_slice(&me.head[me.from..me.from + given]);
        me.from += given;
        match Pin::new(&mut me.stream).poll_read(cx, buffer) {
            // An error or an end is still there at the next read.
            Poll::Pending | Poll::Ready(Err(_)) if given > 0 => Poll::Ready(Ok(())),
            read => read,
        }
    }
}

impl AsyncWrite for Opened {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    async fn opened(pieces: &[&[u8]]) -> (Opened, Version) {
        let (mut client, server) = tokio::io::duplex(1024);
        let pieces: Vec<_> = pieces.iter().map(|piece| piece.to_vec()).collect();
        tokio::spawn(async move {
            for piece in pieces {
                client.write_all(&piece).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
        Opened::read(Box::new(server)).await.unwrap()
    }

    #[tokio::test]
    async fn a_client_is_known_by_its_first_bytes_however_they_come() {
        let halves = [&PREFACE[..7], &PREFACE[7..], b"rest"];
        for (pieces, version) in [
            (&[&PREFACE[..]][..], Version::Http2),
            (&halves, Version::Http2),
            (&[b"G", b"ET / HTTP/1.1\r\n\r\n"], Version::Http1),
            (&[b"PRI * HTTP/1.1\r\n\r\n"], Version::Http1),
            (&[b"PRI"], Version::Http1),
            (&[], Version::Http1),
        ] {
            let (mut opened, known) = opened(pieces).await;
            assert_eq!(known, version, "{pieces:?}");
            let mut all = Vec::new();
            opened.read_to_end(&mut all).await.unwrap();
            assert_eq!(all, pieces.concat());
        }
    }

    #[tokio::test]
    async fn the_first_read_gives_what_was_looked_at_and_what_follows() {
        let request = b"GET /a/long/enough/path HTTP/1.1\r\nHost: a\r\n\r\n";
        let (mut opened, _) = opened(&[request]).await;
        let mut buffer = [0; 1024];
        assert_eq!(opened.read(&mut buffer).await.unwrap(), request.len());
    }
}
