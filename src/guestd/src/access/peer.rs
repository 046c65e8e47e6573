//! Who is at the other end of a connection, as far as the kernel knows it, and what that is worth.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::geteuid;
use tokio::sync::OnceCell;

use super::owner::Accepted;

/// The host's address on vsock (vsock(7)). Every other one, the loopback address 1 among them, may be a process of the guest.
const VSOCK_HOST: u32 = 2;

/// The other end of a connection. Each door puts one into the extensions of every request.
#[derive(Clone, Debug)]
pub enum Peer {
    Tcp(Arc<TcpPeer>),
    /// The socket's file lets only its owner in (`doors::bind_unix`).
    Unix,
    Vsock {
        cid: u32,
    },
    /// One device of root's, which one process at a time can hold: this one.
    Serial,
}

/// A TCP connection, and who is at its other end.
#[derive(Debug)]
pub struct TcpPeer {
    accepted: Accepted,
    /// Looked for once: a socket does not change hands.
    origin: OnceCell<Origin>,
}

/// Where a TCP connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// From a process of this machine, of this user.
    Here {
        uid: u32,
    },
    Elsewhere,
}

/// What it is worth to be where a caller is, whatever it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The host, or whoever owns this machine: may set up an agent that nobody has set up yet.
    Trusted,
    /// Somebody on the network, who is worth the credential that is shown.
    Stranger,
    /// A process of this machine that is neither root's nor the agent's own user's, or that cannot be told from one: control is never its.
    Ordinary,
}

impl Peer {
    /// `local` is the address that was called, `inode` that of the socket that was accepted.
    pub fn tcp(peer: SocketAddr, local: SocketAddr, inode: u64) -> Self {
        Self::Tcp(Arc::new(TcpPeer { accepted: Accepted { peer, local, inode }, origin: OnceCell::new() }))
    }

    /// Whether it is on this machine or at the other end of the host's link, as far as addresses tell.
    pub fn is_near(&self) -> bool {
        match self {
            Self::Tcp(wire) => is_loopback(wire.accepted.peer.ip()),
            Self::Unix | Self::Vsock { .. } | Self::Serial => true,
        }
    }

    /// What this peer is worth.
    ///
    /// An ordinary service is its own user's and root's. On a machine of its own the agent runs other people's code, and only root is
    /// not one of them. A process of this machine whose user cannot be found is an ordinary one.
    ///
    /// # Errors
    /// What there is too little left of to find out.
    pub async fn standing(&self, own_machine: bool, insecure_open: bool) -> Result<Standing, Errno> {
        let wire = match self {
            Self::Unix | Self::Serial | Self::Vsock { cid: VSOCK_HOST } => return Ok(Standing::Trusted),
            Self::Vsock { .. } => return Ok(Standing::Ordinary),
            Self::Tcp(wire) => wire,
        };
        let is_owner = |uid| uid == 0 || (!own_machine && uid == geteuid().as_raw());
        Ok(match wire.origin().await? {
            Some(Origin::Here { uid }) if !is_owner(uid) => Standing::Ordinary,
            None => Standing::Ordinary,
            Some(_) if insecure_open || self.is_near() => Standing::Trusted,
            Some(_) => Standing::Stranger,
        })
    }
}

impl TcpPeer {
    /// `None` for a process of this machine that cannot be found: it has hung up, or the kernel does not tell.
    async fn origin(&self) -> Result<Option<Origin>, Errno> {
        let find = || async {
            if !is_here(self.accepted.peer) {
                return Ok(Origin::Elsewhere);
            }
            match self.accepted.user().await {
                Ok(Some(uid)) => Ok(Origin::Here { uid }),
                // Not kept: it may be found the next time.
                Ok(None) => Err(None),
                Err(error) => Err(Some(error)),
            }
        };
        match self.origin.get_or_try_init(find).await {
            Ok(origin) => Ok(Some(*origin)),
            Err(None) => Ok(None),
            Err(Some(error)) => Err(error),
        }
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Whether a caller's address is one of this machine's: what is sent to such an address would come from it. Nothing is sent.
/// Where that cannot be asked it is.
fn is_here(caller: SocketAddr) -> bool {
    let address = caller.ip().to_canonical();
    let any: IpAddr =
        if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let towards = if address == caller.ip() { caller } else { SocketAddr::new(address, caller.port()) };
    let Ok(socket) = UdpSocket::bind((any, 0)) else { return true };
    let source = socket.connect(towards).and_then(|()| socket.local_addr());
    address.is_loopback() || source.is_ok_and(|source| source.ip() == address)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(peer: &str) -> Peer {
        Peer::tcp(peer.parse().unwrap(), "127.0.0.1:49983".parse().unwrap(), 1)
    }

    #[test]
    fn only_loopback_and_the_links_are_near() {
        for near in
            [tcp("127.0.0.1:1"), tcp("127.8.9.1:1"), tcp("[::1]:1"), tcp("[::ffff:127.0.0.1]:1"), Peer::Unix]
        {
            assert!(near.is_near(), "{near:?}");
        }
        for far in [tcp("10.0.0.1:1"), tcp("[fe80::1]:1"), tcp("[::ffff:10.0.0.1]:1"), tcp("0.0.0.0:1")] {
            assert!(!far.is_near(), "{far:?}");
        }
    }

    #[tokio::test]
    async fn the_guests_own_vsock_address_is_not_the_host() {
        for (cid, expected) in
            [(VSOCK_HOST, Standing::Trusted), (1, Standing::Ordinary), (3, Standing::Ordinary)]
        {
            assert_eq!(Peer::Vsock { cid }.standing(true, false).await, Ok(expected), "{cid}");
        }
    }

    #[tokio::test]
    async fn a_network_caller_is_a_stranger_unless_that_was_lifted() {
        for own_machine in [false, true] {
            let far = tcp("192.0.2.7:4000");
            assert_eq!(far.standing(own_machine, false).await, Ok(Standing::Stranger));
            assert_eq!(far.standing(own_machine, true).await, Ok(Standing::Trusted));
        }
    }

    #[tokio::test]
    async fn on_this_machine_a_caller_has_to_be_roots_or_the_agents_own_users() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(tokio::net::TcpStream::connect(local), listener.accept());
        let (client, (stream, peer)) = (client.unwrap(), accepted.unwrap());
        let inode = nix::sys::stat::fstat(&stream).unwrap().st_ino;
        let mine = Peer::tcp(peer, local, inode);
        let roots = if geteuid().is_root() { Standing::Trusted } else { Standing::Ordinary };
        assert_eq!(mine.standing(true, false).await, Ok(roots));
        assert_eq!(mine.standing(false, false).await, Ok(Standing::Trusted));
        // Whose caller has hung up, or has no socket here, cannot be told.
        drop(client);
        for unknown in [Peer::tcp(peer, local, inode), tcp("127.0.0.1:1"), tcp("[::1]:1")] {
            for (own_machine, insecure_open) in [(false, false), (true, false), (false, true), (true, true)] {
                assert_eq!(
                    unknown.standing(own_machine, insecure_open).await,
                    Ok(Standing::Ordinary),
                    "{unknown:?}"
                );
            }
        }
    }

    #[test]
    fn only_an_address_of_this_machine_is_here() {
        for here in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:1", "[::ffff:127.0.0.1]:1"] {
            assert!(is_here(here.parse().unwrap()), "{here}");
        }
        for away in ["192.0.2.7:4000", "[::ffff:192.0.2.7]:4000"] {
            assert!(!is_here(away.parse().unwrap()), "{away}");
        }
    }
}
