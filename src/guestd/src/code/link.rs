//! The agent's side of a kernel's sockets: requests out, messages in.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::net::{TcpStream, UnixStream};

use super::message::{Message, Signer, hex};
use super::spec::Transport;
use super::zmtp::{Kind, Received, Socket};

/// How long a kernel that listens may take for one handshake.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// How long a request may wait to be written: a kernel whose socket is full does not read.
const SEND_LIMIT: Duration = Duration::from_secs(10);

/// How often it is looked whether a kernel that is being started listens already.
const LOOK: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("the connection to the kernel broke: {0}")]
    Broken(io::Error),
    #[error("the kernel closed its connection")]
    Closed,
    #[error("the kernel does not read its requests")]
    Full,
    #[error("the kernel did not answer the handshake within {} s", HANDSHAKE_LIMIT.as_secs())]
    Handshake,
}

impl From<io::Error> for LinkError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                Self::Closed
            }
            _ => Self::Broken(error),
        }
    }
}

/// Where a kernel's sockets are, as its connection file says it (jupyter-client.readthedocs.io, "Connection files").
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Address {
    transport: String,
    ip: String,
    shell_port: u16,
    iopub_port: u16,
    stdin_port: u16,
    control_port: u16,
    hb_port: u16,
    key: String,
    signature_scheme: String,
    kernel_name: String,
}

impl Address {
    /// Sockets in `folder`, or ports that are free now.
    ///
    /// # Errors
    /// When there is no randomness or no port.
    pub fn new(transport: Transport, folder: &Path, kernel: &str) -> io::Result<Self> {
        let (transport, ip, ports) = match transport {
            Transport::Ipc => ("ipc", folder.join("k").to_string_lossy().into_owned(), [1, 2, 3, 4, 5]),
            Transport::Tcp => ("tcp", Ipv4Addr::LOCALHOST.to_string(), free_ports()?),
        };
        let [shell_port, iopub_port, stdin_port, control_port, hb_port] = ports;
        Ok(Self {
            transport: transport.to_owned(),
            ip,
            shell_port,
            iopub_port,
            stdin_port,
            control_port,
            hb_port,
            key: random()?,
            signature_scheme: "hmac-sha256".to_owned(),
            kernel_name: kernel.to_owned(),
        })
    }

    fn is_ipc(&self) -> bool {
        self.transport == "ipc"
    }

    /// The path of a Unix socket.
    fn path(&self, port: u16) -> PathBuf {
        PathBuf::from(format!("{}-{port}", self.ip))
    }

    async fn open(&self, port: u16, kind: Kind) -> Result<Socket, LinkError> {
        let opened = if self.is_ipc() {
            Socket::open(UnixStream::connect(self.path(port)).await?, kind).await
        } else {
            let stream = TcpStream::connect((self.ip.as_str(), port)).await?;
            stream.set_nodelay(true)?;
            Socket::open(stream, kind).await
        };
        Ok(opened?)
    }

    /// Waits until the three sockets that the agent uses are there. Whoever waits bounds it.
    pub async fn listening(&self) {
        for port in [self.shell_port, self.control_port, self.iopub_port] {
            while !self.is_open(port).await {
                tokio::time::sleep(LOOK).await;
            }
        }
    }

    async fn is_open(&self, port: u16) -> bool {
        if self.is_ipc() {
            UnixStream::connect(self.path(port)).await.is_ok()
        } else {
            TcpStream::connect((self.ip.as_str(), port)).await.is_ok()
        }
    }
}

/// Five ports that nobody uses at this moment. The kernel binds them a moment later; whoever is quicker makes its start fail.
fn free_ports() -> io::Result<[u16; 5]> {
    // All at once, so that they differ.
    let taken: Vec<_> =
        (0..5).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<io::Result<_>>()?;
    let mut ports = [0; 5];
    for (port, listener) in ports.iter_mut().zip(&taken) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

/// 128 random bits as text.
pub fn random() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).map_err(io::Error::other)?;
    Ok(hex(&bytes))
}

/// Which socket a message came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Channel {
    Shell,
    Control,
    Iopub,
}

/// The connected sockets of one kernel.
#[derive(Debug)]
pub struct Link {
    shell: Socket,
    control: Socket,
    iopub: Socket,
    signer: Signer,
    session: String,
    sent: u64,
}

/// What a kernel says.
#[derive(Debug)]
pub enum Said {
    Message(Channel, Message),
    /// More than a message may hold.
    TooMuch,
}

impl Link {
    /// Connects to a kernel that listens.
    ///
    /// # Errors
    /// [`LinkError`]; a kernel that accepts and says nothing is one.
    pub async fn connect(address: &Address) -> Result<Self, LinkError> {
        let connecting = async {
            let session = random()?;
            Ok(Self {
                // First, so that nothing is said before somebody listens.
                iopub: address.open(address.iopub_port, Kind::Sub).await?,
                shell: address.open(address.shell_port, Kind::Dealer).await?,
                control: address.open(address.control_port, Kind::Dealer).await?,
                signer: Signer::new(&address.key, session.clone()),
                session,
                sent: 0,
            })
        };
        tokio::time::timeout(HANDSHAKE_LIMIT, connecting).await.map_err(|_| LinkError::Handshake)?
    }

    /// Sends a request; returns its id. After an error the link is of no use.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn send(&mut self, channel: Channel, kind: &str, content: &str) -> Result<String, LinkError> {
        self.sent += 1;
        let id = format!("{}-{}", self.session, self.sent);
        let frames = self.signer.seal(&id, kind, content);
        let socket = if channel == Channel::Control { &mut self.control } else { &mut self.shell };
        tokio::time::timeout(SEND_LIMIT, socket.send(&frames)).await.map_err(|_| LinkError::Full)??;
        Ok(id)
    }

    /// The next message; what is not this kernel's is skipped. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`LinkError`] when the connection is broken.
    pub async fn receive(&mut self) -> Result<Said, LinkError> {
        loop {
            let (channel, received) = tokio::select! {
                // In no order: a thread that never stops printing must not keep a reply from being read.
                received = self.iopub.receive() => (Channel::Iopub, received?),
                received = self.shell.receive() => (Channel::Shell, received?),
                received = self.control.receive() => (Channel::Control, received?),
            };
            let Received::Message(frames) = received else { return Ok(Said::TooMuch) };
            match self.signer.open(&frames) {
                Ok(message) => return Ok(Said::Message(channel, message)),
                Err(error) => tracing::debug!(?channel, %error, "skipped what is not a kernel's message"),
            }
            // A flood of these must not keep the agent's one thread.
            tokio::task::yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_on_ports_gets_five_different_ones() {
        let address = Address::new(Transport::Tcp, Path::new("/x"), "deno").unwrap();
        let mut ports = [
            address.shell_port,
            address.iopub_port,
            address.stdin_port,
            address.control_port,
            address.hb_port,
        ];
        ports.sort_unstable();
        assert!(ports[0] > 0 && ports.windows(2).all(|pair| pair[0] != pair[1]), "{ports:?}");
        assert!(!address.is_ipc());
    }

    #[test]
    fn two_kernels_never_share_a_key() {
        let of = || Address::new(Transport::Ipc, Path::new("/run/x"), "python3").unwrap();
        let (one, other) = (of(), of());
        assert_ne!(one.key, other.key);
        assert_eq!((one.key.len(), one.path(2)), (32, PathBuf::from("/run/x/k-2")));
    }
}
