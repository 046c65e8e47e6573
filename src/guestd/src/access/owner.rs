//! Which user owns the other end of a TCP connection inside this machine. TCP has no SO_PEERCRED; the kernel knows each socket's user, and
//! tells by sock_diag(7). Its TCP half is a module that small guests leave out: there the table of all sockets is read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

/// The states of a socket whose process can still send or receive (the kernel's tcp_states.h): open, and half closed by itself.
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;

/// Tells the kernel to compare no cookie (sock_diag(7)).
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// Longer than any answer about one socket.
const ANSWER: usize = 4096;

/// How often the table is read for a socket that is not in it. The kernel writes it in pieces, and connections that end meanwhile can
/// hide one that stays.
const READS: usize = 3;

/// What the kernel says about the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    User(u32),
    /// Its process has closed it.
    Nobody,
}

impl Owner {
    /// A socket that its process has closed has no inode, and is shown as user 0: that is not root.
    fn new(state: u8, uid: u32, inode: u64) -> Self {
        let is_held = inode != 0 && matches!(state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2);
        if is_held { Self::User(uid) } else { Self::Nobody }
    }
}

/// The user of the socket that is bound to `peer` and connected to `local`; `None` when no process of this machine holds such a socket.
pub(super) async fn of(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let read = move || {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter();
        tables.filter_map(|table| std::fs::read(table).ok()).find_map(|table| find(&table, peer, local))
    };
    let lookup = move || ask(peer, local).or_else(|| (0..READS).find_map(|_| read()));
    match tokio::task::spawn_blocking(lookup).await {
        Ok(Some(Owner::User(uid))) => Some(uid),
        _ => None,
    }
}

/// Asks the kernel for this one socket. `None` when there is none, or the kernel cannot be asked: it says the same to both.
fn ask(peer: SocketAddr, local: SocketAddr) -> Option<Owner> {
    let addresses = (peer.ip().to_canonical(), local.ip().to_canonical());
    let family = if addresses.0.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket_id = SocketId {
        source_port: peer.port(),
        destination_port: local.port(),
        source_address: addresses.0,
        destination_address: addresses.1,
        interface_id: if let SocketAddr::V6(peer) = peer { peer.scope_id() } else { 0 },
        cookie: NO_COOKIE,
    };
    let question = SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all(),
        socket_id,
    });
    let mut message = NetlinkMessage::from(question);
    message.header.flags = NLM_F_REQUEST;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len().max(ANSWER)];
    message.serialize(&mut buffer);

    let (kind, flags) = (SockType::Datagram, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
    let kernel = socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkSockDiag).ok()?;
    send(kernel.as_raw_fd(), &buffer[..message.buffer_len()], MsgFlags::empty()).ok()?;
    // The kernel answers before send(2) returns (netlink(7) is a call, not a conversation).
    let length = recv(kernel.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
    match NetlinkMessage::deserialize(&buffer[..length]).ok()?.payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket)) => {
            let found = socket.header;
            Some(Owner::new(found.state, found.uid, found.inode.into()))
        }
        _ => None,
    }
}

/// The line of a table that is about the connection. Tables can have tens of thousands: only those with the client's port are taken apart.
fn find(table: &[u8], peer: SocketAddr, local: SocketAddr) -> Option<Owner> {
    let port = format!(":{:04X} ", peer.port());
    memchr::memmem::find_iter(table, port.as_bytes()).find_map(|at| {
        let start = memchr::memrchr(b'\n', &table[..at]).map_or(0, |end| end + 1);
        let line = table[start..].split(|byte| *byte == b'\n').next()?;
        row_of(std::str::from_utf8(line).ok()?, peer, local)
    })
}

/// What a line of the table (proc_net_tcp(5)) says, if it is about that connection as its client sees it.
fn row_of(line: &str, peer: SocketAddr, local: SocketAddr) -> Option<Owner> {
    let mut fields = line.split_whitespace();
    let (from, to) = (fields.nth(1)?, fields.next()?);
    let same = |field, address: SocketAddr| {
        parse_address(field)
            .is_some_and(|found| found.port() == address.port() && found.ip() == address.ip().to_canonical())
    };
    if !same(from, peer) || !same(to, local) {
        return None;
    }
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    // queues, timer, retransmits, uid, timeout, inode
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Owner::new(state, uid, inode))
}

