//! Ports of servers in the guest: how they are reached from outside.
//!
//! hostd dials through the agent ([`dial`], behind `CONNECT` of `crate::doors`), which reaches a server on whatever address it listens.
//! Where a guest has an address of its own that others dial, servers that listen on a loopback address only would be out of reach:
//! [`Ports`] forwards `address:port` to them (contract: envd.md section 6).
//!
//! Nothing listens on the forwarded ports, so nothing is in a program's way that binds one later (section 11, weakness 23). A BPF
//! program in the kernel steers a connection to the one socket of [`forward`] when its port's bit is set; another writes to a ring when
//! a socket of the machine begins or ceases to listen, and only then [`listeners`] are read and the bits set anew. There is no timer
//! and no wake-up while nobody begins or ceases to listen.

mod bpf;
mod forward;
mod listeners;
mod programs;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::activity::Activity;
use bpf::{Map, MapKind, Program, ProgramKind, Ring};
use listeners::Listener;

/// Where a microVM's host dials servers in it (contract: envd.md section 6).
pub const MACHINE_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 0, 21));

/// At most so many addresses are forwarded.
const MAX_ADDRESSES: u32 = 8;

/// A listener on this machine answers at once or not at all.
const DIAL_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel announces a listener a moment before its tables show it.
const EVENT_PAUSE: Duration = Duration::from_millis(5);

/// How long after the last event the tables are read once more, in case that moment was long.
const SETTLE: Duration = Duration::from_millis(200);

/// The least time between two readings: a program may listen and close in a loop.
const READ_PAUSE: Duration = Duration::from_millis(50);

/// Words of 64 ports each.
const WORDS: usize = 1024;

/// Whether an address of this machine is `address`.
pub fn is_ours(address: IpAddr) -> bool {
    UdpSocket::bind((address, 0)).is_ok()
}

/// Connects to whoever listens on a port of this machine: on a loopback address, else on an address of its own.
pub async fn dial(port: u16) -> Option<TcpStream> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    if let Some(stream) = dial_any(&loopback, port).await {
        return Some(stream);
    }
    let others: Vec<IpAddr> = read_listeners()
        .await
        .ok()?
        .into_iter()
        .filter(|listener| listener.port == port && !listener.address.is_unspecified())
        .map(Listener::canonical)
        .filter(|address| !loopback.contains(address))
        .collect();
    dial_any(&others, port).await
}

async fn dial_any(addresses: &[IpAddr], port: u16) -> Option<TcpStream> {
    for address in addresses {
        let address = SocketAddr::new(*address, port);
        if let Ok(Ok(stream)) = tokio::time::timeout(DIAL_TIMEOUT, TcpStream::connect(address)).await {
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "no TCP_NODELAY");
            }
            return Some(stream);
        }
    }
    None
}

async fn read_listeners() -> io::Result<Vec<Listener>> {
    tokio::task::spawn_blocking(listeners::read).await?
}

/// Which loopback addresses serve each port that is served on loopback addresses only.
type Targets = BTreeMap<u16, Vec<IpAddr>>;

/// What to forward, by who listens. `own` are ports that are never forwarded.
fn targets(all: &[Listener], addresses: &[IpAddr], own: &[u16]) -> Targets {
    let mut targets = Targets::new();
    for listener in all.iter().filter(|listener| !own.contains(&listener.port)) {
        let address = listener.canonical();
        if address.is_loopback() {
            let served = targets.entry(listener.port).or_default();
            if !served.contains(&address) {
                served.push(address);
            }
        }
    }
    targets.retain(|port, served| {
        let on_port =
            || all.iter().filter(|listener| listener.port == *port).map(|listener| listener.address);
        let wildcard = |any: IpAddr| on_port().any(|address| address == any);
        // Beside a loopback address of IPv4, `::` can only be a listener for IPv6 alone: together they would not have been bound.
        let also_ipv4 = wildcard(Ipv6Addr::UNSPECIFIED.into()) && !served.iter().any(IpAddr::is_ipv4);
        let reachable = wildcard(Ipv4Addr::UNSPECIFIED.into()) || also_ipv4;
        !reachable && !on_port().any(|address| addresses.contains(&address.to_canonical()))
    });
    targets
}

/// Forwarding, from [`Ports::arm`] to its drop.
#[derive(Debug)]
pub struct Ports {
    addresses: Vec<IpAddr>,
    own: Vec<u16>,
    events: AsyncFd<Ring>,
    /// A bit for each port that is forwarded.
    bits: Map,
    /// What is in `bits`.
    words: Vec<u64>,
    targets: Targets,
    /// What keeps the programs attached.
    _links: Vec<OwnedFd>,
}

