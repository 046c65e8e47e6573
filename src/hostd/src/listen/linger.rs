//! Closing a connection so that its last words arrive.
//!
//! A socket that is closed while input waits unread is reset (RFC 9293 section 3.6.1, RFC 1122 section 4.2.2.13), and a reset takes with it
//! what the client had not read yet: the 413 of an upload that is still on its way, the close frame of a WebSocket (RFC 6455 section 7.1.1).
//! So the sending side is closed first, and what still comes is read and thrown away until the client closes too.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::timeout;

/// How much is thrown away, in bytes, for how long, and how long without a byte. A client beyond that is reset.
const BYTES: usize = 64 << 20;
const TIME: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(5);

const BUFFER: usize = 16 << 10;

/// A connection that is closed in this way when it is dropped, whoever drops it.
#[derive(Debug)]
pub(super) struct Lingering<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> {
    stream: Option<S>,
    /// Nothing more can come.
    over: bool,
    /// Kept until the connection is gone.
    place: Option<OwnedSemaphorePermit>,
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Lingering<S> {
    pub(super) fn new(stream: S, place: OwnedSemaphorePermit) -> Self {
        Self { stream: Some(stream), over: false, place: Some(place) }
    }

    fn stream(&mut self) -> Pin<&mut S> {
        // Taken in `drop` only.
        Pin::new(self.stream.as_mut().expect("a connection that is not dropped"))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Drop for Lingering<S> {
    fn drop(&mut self) {
        if let (Some(stream), false, Ok(runtime)) = (self.stream.take(), self.over, Handle::try_current()) {
            let place = self.place.take();
            runtime.spawn(async move {
                let _slow = timeout(TIME, discard(stream)).await;
                drop(place);
            });
        }
    }
}

async fn discard(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut left = BYTES;
    let mut buffer = vec![0; BUFFER];
    if stream.shutdown().await.is_err() {
        return;
    }
    while let Ok(Ok(read @ 1..)) = timeout(SILENCE, stream.read(&mut buffer)).await {
        if read > left {
            return;
        }
        left -= read;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> AsyncRead for Lingering<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.remaining();
        let read = ready!(self.stream().poll_read(cx, buffer));
        self.over |= read.is_err() || (before > 0 && buffer.remaining() == before);
        Poll::Ready(read)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> AsyncWrite for Lingering<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.stream().poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream().poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream().poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{DuplexStream, duplex};
    use tokio::sync::Semaphore;
    use tokio::time::{Instant, sleep};

    use super::*;

    const CHUNK: usize = 1 << 20;

    fn lingering(stream: DuplexStream) -> (Lingering<DuplexStream>, Arc<Semaphore>) {
        let places = Arc::new(Semaphore::new(1));
        let place = Arc::clone(&places).try_acquire_owned().unwrap();
        (Lingering::new(stream, place), places)
    }

    /// How many of the client's chunks were taken before the connection broke, with pauses between them.
    async fn taken(pause: Duration, chunks: usize) -> usize {
        let (mut client, server) = duplex(CHUNK);
        drop(lingering(server).0);
        for sent in 0..chunks {
            if client.write_all(&vec![0; CHUNK]).await.is_err() {
                return sent;
            }
            sleep(pause).await;
        }
        chunks
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_still_sending_reads_the_last_words_and_the_end() {
        let (mut client, server) = duplex(CHUNK);
        let (mut server, places) = lingering(server);
        server.write_all(b"too large").await.unwrap();
        drop(server);
        assert_eq!(places.available_permits(), 0, "it has its place while it is closed");
        for _ in 0..20 {
            client.write_all(&vec![0; CHUNK]).await.unwrap();
        }
        let mut said = String::new();
        client.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "too large");
        drop(client);
        places.acquire().await.unwrap().forget();
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_holds_a_closed_connection_for_long() {
        let begun = Instant::now();
        assert!(taken(SILENCE * 2, 100).await < 3, "a silent one");
        assert!(begun.elapsed() < SILENCE * 5);
        let begun = Instant::now();
        assert!(taken(SILENCE / 2, 1000).await < 20, "a slow one");
        assert!(begun.elapsed() < TIME + SILENCE);
        let all = BYTES / CHUNK;
        assert!((all..all + 3).contains(&taken(Duration::ZERO, 1000).await), "an endless one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_closed_is_not_waited_for() {
        let (client, server) = duplex(CHUNK);
        let (mut server, places) = lingering(server);
        drop(client);
        assert_eq!(server.read(&mut [0; 1]).await.unwrap(), 0);
        drop(server);
        assert_eq!(places.available_permits(), 1);
    }
}
