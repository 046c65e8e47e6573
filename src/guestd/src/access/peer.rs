//! Who is at the other end of a connection, as far as the kernel knows it, and what that is worth.

use std::net::{IpAddr, SocketAddr};

use super::owner;

/// The host's address on vsock (vsock(7)). Every other one, the loopback address 1 among them, may be a process of the guest.
const VSOCK_HOST: u32 = 2;

/// The other end of a connection. Each door puts one into the extensions of every request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    Tcp {
        peer: SocketAddr,
        /// The address that was called.
        local: SocketAddr,
    },
    /// The socket's file lets only its owner in (`doors::bind_unix`).
    Unix,
    Vsock {
        cid: u32,
    },
    /// One device of root's, which one process at a time can hold: this one.
    Serial,
}

/// How much a caller may do that shows no credential, because none was set yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The host, or whoever owns this machine.
    Trusted,
    Stranger,
}

impl Peer {
    /// Whether a call may come in while no access token is set: from this machine or over the host's link.
    pub fn is_near(&self) -> bool {
        match self {
            Self::Tcp { peer, .. } => is_loopback(peer.ip()),
            Self::Unix | Self::Vsock { .. } | Self::Serial => true,
        }
    }

    /// Whether this peer may set up an agent that nobody has set up yet.
    ///
    /// On a machine of its own the agent shares the loopback interface with everybody's code, so a caller there has to be root. An
    /// ordinary service on somebody's machine belongs to whoever reaches it first, as envd does.
    pub async fn standing(&self, own_machine: bool, insecure_open: bool) -> Standing {
        let trusted = match *self {
            Self::Unix | Self::Serial | Self::Vsock { cid: VSOCK_HOST } => true,
            Self::Vsock { .. } => false,
            Self::Tcp { peer, local } => {
                let near = is_loopback(peer.ip());
                if !near && !insecure_open {
                    false
                } else if !own_machine {
                    true
                } else {
                    match owner::of(peer, local).await {
                        Some(uid) => uid == 0,
                        // Not a socket of this machine's: somebody on the network, which was declared to be safe.
                        None => !near,
                    }
                }
            }
        };
        if trusted { Standing::Trusted } else { Standing::Stranger }
    }
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(peer: &str) -> Peer {
        Peer::Tcp { peer: peer.parse().unwrap(), local: "127.0.0.1:49983".parse().unwrap() }
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
            [(VSOCK_HOST, Standing::Trusted), (1, Standing::Stranger), (3, Standing::Stranger)]
        {
            assert_eq!(Peer::Vsock { cid }.standing(true, false).await, expected, "{cid}");
        }
    }

    #[tokio::test]
    async fn a_network_caller_is_a_stranger_unless_that_was_lifted() {
        for own_machine in [false, true] {
            let far = tcp("192.0.2.7:4000");
            assert_eq!(far.standing(own_machine, false).await, Standing::Stranger);
            assert_eq!(far.standing(own_machine, true).await, Standing::Trusted);
        }
    }

    #[tokio::test]
    async fn on_the_agents_own_machine_a_loopback_caller_has_to_be_roots() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let local = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(tokio::net::TcpStream::connect(local), listener.accept());
        let (_client, (_stream, peer)) = (client.unwrap(), accepted.unwrap());
        let mine = Peer::Tcp { peer, local };
        let expected = if nix::unistd::geteuid().is_root() { Standing::Trusted } else { Standing::Stranger };
        assert_eq!(mine.standing(true, false).await, expected);
        // A socket that nobody here owns: the caller cannot be told, so it is not root.
        assert_eq!(tcp("127.0.0.1:1").standing(true, true).await, Standing::Stranger);
        assert_eq!(tcp("127.0.0.1:1").standing(false, false).await, Standing::Trusted);
    }
}
