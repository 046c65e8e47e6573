//! Which user owns the other end of a TCP connection inside this machine. TCP has no SO_PEERCRED; the kernel knows each socket's user, and
//! tells by sock_diag(7). Its TCP half is a module that small guests leave out: there the table of all sockets is read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU8, Ordering};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use nix::errno::Errno;
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

/// Whether the kernel can be asked. It says the same to who asks for a socket that is not there as where the module is missing, and may
/// look for the module each time: a socket that is there tells, once.
static ASKING: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const WORKS: u8 = 1;
const MISSING: u8 = 2;

/// A connection as its server sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Accepted {
    pub peer: SocketAddr,
    pub local: SocketAddr,
    /// The inode of the server's socket.
    pub inode: u64,
}

/// What the kernel says about one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Row {
    state: u8,
    uid: u32,
    /// 0 for one that no process has any more.
    inode: u64,
}

impl Row {
    /// Its user. One that its process has closed is shown as user 0: that is not root.
    fn user(self) -> Option<u32> {
        let is_held = self.inode != 0 && matches!(self.state, ESTABLISHED | FIN_WAIT1 | FIN_WAIT2);
        is_held.then_some(self.uid)
    }
}

impl Accepted {
    /// The user of the client's socket; `None` when no process of this machine holds such a socket, or this connection is not there any
    /// more: then another one may have its addresses.
    ///
    /// # Errors
    /// What the agent or the machine has none left of, to find out with.
    pub(super) async fn user(self) -> Result<Option<u32>, Errno> {
        if ASKING.load(Ordering::Relaxed) == WORKS {
            return Ok(self.asked()?.flatten());
        }
        tokio::task::spawn_blocking(move || self.look_up()).await.unwrap_or(Ok(None))
    }

    fn look_up(self) -> Result<Option<u32>, Errno> {
        if ASKING.load(Ordering::Relaxed) != MISSING
            && let Some(user) = self.asked()?
        {
            ASKING.store(WORKS, Ordering::Relaxed);
            return Ok(user);
        }
        for _ in 0..READS {
            let client = self.read(self.peer, self.local)?;
            if let (Some(client), Some(own)) = (client, self.read(self.local, self.peer)?)
                && self.is_this(own)
            {
                ASKING.store(MISSING, Ordering::Relaxed);
                return Ok(client.user());
            }
        }
        Ok(None)
    }

    /// `None` when the kernel knows nothing of the server's socket, or cannot be asked.
    fn asked(self) -> Result<Option<Option<u32>>, Errno> {
        let client = ask(self.peer, self.local)?;
        // Looked at last. A connection that is still there was there before, and no other had its addresses.
        let own = ask(self.local, self.peer)?;
        Ok(own.map(|own| client.filter(|_| self.is_this(own)).and_then(Row::user)))
    }

    /// Of the socket that is bound to `from` and connected to `to`.
    fn read(self, from: SocketAddr, to: SocketAddr) -> Result<Option<Row>, Errno> {
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let table = match std::fs::read(table) {
                Ok(table) => table,
                Err(error) => {
                    lacking(Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
                    continue;
                }
            };
            if let Some(row) = find(&table, self.peer.port(), from, to) {
                return Ok(Some(row));
            }
        }
        Ok(None)
    }

    /// sock_diag has room for 32 bits of an inode.
    fn is_this(self, own: Row) -> bool {
        own.inode & 0xffff_ffff == self.inode & 0xffff_ffff
    }
}

/// Tells a machine that cannot be asked for the moment from one that never can.
fn lacking(error: Errno) -> Result<(), Errno> {
    match error {
        Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS => Err(error),
        _ => Ok(()),
    }
}

