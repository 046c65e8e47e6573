//! The ways in: TCP, vsock, a Unix socket and a virtio-serial port, all with the same services behind them.
//!
//! Each door makes byte streams; [`Doors::serve`] speaks HTTP/1.1 or HTTP/2 on one, whichever the client begins with. `CONNECT` requests
//! become tunnels to a TCP port of the guest (`tunnel`), everything else goes to the router that `crate::agent` put together.

mod connections;
mod opening;
mod serial;
mod tunnel;

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use guestd_protocol::{HEADER_BYTES, HEADER_LINES, HELLO_PORT};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use nix::sys::stat::{Mode, fstat, umask};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio::time::timeout;
use tower::ServiceExt;

use crate::access::{Access, Peer};

pub use connections::{Connection, Connections};
use opening::{Opened, Version};

/// How long a connection may be without a whole request head: envd's keep-alive time (contract: envd.md section 0). Shorter than a client's
/// pool keeps its connections, it would close them under the next request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(640);

/// What an HTTP/1 connection may hold back for a client that does not read, in bytes; also the longest head of a request. Without it hyper
/// keeps some 400 KiB for each.
const HTTP1_BUFFER: usize = 128 * 1024;

/// What one stream may have under way in each direction, so that a stalled one holds back neither memory nor its neighbours.
const STREAM_WINDOW: u32 = 256 * 1024;

/// The largest HTTP/2 window: streams are bounded one by one, so the connection as a whole need not be.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// Streams on one connection. hostd multiplexes everything over one.
const STREAMS: u32 = 16 * 1024;

/// How many connections may wait for their accept: with 64, half of 200 quick vsock connections failed (contract: microvm.md section 4).
const BACKLOG: u32 = 4096;

/// How much of an answer the kernel keeps beyond what is on its way, in bytes (tcp(7), TCP_NOTSENT_LOWAT). By default it takes megabytes and
/// asks for more when a third of them is gone: a slow reader of a process's output would seem to stand still in between.
const UNSENT: u32 = 512 * 1024;

/// How often the host is told that the agent listens, and how long it may take to hear it.
const HELLO_TRIES: u32 = 20;
const HELLO_LIMIT: Duration = Duration::from_secs(1);
const HELLO_PAUSE: Duration = Duration::from_millis(250);

/// A pause after a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A byte stream of any door.
trait ByteStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> ByteStream for T {}

#[derive(Clone, Debug)]
pub struct Doors {
    router: Router,
    access: Arc<Access>,
    connections: Connections,
    /// True while nobody is let in: callers wait in front of the doors.
    shut: watch::Receiver<bool>,
}

impl Doors {
    pub fn new(
        router: Router,
        access: Arc<Access>,
        connections: Connections,
        shut: watch::Receiver<bool>,
    ) -> Self {
        Self { router, access, connections, shut }
    }

