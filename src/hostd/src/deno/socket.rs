//! The life of one socket: signs of life in both directions, calls and their answers, and the end of either side (contract: deno.md
//! sections 2.6 and 5).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use guestd_idle::Moment;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Bytes, Error, Message};

use super::handshake::Arrival;
use super::rpc::{self, Outcome};
use crate::clock;
use crate::lifetime::Sandbox;
use crate::lifetime::create::CreateError;

/// Largest message, in bytes: one above it closes the socket with 1009.
pub(super) const MESSAGE_LIMIT: usize = 16 << 20;

/// What a socket reads at once, and how much may wait to be written.
const READ_BUFFER: usize = 16 << 10;
const WRITE_LIMIT: usize = 64 << 10;

/// How long the answer to the handshake may take to be written.
const UPGRADE_LIMIT: Duration = Duration::from_secs(10);

/// How long a close waits for the client's own.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// Pings in each liveness limit: one that is lost or late does not end a session.
const PINGS: u32 = 4;

/// The sandbox behind a socket.
pub(super) enum Guest {
    Ready(Arc<Sandbox>),
    Coming(Arrival),
}

/// The hold of the socket that created a sandbox. Dropping it ends the sandbox if that is a session.
struct Tie {
    sandbox: Arc<Sandbox>,
    why: &'static str,
}

impl Drop for Tie {
    fn drop(&mut self) {
        self.sandbox.change(|lifetime| lifetime.close_session(self.why, clock::now()));
    }
}

/// A socket before its first byte.
pub(super) struct Socket {
    sandbox: Option<Arc<Sandbox>>,
    coming: Option<Arrival>,
    /// This socket created the sandbox.
    created: bool,
    tie: Option<Tie>,
    liveness: Duration,
    _place: OwnedSemaphorePermit,
}

/// What ends a socket.
enum End {
    /// This side closes it, with a code and a reason.
    Close(u16, String),
    /// The client did, or its connection is gone.
    Gone(&'static str),
}

impl Socket {
    pub(super) fn new(guest: Guest, created: bool, liveness: Duration, place: OwnedSemaphorePermit) -> Self {
        let mut socket = Self { sandbox: None, coming: None, created, tie: None, liveness, _place: place };
        match guest {
            Guest::Ready(sandbox) => socket.attach(sandbox),
            Guest::Coming(arrival) => socket.coming = Some(arrival),
        }
        socket
    }

    fn attach(&mut self, sandbox: Arc<Sandbox>) {
        self.tie =
            self.created.then(|| Tie { sandbox: Arc::clone(&sandbox), why: "its connection broke off" });
        self.sandbox = Some(sandbox);
    }

    /// The session ends now, if there is one; closing the socket itself may take longer.
    fn untie(&mut self, why: &'static str) {
        if let Some(mut arrival) = self.coming.take()
            && arrival.lasting
        {
            // Its client has the id and will come back. Why a boot failed is logged where it does.
            tokio::spawn(async move { drop((&mut arrival.boot).await) });
        }
        if let Some(tie) = &mut self.tie {
            tie.why = why;
        }
        self.tie = None;
    }