/// Asks the kernel for the socket that is bound to `from` and connected to `to`.
fn ask(from: SocketAddr, to: SocketAddr) -> Result<Option<Row>, Errno> {
    let addresses = (from.ip().to_canonical(), to.ip().to_canonical());
    let family = if addresses.0.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket_id = SocketId {
        source_port: from.port(),
        destination_port: to.port(),
        source_address: addresses.0,
        destination_address: addresses.1,
        interface_id: if let SocketAddr::V6(from) = from { from.scope_id() } else { 0 },
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
    let answered =
        socket(AddressFamily::Netlink, kind, flags, SockProtocol::NetlinkSockDiag).and_then(|kernel| {
            send(kernel.as_raw_fd(), &buffer[..message.buffer_len()], MsgFlags::empty())?;
            // The kernel answers before send(2) returns (netlink(7) is a call, not a conversation).
            recv(kernel.as_raw_fd(), &mut buffer, MsgFlags::empty())
        });
    let length = match answered {
        Ok(length) => length,
        Err(error) => return lacking(error).map(|()| None),
    };
    Ok(match NetlinkMessage::deserialize(&buffer[..length]).map(|message| message.payload) {
        Ok(NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(socket))) => {
            let found = socket.header;
            Some(Row { state: found.state, uid: found.uid, inode: found.inode.into() })
        }
        _ => None,
    })
}

/// The line of a table that is about a socket. Tables can have tens of thousands: only those with `port`, the client's, are taken apart.
fn find(table: &[u8], port: u16, from: SocketAddr, to: SocketAddr) -> Option<Row> {
    let port = format!(":{port:04X} ");
    memchr::memmem::find_iter(table, port.as_bytes()).find_map(|at| {
        let start = memchr::memrchr(b'\n', &table[..at]).map_or(0, |end| end + 1);
        let line = table[start..].split(|byte| *byte == b'\n').next()?;
        row_of(std::str::from_utf8(line).ok()?, from, to)
    })
}

