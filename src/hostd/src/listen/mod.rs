//! Accepting HTTP connections, for the API and the proxy alike.

mod linger;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use guestd_protocol::{HEADER_BYTES, HEADER_LINES};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncBufReadExt as _, AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;

use linger::Lingering;

/// How long a connection may be without a whole request head. The SDKs' pools keep idle connections for up to 300 s (contract:
/// control-plane.md section 4.6); one that is closed under the next request is an error in somebody's program.
const HEADER_TIMEOUT: Duration = Duration::from_secs(640);
const BACKLOG: u32 = 1024;

/// A pause after a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// From the connection to the end of its TLS handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// To a client that speaks plain HTTP where TLS is spoken.
const NOT_TLS: &[u8] = b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 43\r\n\
    connection: close\r\n\r\nThis port speaks TLS: begin with https://.\n";

/// Calls at once on one HTTP/2 connection: an SDK has one for all its sandboxes, with a stream for each command that runs.
const STREAMS: u32 = 1024;
/// What may be on its way to hostd on one such connection, in bytes: one upload that waits for its guest must not stop the others.
const CONNECTION_WINDOW: u32 = 16 << 20;

/// How much of an answer the kernel keeps beyond what is on its way, in bytes (tcp(7), TCP_NOTSENT_LOWAT): guestd has to see that a slow
/// client reads on.
const UNSENT: u32 = 512 * 1024;

/// A listener that was full for this long says so.
const FULL_FOR: Duration = Duration::from_secs(1);

/// A client that vanished without a word is noticed within about half a minute: its command is not attached any more then.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_PAUSE: Duration = Duration::from_secs(5);
const KEEPALIVE_TRIES: u32 = 3;

/// Binds a listener.
///
/// # Errors
/// With the option's name and the address.
pub fn bind(option: &str, address: SocketAddr) -> io::Result<TcpListener> {
    let explain = |error: io::Error| {
        let what = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "the port is in use: stop what listens there, or choose another".to_owned()
            }
            _ => error.to_string(),
        };
        io::Error::new(error.kind(), format!("cannot listen on {address} ({option}): {what}"))
    };
    let socket =
        if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.map_err(explain)?;
    socket.set_reuseaddr(true).map_err(explain)?;
    // Connections take it from their listener.
    SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT).map_err(explain)?;
    socket.bind(address).map_err(explain)?;
    socket.listen(BACKLOG).map_err(explain)
}

/// What a listener speaks.
#[derive(Clone, Debug)]
pub enum Speaks {
    Plain,
    Tls(Arc<ServerConfig>),
}

/// Serves for ever, `places` connections at once; more wait in the kernel.
pub async fn serve(listener: TcpListener, speaks: Speaks, places: usize, router: Router) {
    let places = Arc::new(Semaphore::new(places));
    loop {
        let Some(place) = free_place(&places, &listener).await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "accept failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_PAUSE)
            .with_retries(KEEPALIVE_TRIES);
        let prepared =
            stream.set_nodelay(true).and_then(|()| SockRef::from(&stream).set_tcp_keepalive(&keepalive));
        if let Err(error) = prepared {
            tracing::debug!(%error, "a connection without its options");
        }
        tokio::spawn(connection(stream, place, speaks.clone(), router.clone()));
    }
}

async fn free_place(places: &Arc<Semaphore>, listener: &TcpListener) -> Option<OwnedSemaphorePermit> {
    if let Ok(place) = Arc::clone(places).try_acquire_owned() {
        return Some(place);
    }
    let waited = Instant::now();
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    if waited.elapsed() > FULL_FOR {
        let address = listener.local_addr().ok();
        tracing::warn!(?address, waited = ?waited.elapsed(), "a listener had as many connections as it may");
    }
    Some(place)
}

async fn connection(stream: TcpStream, place: OwnedSemaphorePermit, speaks: Speaks, router: Router) {
    match speaks {
        Speaks::Plain => http(Lingering::new(stream, place), router).await,
        Speaks::Tls(config) => {
            let handshake = async {
                if !begins_like_tls(&stream).await? {
                    let mut stream = Lingering::new(stream, place);
                    return stream.write_all(NOT_TLS).await.map(|()| None);
                }
                TlsAcceptor::from(config).accept(Lingering::new(stream, place)).await.map(Some)
            };
            match timeout(HANDSHAKE_LIMIT, handshake).await {
                Ok(Ok(Some(stream))) => http(stream, router).await,
                Ok(Ok(None)) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a TLS handshake failed"),
                Err(_elapsed) => tracing::debug!("a TLS handshake took too long"),
            }
        }
    }
}

/// Whether the first byte can be a handshake's (RFC 8446 section 5.1), and not a letter of an HTTP method. Anything else is TLS's to refuse.
async fn begins_like_tls(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    stream.peek(&mut first).await?;
    Ok(!first[0].is_ascii_uppercase())
}

/// Speaks HTTP/1.1 or 2, whichever the client begins with.
async fn http(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    // The builder looks at the first bytes without a limit of time. One byte of room: whatever is read later passes by the buffer.
    let mut stream = BufReader::with_capacity(1, stream);
    if !matches!(timeout(HEADER_TIMEOUT, stream.fill_buf()).await, Ok(Ok([_]))) {
        return;
    }
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_headers(HEADER_LINES);
    builder
        .http2()
        .max_concurrent_streams(STREAMS)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_header_list_size(HEADER_BYTES);
    let service = TowerToHyperService::new(router);
    if let Err(error) = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a connection broke off");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;

    use super::*;

    async fn ask(stream: &mut TcpStream) -> bool {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        let answered = timeout(Duration::from_millis(300), stream.read_exact(&mut answer)).await;
        answered.is_ok_and(|read| read.is_ok() && &answer == b"HTTP/1.1 404")
    }

    #[tokio::test]
    async fn one_connection_more_than_there_are_places_waits_and_is_served_when_one_goes() {
        let listener = bind("--test", "127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(serve(listener, Speaks::Plain, 2, Router::new()));
        let mut first = TcpStream::connect(address).await.unwrap();
        let mut second = TcpStream::connect(address).await.unwrap();
        let mut third = TcpStream::connect(address).await.unwrap();
        assert!(ask(&mut first).await && ask(&mut second).await);
        assert!(!ask(&mut third).await);
        drop(first);
        let mut answer = [0; 12];
        timeout(Duration::from_secs(10), third.read_exact(&mut answer)).await.unwrap().unwrap();
        assert_eq!(&answer, b"HTTP/1.1 404");
    }
}