impl Ports {
    /// Prepares the kernel to forward `addresses`; `own` are ports that are never forwarded. Nothing is forwarded before [`Ports::run`].
    ///
    /// # Errors
    /// Without the right to use BPF, in a kernel before 5.9, or one that was built without it.
    pub fn arm(addresses: &[IpAddr], own: &[u16], activity: &Arc<Activity>) -> io::Result<Self> {
        let entries = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        if entries > MAX_ADDRESSES {
            return Err(io::Error::other(format!("at most {MAX_ADDRESSES} addresses can be forwarded")));
        }
        let ring = Ring::new()?;
        let bits = Map::new(MapKind::Array { entries: WORDS as u32 })?;
        let sockets = Map::new(MapKind::Sockets { entries })?;
        let announce = Program::load(ProgramKind::RawTracepoint, &programs::announce_listeners(ring.map()))?;
        let mut links = vec![announce.attach_to_tracepoint(c"inet_sock_set_state")?];
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let mut own = own.to_vec();
        for (index, address) in (0..).zip(addresses) {
            let door = forward::Door::open(*address)?;
            own.push(door.port());
            sockets.set_socket(index, door.as_fd())?;
            let steer = programs::steer(*address, index, &bits, &sockets);
            let steer = Program::load(ProgramKind::SocketLookup, &steer)?;
            links.push(steer.attach_to_lookup(namespace.as_fd())?);
            tokio::spawn(door.serve(Arc::clone(activity)));
        }
        // SAFETY: the ring's descriptor stays open and its own until the AsyncFd, which owns the ring, is gone.
        let events = unsafe { AsyncFd::register(ring)? };
        Ok(Self {
            addresses: addresses.to_vec(),
            own,
            events,
            bits,
            words: vec![0; WORDS],
            targets: Targets::new(),
            _links: links,
        })
    }

    /// Keeps the forwarded ports up to date, for ever.
    pub async fn run(mut self) {
        loop {
            if let Err(error) = self.update().await {
                tracing::warn!(%error, "the forwarded ports stay as they are");
            }
            let read_at = Instant::now();
            match tokio::time::timeout(SETTLE, self.event()).await {
                Ok(()) => {}
                Err(_elapsed) => {
                    if let Err(error) = self.update().await {
                        tracing::warn!(%error, "the forwarded ports stay as they are");
                    }
                    self.event().await;
                }
            }
            tokio::time::sleep_until((Instant::now() + EVENT_PAUSE).max(read_at + READ_PAUSE)).await;
        }
    }

    async fn event(&self) {
        if let Err(error) = self.events.readable().await {
            // The runtime is on its way down.
            tracing::debug!(%error, "no more events of ports");
            std::future::pending::<()>().await;
        }
    }

    /// Reads who listens and tells the kernel's program. Events of what this reads are forgotten before, so that later ones are not.
    async fn update(&mut self) -> io::Result<()> {
        if let Some(Ok(mut ready)) = futures_util::FutureExt::now_or_never(self.events.readable()) {
            ready.clear_ready();
        }
        self.events.get_ref().clear();
        let new = targets(&read_listeners().await?, &self.addresses, &self.own);
        let mut words = vec![0_u64; WORDS];
        for port in new.keys() {
            words[usize::from(port / 64)] |= 1 << (port % 64);
        }
        for (index, (word, known)) in (0..).zip(words.iter().zip(&mut self.words)) {
            if word != known {
                self.bits.set_word(index, *word)?;
                *known = *word;
            }
        }
        for (port, served) in new.iter().filter(|(port, served)| self.targets.get(port) != Some(served)) {
            tracing::info!(port, to = ?served, "a port on a loopback address is forwarded");
        }
        for port in self.targets.keys().filter(|port| !new.contains_key(port)) {
            tracing::info!(port, "a port is not forwarded any more");
        }
        self.targets = new;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listen(address: &str, port: u16) -> Listener {
        Listener { address: address.parse().unwrap(), port }
    }

    fn forwarded(all: &[Listener]) -> Vec<u16> {
        targets(all, &[MACHINE_ADDRESS], &[49983]).into_keys().collect()
    }

    #[test]
    fn only_what_listens_on_loopback_alone_is_forwarded() {
        assert_eq!(forwarded(&[listen("127.0.0.1", 80)]), [80]);
        assert_eq!(forwarded(&[listen("127.0.0.53", 53)]), [53]);
        assert_eq!(forwarded(&[listen("::1", 80), listen("::ffff:127.0.0.1", 81)]), [80, 81]);
        assert!(forwarded(&[listen("0.0.0.0", 80), listen("::", 81), listen("10.0.0.1", 82)]).is_empty());
    }

    #[test]
    fn a_server_that_can_be_reached_itself_is_not_forwarded() {
        assert!(forwarded(&[listen("127.0.0.1", 80), listen("169.254.0.21", 80)]).is_empty());
        assert!(forwarded(&[listen("127.0.0.1", 80), listen("0.0.0.0", 80)]).is_empty());
        assert!(forwarded(&[listen("::1", 80), listen("::", 80)]).is_empty());
        assert_eq!(forwarded(&[listen("127.0.0.1", 80), listen("::", 80)]), [80], "`::` is for IPv6 alone");
    }

    #[test]
    fn the_agents_own_ports_are_not_forwarded() {
        assert!(forwarded(&[listen("127.0.0.1", 49983)]).is_empty());
    }

    #[test]
    fn a_port_on_both_loopback_addresses_has_both_as_targets() {
        let all = [listen("127.0.0.1", 80), listen("::1", 80), listen("127.0.0.1", 80)];
        assert_eq!(targets(&all, &[], &[])[&80].len(), 2);
    }

    #[tokio::test]
    async fn a_server_on_an_address_of_the_machines_own_is_dialled() {
        let listener = std::net::TcpListener::bind("127.0.0.77:0").unwrap();
        assert!(dial(listener.local_addr().unwrap().port()).await.is_some());
        let port = listener.local_addr().unwrap().port();
        drop(listener);
        assert!(dial(port).await.is_none());
    }
}