/// What a line of the table (proc_net_tcp(5)) says, if it is about that socket.
fn row_of(line: &str, from: SocketAddr, to: SocketAddr) -> Option<Row> {
    let mut fields = line.split_whitespace();
    let (bound, connected) = (fields.nth(1)?, fields.next()?);
    let same = |field, address: SocketAddr| {
        parse_address(field)
            .is_some_and(|found| found.port() == address.port() && found.ip() == address.ip().to_canonical())
    };
    if !same(bound, from) || !same(connected, to) {
        return None;
    }
    let state = u8::from_str_radix(fields.next()?, 16).ok()?;
    // queues, timer, retransmits, uid, timeout, inode
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?.parse().ok()?;
    Some(Row { state, uid, inode })
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
    use std::net::{Shutdown, TcpListener};
    use std::os::fd::AsFd;
    use std::time::Duration;

    use socket2::{Domain, Socket, Type};

    use super::*;

    const ROW: &str =
        "  12: 0100007F:A1B2 0100007F:C33F 01 00000000:00000000 00:00000000 00000000  1000        0 4242 1";
    const FOUND: Option<Row> = Some(Row { state: ESTABLISHED, uid: 1000, inode: 4242 });

    fn addresses() -> (SocketAddr, SocketAddr) {
        ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap())
    }

    #[test]
    fn the_clients_row_names_its_user_and_the_servers_own_row_does_not() {
        let (client, server) = addresses();
        assert_eq!(row_of(ROW, client, server), FOUND);
        assert_eq!(FOUND.unwrap().user(), Some(1000));
        assert_eq!(row_of(ROW, server, client), None);
        assert_eq!(row_of("  sl  local_address rem_address   st", client, server), None);
    }

    #[test]
    fn a_row_is_found_among_others_of_the_same_port() {
        let (client, server) = addresses();
        let (other, head) =
            (ROW.replace("0100007F:A1B2", "0200007F:A1B2"), "  sl  local_address rem_address");
        let servers =
            "  7: 0100007F:C33F 0100007F:A1B2 01 00000000:00000000 00:00000000 00000000  0 0 4243 1";
        let table = [head, &other, servers, ROW, &other, ""].join("\n");
        assert_eq!(find(table.as_bytes(), client.port(), client, server), FOUND);
        assert_eq!(find(table.as_bytes(), client.port(), server, client).unwrap().inode, 4243);
        assert_eq!(find(ROW.as_bytes(), client.port(), client, server), FOUND);
        assert_eq!(find([head, &other].join("\n").as_bytes(), client.port(), client, server), None);
    }

    #[test]
    fn a_caller_that_has_hung_up_is_not_taken_for_root() {
        let (client, server) = addresses();
        for row in [ROW.replace(" 01 ", " 06 "), ROW.replace(" 4242 ", " 0 ")] {
            let row = row.replace(" 1000 ", " 0 ");
            assert_eq!(row_of(&row, client, server).unwrap().user(), None, "{row}");
        }
    }

    fn accept(listener: &TcpListener) -> (std::net::TcpStream, Accepted) {
        let (served, peer) = listener.accept().unwrap();
        let inode = nix::sys::stat::fstat(served.as_fd()).unwrap().st_ino;
        let local = served.local_addr().unwrap();
        (served, Accepted { peer, local, inode })
    }

    #[test]
    fn the_kernel_and_its_table_name_the_same_user() {
        let me = Some(nix::unistd::getuid().as_raw());
        for (bound, called) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "127.0.0.1")] {
            // A machine without IPv6 has nothing to compare.
            let Ok(listener) = TcpListener::bind(bound) else { continue };
            let called = SocketAddr::new(called.parse().unwrap(), listener.local_addr().unwrap().port());
            let client = std::net::TcpStream::connect(called).unwrap();
            let (_served, accepted) = accept(&listener);
            assert_eq!(accepted.look_up(), Ok(me), "{bound}");
            if ASKING.load(Ordering::Relaxed) == WORKS {
                let tables =
                    [std::fs::read("/proc/net/tcp").unwrap(), std::fs::read("/proc/net/tcp6").unwrap()];
                for (from, to) in [(accepted.peer, accepted.local), (accepted.local, accepted.peer)] {
                    let mut rows =
                        tables.iter().filter_map(|table| find(table, accepted.peer.port(), from, to));
                    assert_eq!(ask(from, to), Ok(rows.next()), "{bound}");
                }
            }
            // Who has said all it had to say still hears.
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(accepted.look_up(), Ok(me));
            drop(client);
            assert_eq!(accepted.look_up(), Ok(None));
        }
    }

    /// Else who has sent a request and hung up is taken for whoever gets its port next.
    #[test]
    fn a_connection_is_not_taken_for_the_next_one_with_its_addresses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let connect = |from: SocketAddr| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&server.into()).unwrap();
            socket
        };
        let first = connect("127.0.0.1:0".parse().unwrap());
        let (_served, of_first) = accept(&listener);
        assert!(of_first.look_up().unwrap().is_some());
        // A reset: the addresses are free at once.
        drop(first);
        assert_eq!(of_first.look_up(), Ok(None));
        let _second = connect(of_first.peer);
        assert_eq!(of_first.look_up(), Ok(None));
        let (_served, of_second) = accept(&listener);
        assert_eq!(of_first.peer, of_second.peer);
        assert!(of_second.look_up().unwrap().is_some());
        assert_eq!(of_first.look_up(), Ok(None));
    }

    #[test]
    fn an_ipv4_caller_on_an_ipv6_socket_is_found() {
        let row = ROW.replace("0100007F:A1B2", "0000000000000000FFFF00000100007F:A1B2");
        let peer = "[::ffff:127.0.0.1]:41394".parse().unwrap();
        assert_eq!(row_of(&row, peer, "127.0.0.1:49983".parse().unwrap()), FOUND);
        let six = parse_address("00000000000000000000000001000000:0050").unwrap();
        assert_eq!(six, "[::1]:80".parse().unwrap());
    }
}
