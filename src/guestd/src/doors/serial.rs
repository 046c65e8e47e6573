//! The link over a virtio-serial port: one byte stream that lives as long as the machine, so conversations follow one another on it.
//!
//! The host opens each with the handshake of `guestd_protocol::link`. A conversation ends when the host's end closes, or when the host
//! starts another in the middle: its handshake is no HTTP/2 frame, so the old conversation fails at once and the handshake comes again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use guestd_protocol::link;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::Doors;
use crate::access::Peer;

/// A pause after an error that should not happen, so that the loop does not spin.
const ERROR_PAUSE: Duration = Duration::from_secs(1);

/// What ends an HTTP/2 conversation at the host's end, wherever it was: a frame that is too long, beyond the rest of any frame.
static BREAK_OFF: [u8; 20 * 1024] = [0xff; 20 * 1024];

pub(super) async fn serve(doors: Doors, device: PathBuf, resumed: bool) {
    let mut resumed = resumed;
    loop {
        if let Err(error) = converse(&doors, &device, std::mem::take(&mut resumed)).await {
            tracing::warn!(%error, device = %device.display(), "the serial link failed");
            tokio::time::sleep(ERROR_PAUSE).await;
        }
    }
}

/// Waits for the host, answers its handshake, serves HTTP until the conversation ends.
async fn converse(doors: &Doors, device: &Path, resumed: bool) -> io::Result<()> {
    let path = device.to_owned();
    let file = tokio::task::spawn_blocking(move || wait_for_host(&path)).await??;
    // SAFETY: the file is open and stays the AsyncFd's own, unchanged, to its end.
    let registered = unsafe { AsyncFd::register(file)? };
    let mut stream = SerialStream(Arc::new(registered));
    if resumed {
        // The host does not see that the port was closed, and would wait for the agent before this one.
        stream.write_all(&BREAK_OFF).await?;
    }
    let Some(nonce) = read_request(&mut stream).await? else { return Ok(()) };
    stream.write_all(link::serial_answer(&nonce).as_bytes()).await?;
    // The port can be open once only: the connection gives it back by being dropped, before the next conversation opens it.
    doors.serve(stream, Peer::Serial).await;
    Ok(())
}

/// Opens the port and blocks until the host's end is open. The kernel wakes an edge-triggered wait when that changes, so an absent host
/// costs no wake-ups; while it is absent, reads return 0 and a level-triggered wait would return at once (microvm.md section 4).
fn wait_for_host(device: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(device)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(file.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
    let mut events = [EpollEvent::empty()];
    loop {
        if !is_hung_up(&file)? {
            return Ok(file);
        }
        match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn is_hung_up(file: &File) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd that lives through the call.
    if unsafe { libc::poll(&raw mut polled, 1, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(polled.revents & libc::POLLHUP != 0)
}

/// Reads lines until one is a handshake; None when the host went away.
async fn read_request(stream: &mut SerialStream) -> io::Result<Option<String>> {
    let mut line = Vec::with_capacity(link::MAX_LINE);
    loop {
        // Byte by byte: what follows the newline is HTTP/2 and not ours.
        let mut byte = [0];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        if byte[0] != b'\n' {
            if line.len() == link::MAX_LINE {
                line.drain(..1);
            }
            line.push(byte[0]);
            continue;
        }
        if let Some(nonce) = link::parse_serial_request(&line) {
            return Ok(Some(nonce));
        }
        line.clear();
    }
}

/// The open port as a tokio stream.
struct SerialStream(Arc<AsyncFd<File>>);

impl AsyncRead for SerialStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let free = buffer.initialize_unfilled();
            match guard.try_io(|inner| inner.get_ref().read(free)) {
                Ok(Ok(count)) => {
                    buffer.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for SerialStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|inner| inner.get_ref().write(bytes)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