    /// What `accept` gives, when the doors are open; what came while they were being shut waits for the next opening.
    async fn let_in<T>(
        &self,
        mut accept: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> io::Result<T> {
        let mut shut = self.shut.clone();
        loop {
            // Whoever could shut the doors lives as long as the agent.
            drop(shut.wait_for(|shut| !*shut).await);
            tokio::select! {
                biased;
                Ok(_) = shut.wait_for(|shut| *shut) => {}
                accepted = poll_fn(&mut accept) => return accepted,
            }
        }
    }

    /// Serves one byte stream to its end, or until it is cut. Requests carry the [`Peer`] and the [`Connection`] in their extensions.
    pub async fn serve(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer) {
        // One HTTP server in the binary for all doors: one for each kind of stream takes 100 kB a kind.
        self.serve_stream(Box::new(stream), peer).await;
    }

    async fn serve_stream(&self, stream: Box<dyn ByteStream>, peer: Peer) {
        let connection = self.connections.enter();
        let opened = tokio::select! {
            opened = timeout(HEADER_TIMEOUT, Opened::read(stream)) => opened,
            () = connection.cut() => return,
            () = connection.closed() => return,
        };
        // What breaks off, or says nothing, before its first request is nobody's loss.
        let Ok(Ok((stream, version))) = opened else { return };
        let doors = self.clone();
        let (carried, carried_peer) = (connection.clone(), peer.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            let doors = doors.clone();
            request.extensions_mut().insert(carried_peer.clone());
            request.extensions_mut().insert(carried.clone());
            async move {
                if request.method() == Method::CONNECT {
                    return Ok(tunnel::open(&doors.access, request).await);
                }
                doors.router.oneshot(request.map(Body::new)).await
            }
        });
        let stream = TokioIo::new(stream);
        match version {
            Version::Http1 => {
                let mut builder = http1::Builder::new();
                builder
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_TIMEOUT)
                    .max_buf_size(HTTP1_BUFFER)
                    .max_headers(HEADER_LINES);
                let served = builder.serve_connection(stream, service).with_upgrades();
                converse(served, http1::UpgradeableConnection::graceful_shutdown, connection, peer).await;
            }
            Version::Http2 => {
                let mut builder = http2::Builder::new(TokioExecutor::new());
                builder
                    .initial_stream_window_size(STREAM_WINDOW)
                    .initial_connection_window_size(CONNECTION_WINDOW)
                    .max_concurrent_streams(STREAMS)
                    .max_header_list_size(HEADER_BYTES)
                    .max_send_buf_size(STREAM_WINDOW as usize);
                let served = builder.serve_connection(stream, service);
                // Of the two, the state of this one is large, and the other's connections are many.
                Box::pin(converse(served, http2::Connection::graceful_shutdown, connection, peer)).await;
            }
        }
    }

    /// Accepts TCP connections for ever.
    pub async fn tcp(self, listener: TcpListener) {
        loop {
            match self.let_in(|cx| listener.poll_accept(cx)).await {
                Ok((stream, peer)) => {
                    // Without it each small frame of a stream waits for the client's delayed acknowledgement (40 ms).
                    if let Err(error) = stream.set_nodelay(true) {
                        tracing::debug!(%error, "no TCP_NODELAY");
                    }
                    let known = stream.local_addr().and_then(|local| Ok((local, fstat(&stream)?.st_ino)));
                    match known {
                        Ok((local, inode)) => self.spawn(stream, Peer::tcp(peer, local, inode)),
                        Err(error) => tracing::debug!(%error, "a connection was gone before it was served"),
                    }
                }
                Err(error) => accept_failed("tcp", &error).await,
            }
        }
    }

    /// Accepts connections on a Unix socket for ever.
    pub async fn unix(self, listener: UnixListener) {
        loop {
            match self.let_in(|cx| listener.poll_accept(cx)).await {
                Ok((stream, _)) => self.spawn(stream, Peer::Unix),
                Err(error) => accept_failed("unix", &error).await,
            }
        }
    }

    /// Accepts vsock connections for ever.
    pub async fn vsock(self, listener: tokio_vsock::VsockListener) {
        loop {
            match self.let_in(|cx| listener.poll_accept(cx)).await {
                Ok((stream, address)) => self.spawn(stream, Peer::Vsock { cid: address.cid() }),
                Err(error) => accept_failed("vsock", &error).await,
            }
        }
    }

    /// Serves the virtio-serial port at `device` for ever, one conversation after the other.
    /// `resumed`: another program had it open before, under the same pid.
    pub async fn serial(self, device: PathBuf, resumed: bool) {
        serial::serve(self, device, resumed).await;
    }

    fn spawn(&self, stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer) {
        let (doors, stream) = (self.clone(), Box::new(stream));
        tokio::spawn(async move { doors.serve_stream(stream, peer).await });
    }
}

/// Serves to the end of the conversation, or until the connection is cut; `shut_down` makes its current calls the last.
async fn converse<C: Future<Output = hyper::Result<()>>>(
    served: C,
    shut_down: fn(Pin<&mut C>),
    connection: Connection,
    peer: Peer,
) {
    let mut served = pin!(served);
    let mut closing = false;
    loop {
        tokio::select! {
            served = served.as_mut() => {
                if let Err(error) = served {
                    tracing::debug!(%error, "a connection broke off");
                }
            }
            () = connection.cut() => tracing::debug!(?peer, "a connection was cut"),
            () = connection.closed(), if !closing => {
                closing = true;
                shut_down(served.as_mut());
                continue;
            }
        }
        return;
    }
}

async fn accept_failed(door: &str, error: &io::Error) {
    tracing::warn!(door, %error, "accept failed");
    tokio::time::sleep(ACCEPT_PAUSE).await;
}

/// Binds a TCP door.
///
/// # Errors
/// With the address, when it is in use or not this machine's.
pub fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket =
        if address.is_ipv4() { tokio::net::TcpSocket::new_v4() } else { tokio::net::TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Connections take it from their listener.
    SockRef::from(&socket).set_tcp_notsent_lowat(UNSENT)?;
    let bound = socket.bind(address).and_then(|()| socket.listen(BACKLOG));
    bound.map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))
}

