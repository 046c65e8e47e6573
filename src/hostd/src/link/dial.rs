//! Byte streams to an agent, by the kind of the machine that it lives in (contract: microvm.md section 4).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use guestd_protocol::{HELLO_PORT, VSOCK_PORT, link};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

/// Before its driver is up a guest accepts and says nothing: the answer to CONNECT has a deadline, and the caller tries again.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(500);

/// How much of a broken conversation is thrown away while the answer is looked for, in bytes.
const STALE_LIMIT: usize = 8 * 1024 * 1024;

/// A Unix socket in a sandbox's run folder. It is reached through the folder's descriptor, because a socket's path may have 107 bytes
/// only (unix(7)) and a data folder's may have more.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Socket {
    pub folder: PathBuf,
    pub name: String,
}

impl Socket {
    fn open_folder(&self) -> io::Result<File> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        OpenOptions::new().read(true).custom_flags(flags).open(&self.folder)
    }

    fn path_in(folder: &File, name: &str) -> PathBuf {
        Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name)
    }

    /// The folder may be the guest's to write: what is there now need not be the socket that was made, and must not lead to another.
    async fn connect(&self) -> io::Result<UnixStream> {
        let folder = self.open_folder()?;
        let flags = libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let socket =
            OpenOptions::new().read(true).custom_flags(flags).open(Self::path_in(&folder, &self.name))?;
        if !socket.metadata()?.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("{} is no socket any more", self.name),
            ));
        }
        UnixStream::connect(Path::new("/proc/self/fd").join(socket.as_raw_fd().to_string())).await
    }
}

/// Hears that an agent listens.
#[derive(Debug)]
pub struct Hello {
    listener: UnixListener,
}

impl Hello {
    /// Waits for it. The stream is the agent's to close: when both sides do at once, a vsock device may not come out of it.
    ///
    /// # Errors
    /// When the socket cannot be listened on any more.
    pub async fn heard(&self) -> io::Result<UnixStream> {
        self.listener.accept().await.map(|(stream, _)| stream)
    }
}

/// How to reach an agent.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Transport {
    /// Firecracker's way, which Cloud Hypervisor and vhost-device-vsock share: `CONNECT <port>`, then `OK <n>`.
    HybridVsock(Socket),
    /// One stream for ever: a virtio-serial port of QEMU.
    Serial(Socket),
    /// The agent listens itself: a container.
    Unix(Socket),
}

impl Transport {
    /// Where the agent can say hello, what it is waited for on; None where it may be dialled at any time.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn hello(&self) -> io::Result<Option<Hello>> {
        let Self::HybridVsock(socket) = self else { return Ok(None) };
        let folder = socket.open_folder()?;
        let path = Socket::path_in(&folder, &format!("{}_{HELLO_PORT}", socket.name));
        let listener = UnixListener::bind(&path)?;
        // The VM's own user dials it, and the folder is closed to everybody else.
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o666))?;
        Ok(Some(Hello { listener }))
    }

    /// # Errors
    /// When nothing answers in time; the guest may still be starting.
    pub async fn dial(&self) -> io::Result<UnixStream> {
        let dialled = async {
            match self {
                Self::Unix(socket) => socket.connect().await,
                Self::HybridVsock(socket) => {
                    let mut stream = socket.connect().await?;
                    stream.write_all(format!("CONNECT {VSOCK_PORT}\n").as_bytes()).await?;
                    read_vsock_answer(&mut stream).await?;
                    Ok(stream)
                }
                Self::Serial(socket) => {
                    let mut stream = socket.connect().await?;
                    let nonce = crate::ids::random_hex(16)?;
                    stream.write_all(link::serial_request(&nonce).as_bytes()).await?;
                    skip_to(&mut stream, link::serial_answer(&nonce).as_bytes()).await?;
                    Ok(stream)
                }
            }
        };
        let timed_out = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer from the guest");
        tokio::time::timeout(ANSWER_TIMEOUT, dialled).await.map_err(timed_out)?
    }
}

/// Reads `OK <n>\n` byte by byte: what follows it is not ours.
async fn read_vsock_answer(stream: &mut UnixStream) -> io::Result<()> {
    let mut line = Vec::with_capacity(link::MAX_LINE);
    while line.len() < link::MAX_LINE {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            return if line.starts_with(b"OK ") {
                Ok(())
            } else {
                Err(io::Error::new(io::ErrorKind::ConnectionRefused, "the guest's port is closed"))
            };
        }
        line.push(byte);
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the answer to CONNECT is no line"))
}

/// Reads up to and including `wanted`, throwing away what an earlier conversation left in the port.
async fn skip_to(stream: &mut UnixStream, wanted: &[u8]) -> io::Result<()> {
    let mut matched = 0;
    for _ in 0..STALE_LIMIT {
        let byte = stream.read_u8().await?;
        // The answer starts with a letter that does not come again in it, so a mismatch restarts at most at this byte.
        matched = if byte == wanted[matched] { matched + 1 } else { usize::from(byte == wanted[0]) };
        if matched == wanted.len() {
            return Ok(());
        }
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the guest never answered the handshake"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_a_broken_conversation_left_is_skipped() {
        let (mut host, mut guest) = UnixStream::pair().unwrap();
        guest.write_all(b"stale frames OK 0OK 00\nOK abc\nPRI").await.unwrap();
        skip_to(&mut host, b"OK abc\n").await.unwrap();
        let mut rest = [0; 3];
        host.read_exact(&mut rest).await.unwrap();
        assert_eq!(&rest, b"PRI");
    }

    #[tokio::test]
    async fn a_guest_that_accepts_and_says_nothing_is_given_up_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let listener = tokio::net::UnixListener::bind(folder.path().join("v.sock")).unwrap();
        let socket = Socket { folder: folder.path().to_owned(), name: "v.sock".to_owned() };
        let accepted = tokio::spawn(async move { listener.accept().await });
        let error = Transport::HybridVsock(socket).dial().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(accepted.await);
    }

    #[tokio::test]
    async fn a_link_that_a_guest_put_in_its_sockets_place_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = folder.path().join("host.sock");
        let _listener = tokio::net::UnixListener::bind(&elsewhere).unwrap();
        std::os::unix::fs::symlink(&elsewhere, folder.path().join("agent.sock")).unwrap();
        std::fs::write(folder.path().join("file.sock"), "").unwrap();
        for name in ["agent.sock", "file.sock"] {
            let socket = Socket { folder: folder.path().to_owned(), name: name.to_owned() };
            assert!(Transport::Unix(socket).dial().await.is_err(), "{name}");
        }
    }

    #[tokio::test]
    async fn a_socket_below_a_very_long_path_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let short = folder.path().join("s");
        std::os::unix::fs::symlink(&long, &short).unwrap();
        let _listener = tokio::net::UnixListener::bind(short.join("a.sock")).unwrap();
        Transport::Unix(Socket { folder: long, name: "a.sock".to_owned() }).dial().await.unwrap();
    }
}