    /// The client was heard of. Nothing to a sandbox that is no session, or is not this socket's.
    fn hear(&self, heard: Moment) {
        if let Some(tie) = &self.tie {
            tie.sandbox.lifetime().hear(heard, clock::now());
        }
    }
}

/// Serves a socket to its end.
pub(super) async fn serve(mut socket: Socket, upgrade: OnUpgrade) {
    let upgraded = match timeout(UPGRADE_LIMIT, upgrade).await {
        Ok(Ok(upgraded)) => upgraded,
        Ok(Err(_)) | Err(_) => return socket.untie("its client left before it was answered"),
    };
    let heard = Arc::new(AtomicU64::new(clock::now().as_nanos()));
    let stream = Heard { stream: TokioIo::new(upgraded), last: Arc::clone(&heard) };
    let config = WebSocketConfig::default()
        .max_message_size(Some(MESSAGE_LIMIT))
        .max_frame_size(Some(MESSAGE_LIMIT))
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(0)
        .max_write_buffer_size(WRITE_LIMIT);
    let mut stream = WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
    match carry(&mut socket, &mut stream, &heard).await {
        End::Gone(why) => socket.untie(why),
        End::Close(code, reason) => {
            socket.untie("hostd closed its connection");
            let frame = CloseFrame { code: CloseCode::from(code), reason: reason.into() };
            let _slow = timeout(CLOSE_LIMIT, stream.close(Some(frame))).await;
        }
    }
    // The rest of the closing handshake; whatever else comes is of no interest.
    let rest = async { while let Some(Ok(_)) = stream.next().await {} };
    let _slow = timeout(CLOSE_LIMIT, rest).await;
}

async fn carry(socket: &mut Socket, stream: &mut WebSocketStream<Heard>, heard: &AtomicU64) -> End {
    let tick = socket.liveness / PINGS;
    let mut next_tick = Instant::now() + tick;
    loop {
        let to_send = tokio::select! {
            biased;
            () = over(socket.sandbox.as_ref()) => return ended(socket.sandbox.as_deref()),
            brought = boot(&mut socket.coming) => {
                match brought {
                    Ok(sandbox) => socket.attach(sandbox),
                    Err(error) => return End::Close(CloseCode::Error.into(), shortened(&error.to_string())),
                }
                socket.coming = None;
                continue;
            }
            () = tokio::time::sleep_until(next_tick) => {
                next_tick = Instant::now() + tick;
                let last = Moment::from_nanos(heard.load(Ordering::Relaxed));
                if clock::now().since(last) >= socket.liveness {
                    return End::Gone("its client was silent");
                }
                socket.hear(last);
                Message::Ping(Bytes::new())
            }
            message = stream.next() => match message {
                None | Some(Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Io(_))) => {
                    return End::Gone("its connection broke off");
                }
                Some(Ok(Message::Close(_))) => return End::Gone("its client closed the connection"),
                Some(Ok(message @ (Message::Text(_) | Message::Binary(_)))) => {
                    match rpc::answer(&message.into_data()) {
                        Outcome::Reply(reply) => Message::text(reply),
                        Outcome::Nothing => continue,
                        Outcome::Close(code, reason) => return End::Close(code, reason.to_owned()),
                    }
                }
                // The library answers pings by itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Err(error)) => return refused(&error),
            },
        };
        // A client that does not read is as good as silent.
        tokio::select! {
            biased;
            () = over(socket.sandbox.as_ref()) => return ended(socket.sandbox.as_deref()),
            sent = timeout(socket.liveness, stream.send(to_send)) => match sent {
                Ok(Ok(())) => {}
                Ok(Err(_)) => return End::Gone("its connection broke off"),
                Err(_elapsed) => return End::Gone("its client did not read"),
            },
        }
    }
}

async fn over(sandbox: Option<&Arc<Sandbox>>) {
    match sandbox {
        Some(sandbox) => sandbox.over().await,
        None => std::future::pending().await,
    }
}

async fn boot(coming: &mut Option<Arrival>) -> Result<Arc<Sandbox>, CreateError> {
    match coming {
        Some(arrival) => (&mut arrival.boot).await,
        None => std::future::pending().await,
    }
}

/// 1001 is what the SDKs expect of a sandbox that ends.
fn ended(sandbox: Option<&Sandbox>) -> End {
    let reason = sandbox.and_then(|sandbox| sandbox.lifetime().ended()).map(|(reason, _)| reason.name());
    End::Close(CloseCode::Away.into(), format!("the sandbox has ended: {}", reason.unwrap_or("unknown")))
}

fn refused(error: &Error) -> End {
    let code = match error {
        Error::Capacity(_) => CloseCode::Size,
        Error::Utf8(_) => CloseCode::Invalid,
        _ => CloseCode::Protocol,
    };
    End::Close(code.into(), shortened(&error.to_string()))
}

/// A close frame's reason has room for 123 bytes.
fn shortened(text: &str) -> String {
    let mut text = text.to_owned();
    text.truncate(text.floor_char_boundary(120));
    text
}

/// A stream that notes when bytes came: a large message on a slow line is a sign of life before it is complete.
#[derive(Debug)]
struct Heard {
    stream: TokioIo<Upgraded>,
    last: Arc<AtomicU64>,
}

impl AsyncRead for Heard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            self.last.store(clock::now().as_nanos(), Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Heard {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
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
    use std::sync::atomic::AtomicBool;

    use tokio::sync::Semaphore;

    use super::*;
    use crate::deno::Coming;

    async fn left_during_the_boot(lasting: bool) -> (bool, Coming) {
        let booted = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&booted);
        let boot = Box::pin(async move {
            tokio::time::sleep(Duration::from_secs(8)).await;
            seen.store(true, Ordering::SeqCst);
            Err(CreateError::Closing)
        });
        let coming = Coming::default();
        let guest = Guest::Coming(Arrival::new(&coming, "sbx_ord_x", boot, lasting));
        let place = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let mut socket = Socket::new(guest, true, Duration::from_secs(60), place);
        socket.untie("its client closed the connection");
        tokio::time::sleep(Duration::from_secs(9)).await;
        (booted.load(Ordering::SeqCst), coming)
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_closes_during_the_boot_finds_its_duration_again_and_no_session() {
        for lasting in [true, false] {
            let (booted, coming) = left_during_the_boot(lasting).await;
            assert_eq!(booted, lasting);
            assert!(coming.table().is_empty(), "nobody waits for ever");
        }
    }

    #[test]
    fn a_reason_fits_in_a_close_frame_whatever_its_letters() {
        assert!(shortened(&"é".repeat(200)).len() <= 120);
        assert_eq!(shortened("short"), "short");
    }
}
