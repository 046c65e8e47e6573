//! The machine's generation id: the hypervisor changes it when a snapshot is restored, and the kernel tells user space with an event of its
//! device `vmgenid` (`NEW_VMGENID=1`, Linux 6.10). Nothing is polled, and a machine without the device has no listener.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Where the driver shows that there is such a device.
const DRIVERS: [&str; 2] = ["/sys/bus/acpi/drivers/vmgenid", "/sys/bus/platform/drivers/vmgenid"];

/// The multicast group of the kernel's own events (netlink(7), NETLINK_KOBJECT_UEVENT).
const KERNEL_EVENTS: u32 = 1;

/// The longest event, in bytes (the kernel's UEVENT_BUFFER_SIZE is 2048).
const EVENT_LIMIT: usize = 4096;

/// Waits for changes of the generation id.
#[derive(Debug)]
pub(super) struct Generations(AsyncFd<OwnedFd>);

impl Generations {
    /// `None` on a machine without the device.
    ///
    /// # Errors
    /// When the kernel's events cannot be listened to.
    pub(super) fn listen() -> io::Result<Option<Self>> {
        if !DRIVERS.iter().any(|driver| Path::new(driver).exists()) {
            return Ok(None);
        }
        Self::open().map(Some)
    }

    fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let events =
            socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)?;
        bind(events.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
        // SAFETY: the socket is open and stays the AsyncFd's own, unchanged, to its end.
        Ok(Self(unsafe { AsyncFd::register_with_interest(events, Interest::READABLE)? }))
    }

    /// Returns at the next change.
    pub(super) async fn changed(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut event = [0; EVENT_LIMIT];
            let received = ready.try_io(|socket| Ok(receive(socket.get_ref(), &mut event)?));
            match received {
                // A process can send here, too: only what comes from the kernel counts.
                Ok(Ok((length, Some(0)))) if is_new_generation(&event[..length]) => return Ok(()),
                // Events were lost: it might have been among them, and a connection too many cut is the smaller harm.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }
}

/// The length of a message and its sender's port: 0 is the kernel.
fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> nix::Result<(usize, Option<u32>)> {
    let (length, sender) = recvfrom::<NetlinkAddr>(socket.as_raw_fd(), buffer)?;
    Ok((length, sender.map(|sender| sender.pid())))
}

/// An event is `change@/devices/...` and `NAME=value` strings, each ended by a zero.
fn is_new_generation(event: &[u8]) -> bool {
    event.split(|byte| *byte == 0).any(|field| field == b"NEW_VMGENID=1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_event_of_the_generation_counts() {
        let event = b"change@/devices/vmgenid\0ACTION=change\0SUBSYSTEM=acpi\0NEW_VMGENID=1\0SEQNUM=1\0";
        assert!(is_new_generation(event));
        assert!(!is_new_generation(b"change@/devices/x\0NAME=NEW_VMGENID=1\0"));
        assert!(!is_new_generation(b""));
    }

    #[tokio::test]
    async fn a_process_cannot_pretend_to_be_the_kernel() {
        let generations = Generations::open().unwrap();
        let own = nix::sys::socket::getsockname::<NetlinkAddr>(generations.0.get_ref().as_raw_fd()).unwrap();
        let sender = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )
        .unwrap();
        let target = NetlinkAddr::new(own.pid(), 0);
        // Without the right to send at all, the kernel refuses it by itself.
        let _sent = nix::sys::socket::sendto(
            sender.as_raw_fd(),
            b"x\0NEW_VMGENID=1\0",
            &target,
            nix::sys::socket::MsgFlags::empty(),
        );
        let waited = tokio::time::timeout(std::time::Duration::from_millis(50), generations.changed()).await;
        assert!(waited.is_err());
    }
}
