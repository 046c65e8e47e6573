//! Brings the loopback interface up, and one more interface when the command line describes it.
//!
//! `guestd.net=eth0,10.0.2.15/24,10.0.2.2,10.0.2.3`: interface, address, gateway, name server; the last two may be
//! left out. Speaks route netlink by hand: three fixed messages, written as bytes, so neither a crate nor `unsafe`.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::command_line::CommandLine;
use super::console::say;
use super::machine::write_if_absent;

const LOOPBACK: &str = "lo";

/// One interface, as the host describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    name: String,
    address: Ipv4Addr,
    prefix: u8,
    gateway: Option<Ipv4Addr>,
    name_server: Option<Ipv4Addr>,
}

impl Interface {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let name = parts.next().unwrap_or_default();
        if name.is_empty() || name.len() > 15 || name.contains('/') || name.starts_with('.') {
            return Err(format!("`{name}` is not an interface name"));
        }
        let (address, prefix) = parts
            .next()
            .and_then(|part| part.split_once('/'))
            .ok_or("the address must have the form 10.0.2.15/24")?;
        let prefix =
            prefix.parse().ok().filter(|bits| *bits <= 32).ok_or(format!("`/{prefix}` is not a prefix"))?;
        let interface = Self {
            name: name.to_owned(),
            address: parse_address(address)?,
            prefix,
            gateway: parts.next().map(parse_address).transpose()?,
            name_server: parts.next().map(parse_address).transpose()?,
        };
        match parts.next() {
            None => Ok(interface),
            Some(rest) => Err(format!("nothing may follow the name server, found `{rest}`")),
        }
    }
}

fn parse_address(text: &str) -> Result<Ipv4Addr, String> {
    text.parse().map_err(|_| format!("`{text}` is not an IPv4 address"))
}

/// Does what it can and says what it could not: a sandbox without a network is still a sandbox.
pub(super) fn bring_up(command_line: &CommandLine) {
    let outcome = Netlink::open().and_then(|mut netlink| netlink.link_up(LOOPBACK));
    if let Err(error) = outcome {
        say!("the loopback interface is down: {error}");
    }
    let Some(text) = command_line.value("guestd.net") else { return };
    match Interface::parse(text) {
        Err(why) => say!("no network: guestd.net={text}: {why}"),
        Ok(interface) => {
            if let Err(error) = configure(&interface) {
                say!("no network on {}: {error}", interface.name);
            }
        }
    }
}

fn configure(interface: &Interface) -> io::Result<()> {
    let mut netlink = Netlink::open()?;
    netlink.link_up(&interface.name)?;
    netlink.add_address(interface)?;
    if let Some(gateway) = interface.gateway {
        netlink.add_default_route(gateway)?;
    }
    match interface.name_server {
        Some(server) => write_if_absent("/etc/resolv.conf", &format!("nameserver {server}\n")),
        None => Ok(()),
    }
}

// === Route netlink ===

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const NLMSG_ERROR: u16 = 2;
/// Request, acknowledge.
const PLAIN: u16 = 0x1 | 0x4;
/// Request, acknowledge, create, and replace what is there.
const CREATE: u16 = PLAIN | 0x400 | 0x100;
const IFF_UP: u32 = 1;
const AF_INET: u8 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RTN_UNICAST: u8 = 1;
const HEADER: usize = 16;

struct Netlink {
    socket: OwnedFd,
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let protocol = SockProtocol::NetlinkRoute;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        Ok(Self { socket })
    }

    fn link_up(&mut self, name: &str) -> io::Result<()> {
        let mut body = vec![0; 4];
        body.extend(interface_index(name)?.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        body.extend(IFF_UP.to_ne_bytes());
        self.request(RTM_NEWLINK, PLAIN, &body)
    }

    fn add_address(&mut self, interface: &Interface) -> io::Result<()> {
        let mut body = vec![AF_INET, interface.prefix, 0, 0];
        body.extend(interface_index(&interface.name)?.to_ne_bytes());
        push_attribute(&mut body, IFA_LOCAL, interface.address);
        push_attribute(&mut body, IFA_ADDRESS, interface.address);
        self.request(RTM_NEWADDR, CREATE, &body)
    }

    fn add_default_route(&mut self, gateway: Ipv4Addr) -> io::Result<()> {
        let mut body = vec![AF_INET, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, 0, RTN_UNICAST, 0, 0, 0, 0];
        push_attribute(&mut body, RTA_GATEWAY, gateway);
        self.request(RTM_NEWROUTE, CREATE, &body)
    }

    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let fd = self.socket.as_raw_fd();
        send(fd, &message(kind, flags, body), MsgFlags::empty())?;
        let mut answer = [0; 1024];
        // The kernel handles a request while it is being sent: the answer is there already, or never comes.
        let length = recv(fd, &mut answer, MsgFlags::MSG_DONTWAIT)?;
        acknowledged(&answer[..length])
    }
}

fn interface_index(name: &str) -> io::Result<u32> {
    let path = format!("/sys/class/net/{name}/ifindex");
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{name} has no index")))
}

fn push_attribute(body: &mut Vec<u8>, kind: u16, address: Ipv4Addr) {
    body.extend(8u16.to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(address.octets());
}

fn message(kind: u16, flags: u16, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut bytes = length.to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend(body);
    bytes
}

/// An acknowledgement is an error message with the number 0.
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    let code = answer.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, code) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(code)) => Err(Errno::from_raw(code.saturating_neg()).into()),
        _ => Err(io::Error::other("the kernel's answer was not an acknowledgement")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_is_read_from_the_command_line() {
        let full = Interface::parse("eth0,10.0.2.15/24,10.0.2.2,10.0.2.3").unwrap();
        assert_eq!((full.name.as_str(), full.prefix), ("eth0", 24));
        assert_eq!(full.gateway, Some(Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(full.name_server, Some(Ipv4Addr::new(10, 0, 2, 3)));
        let short = Interface::parse("eth0,10.0.2.15/24").unwrap();
        assert_eq!((short.gateway, short.name_server), (None, None));
    }

    #[test]
    fn a_wrong_interface_says_what_is_wrong() {
        for (text, word) in [
            ("", "interface"),
            ("../x,1.2.3.4/8", "interface"),
            ("eth0", "form"),
            ("eth0,1.2.3.4", "form"),
            ("eth0,1.2.3.4/33", "prefix"),
            ("eth0,1.2.3/8", "IPv4"),
            ("eth0,1.2.3.4/8,x", "IPv4"),
            ("eth0,1.2.3.4/8,1.2.3.1,1.2.3.2,more", "more"),
        ] {
            let error = Interface::parse(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_message_carries_its_own_length() {
        let bytes = message(RTM_NEWLINK, PLAIN, &[0; 16]);
        assert_eq!(bytes[..4], 32u32.to_ne_bytes());
        assert_eq!(bytes.len(), 32);
    }

    #[test]
    fn a_refusal_of_the_kernel_keeps_its_reason() {
        let mut answer = vec![0; 36];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert!(acknowledged(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-1i32).to_ne_bytes());
        assert_eq!(acknowledged(&answer).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert!(acknowledged(&answer[..10]).is_err());
    }
}
