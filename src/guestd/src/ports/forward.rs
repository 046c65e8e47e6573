//! One forwarded address: the socket that the kernel's program steers connections to, and the copying to the server.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use guestd_idle::HoldClass;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;

use super::{dial_any, read_listeners};
use crate::activity::{Activity, HoldGuard};

/// Connections at once for each address; more wait in the backlog.
const CONNECTIONS: usize = 1024;
const BACKLOG: u32 = 1024;

/// A pause after a failed accept (no descriptors left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The socket of one forwarded address. It is bound to a loopback address and a port that the kernel chose: connections do not come to
/// that port, they are steered.
#[derive(Debug)]
pub(super) struct Door {
    address: IpAddr,
    listener: TcpListener,
    port: u16,
}

impl Door {
    /// # Errors
    /// When no port is left.
    pub(super) fn open(address: IpAddr) -> io::Result<Self> {
        let (socket, loopback) = match address {
            IpAddr::V4(_) => (TcpSocket::new_v4()?, IpAddr::V4(Ipv4Addr::LOCALHOST)),
            IpAddr::V6(_) => (TcpSocket::new_v6()?, IpAddr::V6(Ipv6Addr::LOCALHOST)),
        };
        // Steered connections inherit it. Without it an open one would be in the way of a program that binds its port anew.
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::new(loopback, 0))?;
        let listener = socket.listen(BACKLOG)?;
        let port = listener.local_addr()?.port();
        Ok(Self { address, listener, port })
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Forwards for ever.
    pub(super) async fn serve(self, activity: Arc<Activity>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    // Its own end of a steered connection has the address that the client dialled.
                    let dialled = stream.local_addr().ok().filter(|local| local.ip() == self.address);
                    let Some(dialled) = dialled else { continue };
                    let activity = Arc::clone(&activity);
                    tokio::spawn(async move {
                        carry(stream, dialled, &activity).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a forwarded connection could not be accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Copies both ways until both ends have closed their side, or one broke off. Each byte is use of the sandbox, the open connection is not.
async fn carry(stream: TcpStream, dialled: SocketAddr, activity: &Arc<Activity>) {
    let origin = format!("TCP {dialled}");
    let Ok(hold) = activity.admit(HoldClass::GuestStream, &origin).await else { return refuse(&stream) };
    let Some(target) = dial_loopback(dialled.port()).await else { return refuse(&stream) };
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "no TCP_NODELAY");
    }
    let mut outside = Counted { stream, hold: &hold };
    let mut inside = Counted { stream: target, hold: &hold };
    // Both ends closing is how it ends; there is nobody to tell about it.
    let _ended = tokio::io::copy_bidirectional(&mut outside, &mut inside).await;
}

/// Closes with a reset, as a port does that nobody listens on.
fn refuse(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "a connection is closed, not reset");
    }
}

async fn dial_loopback(port: u16) -> Option<TcpStream> {
    let usual = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    if let Some(stream) = dial_any(&usual, port).await {
        return Some(stream);
    }
    // Another address of 127.0.0.0/8. Never one that is not loopback: it may be the forwarded one, and lead back here.
    let others = read_listeners().await.ok()?.into_iter().filter(|listener| listener.port == port);
    let others: Vec<_> = others.map(|listener| listener.canonical()).filter(IpAddr::is_loopback).collect();
    dial_any(&others, port).await
}

/// A connection whose read bytes count as use.
struct Counted<'a> {
    stream: TcpStream,
    hold: &'a HoldGuard,
}

impl AsyncRead for Counted<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        let count = buffer.filled().len() - before;
        if count > 0 {
            self.hold.progress(count as u64);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted<'_> {
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
