//! Who listens on which TCP port, from `/proc/net/tcp` and `/proc/net/tcp6` (proc(5)).
//!
//! The kernel lists listening sockets first, so reading stops at the first other one and costs the same however many connections there
//! are. `sock_diag` would ask more precisely, but its TCP half is a module (`tcp_diag`) that small guests leave out.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// TCP_LISTEN, as the files write it.
const LISTEN: &str = "0A";

/// One listening socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    pub address: IpAddr,
    pub port: u16,
}

impl Listener {
    /// An IPv4 address written as an IPv6 one is the IPv4 address.
    pub fn canonical(self) -> IpAddr {
        self.address.to_canonical()
    }
}

/// All listening sockets of the agent's network namespace. Reads files that are made from memory; blocks for nothing else.
///
/// # Errors
/// When `/proc` is not there.
pub fn read() -> io::Result<Vec<Listener>> {
    let mut all = parse(BufReader::new(File::open("/proc/thread-self/net/tcp")?))?;
    match File::open("/proc/thread-self/net/tcp6") {
        Ok(file) => all.extend(parse(BufReader::new(file))?),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    Ok(all)
}

fn parse(table: impl BufRead) -> io::Result<Vec<Listener>> {
    let mut found = Vec::new();
    for line in table.lines().skip(1) {
        let line = line?;
        let mut words = line.split_ascii_whitespace().skip(1);
        let (local, state) = (words.next(), words.nth(1));
        if state != Some(LISTEN) {
            break;
        }
        found.extend(local.and_then(listener));
    }
    Ok(found)
}

/// `0100007F:1F90`: each 32 bits of the address as a number of this machine, then the port.
fn listener(text: &str) -> Option<Listener> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut octets = [0; 16];
    let (words, _) = address.as_bytes().as_chunks::<8>();
    for (word, place) in words.iter().zip(octets.as_chunks_mut::<4>().0) {
        *place = u32::from_str_radix(std::str::from_utf8(word).ok()?, 16).ok()?.to_ne_bytes();
    }
    let address = match words.len() {
        1 => IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3])),
        4 => IpAddr::V6(Ipv6Addr::from(octets)),
        _ => return None,
    };
    Some(Listener { address, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listening_sockets_are_read_up_to_the_first_connection() {
        let table = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   2: 0100007F:1F90 0100007F:8888 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   3: 00000000:0017 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
";
        let found = parse(table.as_bytes()).unwrap();
        let expected = [("127.0.0.1", 8080), ("0.0.0.0", 22)];
        assert_eq!(
            found,
            expected.map(|(address, port)| Listener { address: address.parse().unwrap(), port })
        );
    }

    #[test]
    fn an_ipv6_address_is_four_numbers() {
        let one = listener("00000000000000000000000001000000:0050").unwrap();
        assert_eq!((one.address, one.port), (IpAddr::V6(Ipv6Addr::LOCALHOST), 80));
        let mapped = listener("0000000000000000FFFF00000100007F:0050").unwrap();
        assert_eq!(mapped.canonical(), IpAddr::V4(Ipv4Addr::LOCALHOST));
    }

    #[test]
    fn what_is_no_address_is_left_out() {
        for text in ["", "0100007F", "0100007F:", "0100007:50", "XX00007F:0050", "0100007F0100007F:0050"] {
            assert_eq!(listener(text), None, "{text}");
        }
    }

    #[test]
    fn a_new_listener_of_this_machine_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let expected = Listener { address: address.ip(), port: address.port() };
        assert!(read().unwrap().contains(&expected));
    }
}
