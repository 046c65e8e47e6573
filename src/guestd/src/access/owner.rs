//! Which user owns the other end of a TCP connection inside this machine. TCP has no SO_PEERCRED; the kernel's socket table has the user.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The state of a connection that both ends have open (TCP_ESTABLISHED in the kernel's tcp_states.h).
const ESTABLISHED: &str = "01";

/// How often the table is read for a socket that is not in it. The kernel writes it in pieces, and connections that end meanwhile can
/// hide one that stays.
const READS: usize = 3;

/// A line of the table that is about the connection.
#[derive(Debug, PartialEq, Eq)]
enum Row {
    User(u32),
    /// Its process has closed it.
    Nobodys,
}

/// The user of the socket that is bound to `peer` and connected to `local`; `None` when no process of this machine holds such a socket.
pub(super) async fn of(peer: SocketAddr, local: SocketAddr) -> Option<u32> {
    let read = move || {
        let tables = ["/proc/net/tcp", "/proc/net/tcp6"].into_iter();
        tables.filter_map(|table| std::fs::read(table).ok()).find_map(|table| find(&table, peer, local))
    };
    let lookup = move || (0..READS).find_map(|_| read());
    match tokio::task::spawn_blocking(lookup).await {
        Ok(Some(Row::User(uid))) => Some(uid),
        _ => None,
    }
}

/// The line of a table that is about the connection. Tables can have tens of thousands: only those with the client's port are taken apart.
fn find(table: &[u8], peer: SocketAddr, local: SocketAddr) -> Option<Row> {
    let port = format!(":{:04X} ", peer.port());
    memchr::memmem::find_iter(table, port.as_bytes()).find_map(|at| {
        let start = memchr::memrchr(b'\n', &table[..at]).map_or(0, |end| end + 1);
        let line = table[start..].split(|byte| *byte == b'\n').next()?;
        row_of(std::str::from_utf8(line).ok()?, peer, local)
    })
}

/// What a line of the table (proc_net_tcp(5)) says, if it is about that connection as its client sees it.
fn row_of(line: &str, peer: SocketAddr, local: SocketAddr) -> Option<Row> {
    let mut fields = line.split_whitespace();
    let (from, to) = (fields.nth(1)?, fields.next()?);
    let same = |field, address: SocketAddr| {
        parse_address(field)
            .is_some_and(|found| found.port() == address.port() && found.ip() == address.ip().to_canonical())
    };
    if !same(from, peer) || !same(to, local) {
        return None;
    }
    let state = fields.next()?;
    // queues, timer, retransmits, uid, timeout, inode
    let uid = fields.nth(3)?.parse().ok()?;
    let inode = fields.nth(1)?;
    // A socket that its process has closed belongs to nobody, which the table shows as user 0: that is not root.
    Some(if state == ESTABLISHED && inode != "0" { Row::User(uid) } else { Row::Nobodys })
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
        assert_eq!(row_of(ROW, client, server), Some(Row::User(1000)));
        assert_eq!(row_of(ROW, server, client), None);
        assert_eq!(row_of("  sl  local_address rem_address   st", client, server), None);
    }

    #[test]
    fn a_row_is_found_among_others_of_the_same_port() {
        let (client, server) = ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap());
        let (other, head) =
            (ROW.replace("0100007F:A1B2", "0200007F:A1B2"), "  sl  local_address rem_address");
        let table = [head, &other, ROW, &other, ""].join("\n");
        assert_eq!(find(table.as_bytes(), client, server), Some(Row::User(1000)));
        assert_eq!(find(ROW.as_bytes(), client, server), Some(Row::User(1000)));
        assert_eq!(find([head, &other].join("\n").as_bytes(), client, server), None);
    }

    #[test]
    fn a_caller_that_has_hung_up_is_not_taken_for_root() {
        let (client, server) = ("127.0.0.1:41394".parse().unwrap(), "127.0.0.1:49983".parse().unwrap());
        for row in [ROW.replace(" 01 ", " 05 "), ROW.replace(" 4242 ", " 0 ")] {
            let row = row.replace(" 1000 ", " 0 ");
            assert_eq!(row_of(&row, client, server), Some(Row::Nobodys), "{row}");
        }
    }

    #[test]
    fn an_ipv4_caller_on_an_ipv6_socket_is_found() {
        let row = ROW.replace("0100007F:A1B2", "0000000000000000FFFF00000100007F:A1B2");
        let peer = "[::ffff:127.0.0.1]:41394".parse().unwrap();
        assert_eq!(row_of(&row, peer, "127.0.0.1:49983".parse().unwrap()), Some(Row::User(1000)));
        let six = parse_address("00000000000000000000000001000000:0050").unwrap();
        assert_eq!(six, "[::1]:80".parse().unwrap());
    }
}