/// Binds a Unix socket, in place of one that an earlier agent left. Its file lets only its owner connect (unix(7)): whoever comes through
/// it is taken for the host. Must be called while nothing else makes files.
///
/// # Errors
/// With the path.
pub fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let before = umask(Mode::from_bits_truncate(0o177));
    let bound = UnixListener::bind(path);
    umask(before);
    bound.map_err(|error| {
        io::Error::new(error.kind(), format!("cannot listen on {}: {error}", path.display()))
    })
}

/// Binds the vsock door.
///
/// # Errors
/// When the machine has no vsock: a container, or a kernel without the module.
pub fn bind_vsock(port: u32) -> io::Result<tokio_vsock::VsockListener> {
    use std::os::fd::AsRawFd;
    let address = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_ANY, port);
    let listener = tokio_vsock::VsockListener::bind(address)?;
    // SAFETY: listen(2) on a descriptor that the listener owns; a second call only changes the backlog.
    let raised = unsafe { libc::listen(listener.as_raw_fd(), BACKLOG as i32) };
    if raised < 0 {
        tracing::warn!(error = %io::Error::last_os_error(), "the vsock backlog stays small");
    }
    Ok(listener)
}

/// Goes on with a vsock door that is open already.
pub fn resume_vsock(socket: OwnedFd) -> tokio_vsock::VsockListener {
    tokio_vsock::VsockListener::from(socket)
}

/// Tells the host that this agent listens. A host that does not care refuses, which is fine.
pub async fn say_hello() {
    let host = tokio_vsock::VsockAddr::new(tokio_vsock::VMADDR_CID_HOST, HELLO_PORT);
    for _ in 0..HELLO_TRIES {
        match timeout(HELLO_LIMIT, tokio_vsock::VsockStream::connect(host)).await {
            Ok(Ok(_heard)) => return,
            Ok(Err(error)) => tracing::debug!(%error, "the host did not hear the hello"),
            Err(_elapsed) => tracing::debug!("the host did not answer the hello"),
        }
        tokio::time::sleep(HELLO_PAUSE).await;
    }
}

/// The device of the virtio-serial port that hostd named, if the machine has it.
pub fn find_serial(name: &str) -> Option<PathBuf> {
    let ports = std::fs::read_dir("/sys/class/virtio-ports").ok()?;
    ports.flatten().find_map(|entry| {
        let found = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (found.trim_end() == name).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn an_ordinary_user_cannot_connect_to_the_socket_of_the_link() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("agent.sock");
        for _restarted in 0..2 {
            let _listener = bind_unix(&path).unwrap();
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_makes_the_agent_hold_little_back() {
        const CHUNK: usize = 16 * 1024;
        let taken = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&taken);
        let endless = move || {
            let counter = Arc::clone(&counter);
            let chunks = futures_util::stream::repeat_with(move || {
                counter.fetch_add(CHUNK, Ordering::Relaxed);
                Ok::<_, io::Error>(bytes::Bytes::from(vec![0; CHUNK]))
            });
            std::future::ready(Body::from_stream(chunks))
        };
        let router = Router::new().route("/", axum::routing::get(endless));
        let (mut client, server) = tokio::io::duplex(1024);
        let doors =
            Doors::new(router, Arc::default(), Connections::default(), tokio::sync::watch::channel(false).1);
        let serving = tokio::spawn(async move { doors.serve(server, Peer::Unix).await });
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        for _ in 0..10_000 {
            tokio::task::yield_now().await;
        }
        let taken = taken.load(Ordering::Relaxed);
        assert!((CHUNK..=HTTP1_BUFFER + 2 * CHUNK).contains(&taken), "{taken}");
        serving.abort();
    }
    #[tokio::test]
    async fn metadata_of_three_bytes_a_header_reaches_the_service_up_to_its_limit() {
        let count = async |headers: axum::http::HeaderMap| headers.len().to_string();
        let router = Router::new().route("/", axum::routing::get(count));
        let doors =
            Doors::new(router, Arc::default(), Connections::default(), tokio::sync::watch::channel(false).1);
        let (mut client, server) = tokio::io::duplex(64 * 1024);
        let serving = tokio::spawn(async move { doors.serve(server, Peer::Unix).await });
        let metadata: String = (0..4096 / 3).map(|number| format!("x-metadata-{number:03x}:\r\n")).collect();
        let others: String = (0..150).map(|number| format!("x-other-{number}: {number}\r\n")).collect();
        let head = format!("GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{metadata}{others}\r\n");
        client.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut client, &mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n1517"), "{answer}");
        serving.await.unwrap();
    }
}
