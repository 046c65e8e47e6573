//! Accepting HTTP connections, for the API and the proxy alike.

mod linger;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket};

use linger::Lingering;

/// How long a connection may be without a whole request head. The SDKs' pools keep idle connections for up to 300 s (contract:
/// control-plane.md section 4.6); one that is closed under the next request is an error in somebody's program.
const HEADER_TIMEOUT: Duration = Duration::from_secs(640);
const BACKLOG: u32 = 1024;

/// A pause after a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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
    socket.bind(address).map_err(explain)?;
    socket.listen(BACKLOG).map_err(explain)
}

/// Serves for ever.
pub async fn serve(listener: TcpListener, router: Router) {
    loop {
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
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            // The builder looks at the first bytes without a limit of time.
            if !matches!(tokio::time::timeout(HEADER_TIMEOUT, stream.peek(&mut [0])).await, Ok(Ok(1))) {
                return;
            }
            let mut builder = Builder::new(TokioExecutor::new());
            builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            let stream = TokioIo::new(Lingering::new(stream));
            if let Err(error) = builder.serve_connection_with_upgrades(stream, service).await {
                tracing::debug!(%error, "a connection broke off");
            }
        });
    }
}
