//! What one agent tells the next: a sealed memory file, so that no secret touches a disk, and descriptors that stay open.
//!
//! The file begins with [`MAGIC`], the number of its form and the length of its head. The head is JSON; what processes wrote lately
//! follows it as it is.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::Handover;

const MAGIC: &[u8; 8] = b"guestdho";

/// The form of the state. A program says with `resume --schema` which one it reads.
pub const SCHEMA: u32 = 1;

/// The longest head, in bytes: queued events are most of it.
const HEAD_LIMIT: u64 = 256 * 1024 * 1024;

/// A moment on CLOCK_MONOTONIC, in nanoseconds: it means the same to the next program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stamp(u64);

impl Stamp {
    pub fn of(at: Instant) -> Self {
        let (now, clock) = (Instant::now(), monotonic());
        let nanos = |length: Duration| u64::try_from(length.as_nanos()).unwrap_or(u64::MAX);
        Self(match at.checked_duration_since(now) {
            Some(ahead) => clock.saturating_add(nanos(ahead)),
            None => clock.saturating_sub(nanos(now.duration_since(at))),
        })
    }

    pub fn instant(self) -> Instant {
        let (now, clock) = (Instant::now(), monotonic());
        let moved = match self.0.checked_sub(clock) {
            Some(ahead) => now.checked_add(Duration::from_nanos(ahead)),
            None => now.checked_sub(Duration::from_nanos(clock - self.0)),
        };
        moved.unwrap_or(now)
    }
}

fn monotonic() -> u64 {
    // The kernel has no reason to refuse this clock.
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map(Duration::from).unwrap_or_default();
    u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)
}

/// Bytes that go beside the head.
#[derive(Debug, Default)]
pub struct Store {
    bytes: Vec<u8>,
}

impl Store {
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// None when there is nothing of that length at that place.
    pub fn get(&self, at: u64, length: u64) -> Option<&[u8]> {
        let end = usize::try_from(at.checked_add(length)?).ok()?;
        self.bytes.get(usize::try_from(at).ok()?..end)
    }
}

/// The descriptors that an agent was started with. What nobody takes is closed.
#[derive(Debug, Default)]
pub struct Descriptors(HashMap<RawFd, OwnedFd>);

impl Descriptors {
    /// Takes possession of open descriptors.
    ///
    /// # Safety
    /// Nobody else in this process may own one of them.
    pub unsafe fn inherit(numbers: &[RawFd]) -> Self {
        let mut all = HashMap::new();
        for &number in numbers {
            if number > 2 && !all.contains_key(&number) && set_inherited(number, false).is_ok() {
                // SAFETY: it is open, and nobody else's: the caller's promise, and each number is taken once.
                all.insert(number, unsafe { OwnedFd::from_raw_fd(number) });
            }
        }
        Self(all)
    }

    /// # Errors
    /// When it was not handed over, or was taken already.
    pub fn take(&mut self, number: RawFd) -> io::Result<OwnedFd> {
        self.0.remove(&number).ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("descriptor {number} was not handed over"))
        })
    }
}

/// Whether a descriptor stays open in the next program.
///
/// # Errors
/// When it is not open.
pub(super) fn set_inherited(number: RawFd, inherited: bool) -> io::Result<()> {
    let flags = if inherited { FdFlag::empty() } else { FdFlag::FD_CLOEXEC };
    // SAFETY: borrowed for this one call, which fails when it is not open.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(number) };
    fcntl(fd, FcntlArg::F_SETFD(flags)).map(drop).map_err(io::Error::from)
}

/// Writes the state into a memory file that nobody can change any more.
///
/// # Errors
/// When there is no memory for it.
pub(super) fn write(handover: &Handover, store: &Store) -> io::Result<OwnedFd> {
    let head = serde_json::to_vec(handover)?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"guestd-handover", flags)?);
    file.write_all(MAGIC)?;
    file.write_all(&SCHEMA.to_le_bytes())?;
    file.write_all(&(head.len() as u64).to_le_bytes())?;
    file.write_all(&head)?;
    file.write_all(&store.bytes)?;
    file.seek(SeekFrom::Start(0))?;
    let seals =
        SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file.into())
}

/// Reads what [`write`] wrote.
///
/// # Errors
/// For anything that is of another form.
pub(super) fn read(file: OwnedFd) -> io::Result<(Handover, Store)> {
    let invalid = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("the handover {what}"));
    let mut file = File::from(file);
    let (mut magic, mut schema, mut length) = ([0; 8], [0; 4], [0; 8]);
    file.read_exact(&mut magic)?;
    file.read_exact(&mut schema)?;
    file.read_exact(&mut length)?;
    if &magic != MAGIC {
        return Err(invalid("is none"));
    }
    if u32::from_le_bytes(schema) != SCHEMA {
        return Err(invalid("has a form that this agent does not know"));
    }
    let length = u64::from_le_bytes(length);
    if length > HEAD_LIMIT {
        return Err(invalid("is too long"));
    }
    let mut head = Vec::new();
    (&mut file).take(length).read_to_end(&mut head)?;
    let handover = serde_json::from_slice(&head)?;
    let mut store = Store::default();
    file.read_to_end(&mut store.bytes)?;
    Ok((handover, store))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[tokio::test]
    async fn a_moment_means_the_same_after_a_detour() {
        let now = Instant::now();
        for at in [now, now + Duration::from_secs(90), now - Duration::from_millis(700)] {
            let back = Stamp::of(at).instant();
            let off = back.max(at) - back.min(at);
            assert!(off < Duration::from_millis(20), "{off:?}");
        }
    }

    #[test]
    fn a_descriptor_is_taken_once_and_the_rest_is_closed() {
        let (reader, writer) = io::pipe().unwrap();
        let number = OwnedFd::from(writer);
        let raw = number.as_raw_fd();
        std::mem::forget(number);
        // SAFETY: just forgotten.
        let mut all = unsafe { Descriptors::inherit(&[raw, raw, -1, 1]) };
        let taken = all.take(raw).unwrap();
        assert!(all.take(raw).is_err() && all.take(1).is_err());
        // SAFETY: just given up.
        drop(unsafe { Descriptors::inherit(&[std::os::fd::IntoRawFd::into_raw_fd(taken)]) });
        assert_eq!(io::Read::read(&mut &reader, &mut [0; 4]).unwrap(), 0, "the writing end is closed");
    }

    #[test]
    fn a_place_outside_of_the_store_is_nothing() {
        let mut store = Store::default();
        store.put(b"abc");
        assert_eq!(store.get(1, 2), Some(&b"bc"[..]));
        assert_eq!((store.get(1, 3), store.get(u64::MAX, 1), store.get(9, 0)), (None, None, None));
    }

    #[test]
    fn a_state_of_another_form_is_refused() {
        let of = |bytes: &[u8]| {
            let mut file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
            file.write_all(bytes).unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            read(file.into()).unwrap_err().to_string()
        };
        let with = |schema: u32, length: u64| {
            [&MAGIC[..], &schema.to_le_bytes(), &length.to_le_bytes(), b"{}"].concat()
        };
        assert!(of(&with(SCHEMA + 1, 2)).contains("a form that this agent does not know"));
        assert!(of(&with(SCHEMA, u64::MAX)).contains("too long"));
        assert!(of(&with(SCHEMA, 2)).contains("missing field"));
        assert!(of(b"something else entirely").contains("is none"));
        of(b"short");
    }
}