/// `0100007F:C33F`: each 32 bits in the machine's byte order, then the port.
fn parse_address(field: &str) -> Option<SocketAddr> {
    let (address, port) = field.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |index: usize| {
        let digits = address.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    let ip: IpAddr = match address.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let mut bytes = [0; 16];
            for (index, chunk) in bytes.chunks_exact_mut(4).enumerate() {
                chunk.copy_from_slice(&word(index)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip.to_canonical(), port))
}

#[cfg(all(test, target_endian = "little"))]
mod tests {
    use super::*;

    const ROW: &str =
        "  12: 0100007F:A1B2 0100007F:C33F 01 00000000:00000000 00:00000000 00000000  1000        0 4242 1";

    #[test]
    fn the_clients_row_names_its_user_and_the_servers_own_row_does_not() {
        let (client, server) = ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap());
        assert_eq!(row_of(ROW, client, server), Some(Owner::User(1000)));
        assert_eq!(row_of(ROW, server, client), None);
        assert_eq!(row_of("  sl  local_address rem_address   st", client, server), None);
    }

    #[test]
    fn a_row_is_found_among_others_of_the_same_port() {
        let (client, server) = ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap());
        let (other, head) =
            (ROW.replace("0100007F:A1B2", "0200007F:A1B2"), "  sl  local_address rem_address");
        let table = [head, &other, ROW, &other, ""].join("\n");
        assert_eq!(find(table.as_bytes(), client, server), Some(Owner::User(1000)));
        assert_eq!(find(ROW.as_bytes(), client, server), Some(Owner::User(1000)));
        assert_eq!(find([head, &other].join("\n").as_bytes(), client, server), None);
    }

    #[test]
    fn a_caller_that_has_hung_up_is_not_taken_for_root() {
        let (client, server) = ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap());
        for row in [ROW.replace(" 01 ", " 06 "), ROW.replace(" 4242 ", " 0 ")] {
            let row = row.replace(" 1000 ", " 0 ");
            assert_eq!(row_of(&row, client, server), Some(Owner::Nobody), "{row}");
        }
    }

    #[test]
    fn the_kernel_and_its_table_name_the_same_user() {
        let me = Some(Owner::User(nix::unistd::getuid().as_raw()));
        for address in ["127.0.0.1:0", "[::1]:0"] {
            // A machine without IPv6 has nothing to compare.
            let Ok(listener) = std::net::TcpListener::bind(address) else { continue };
            let server = listener.local_addr().unwrap();
            let client = std::net::TcpStream::connect(server).unwrap();
            let (_served, peer) = listener.accept().unwrap();
            let table = if server.is_ipv4() { "/proc/net/tcp" } else { "/proc/net/tcp6" };
            let read = || find(&std::fs::read(table).unwrap(), peer, server);
            // A kernel without tcp_diag says nothing.
            let asked = ask(peer, server);
            assert!(asked == me || asked.is_none(), "{asked:?}");
            assert_eq!(read(), me);
            // Who has said all it had to say still hears.
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!((ask(peer, server), read()), (asked, me));
            drop(client);
            let gone = (ask(peer, server), read());
            assert!(gone.0 != me && gone.1 != me, "{gone:?}");
        }
    }

    #[test]
    fn an_ipv4_caller_on_an_ipv6_socket_is_found() {
        let row = ROW.replace("0100007F:A1B2", "0000000000000000FFFF00000100007F:A1B2");
        let peer = "[::ffff:127.0.0.1]:41394".parse().unwrap();
        assert_eq!(row_of(&row, peer, "127.0.0.1:49983".parse().unwrap()), Some(Owner::User(1000)));
        let six = parse_address("00000000000000000000000001000000:0050").unwrap();
        assert_eq!(six, "[::1]:80".parse().unwrap());
    }
}
