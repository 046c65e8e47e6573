//! bpf(2), as far as port forwarding needs it: three kinds of map, two kinds of program, and what attaches them.
//!
//! The programs are a few instructions each, so they are put together here (`programs`) and need no compiler and no loader.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::programs::Instruction;

/// Commands, types and flags of bpf(2), as `linux/bpf.h` numbers them.
const MAP_CREATE: i64 = 0;
const MAP_UPDATE_ELEM: i64 = 2;
const PROG_LOAD: i64 = 5;
const RAW_TRACEPOINT_OPEN: i64 = 17;
const LINK_CREATE: i64 = 28;
const ATTACH_SK_LOOKUP: u32 = 36;

/// None of the helpers that the programs call asks for the GPL.
const LICENSE: &[u8] = b"Apache-2.0\0";

/// What a map keeps.
#[derive(Clone, Copy, Debug)]
pub enum MapKind {
    /// `entries` values of 64 bits.
    Array { entries: u32 },
    /// Sockets.
    Sockets { entries: u32 },
    /// A queue of records that user space waits for.
    Ring { bytes: u32 },
}

/// What a program is for.
#[derive(Clone, Copy, Debug)]
pub enum ProgramKind {
    RawTracepoint,
    SocketLookup,
}

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct MapUpdate {
    map: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach: u32,
}

#[repr(C)]
#[derive(Default)]
struct RawTracepointOpen {
    name: u64,
    program: u32,
    padding: u32,
}

#[repr(C)]
#[derive(Default)]
struct LinkCreate {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
}

/// One call of bpf(2).
///
/// # Safety
/// The numbers in `attributes` that are addresses must point to what `command` expects there, for as long as the call takes.
unsafe fn call<T>(command: i64, attributes: &mut T) -> io::Result<i32> {
    let attributes: *mut T = attributes;
    // SAFETY: the structs above are prefixes of `union bpf_attr`, and their size is given; the addresses in them are the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    i32::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}

/// # Safety
/// As [`call`], and the command must be one that answers with a new descriptor.
unsafe fn open<T>(command: i64, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the kernel sets close-on-exec on all that bpf(2) makes.
    unsafe { Ok(OwnedFd::from_raw_fd(call(command, attributes)?)) }
}

fn number(descriptor: BorrowedFd<'_>) -> u32 {
    u32::try_from(descriptor.as_raw_fd()).unwrap_or_default()
}

fn address<T>(value: &T) -> u64 {
    std::ptr::from_ref(value).addr() as u64
}

#[derive(Debug)]
pub struct Map(OwnedFd);

impl Map {
    /// # Errors
    /// Without CAP_BPF, or in a kernel without BPF.
    pub fn new(kind: MapKind) -> io::Result<Self> {
        let (kind, key_size, value_size, max_entries) = match kind {
            MapKind::Array { entries } => (2, 4, 8, entries),
            MapKind::Sockets { entries } => (15, 4, 4, entries),
            MapKind::Ring { bytes } => (27, 0, 0, bytes),
        };
        let mut attributes = MapCreate { kind, key_size, value_size, max_entries, flags: 0 };
        // SAFETY: there are no addresses in it, and it makes a descriptor.
        Ok(Self(unsafe { open(MAP_CREATE, &mut attributes)? }))
    }

    /// Sets a word of an [`MapKind::Array`].
    ///
    /// # Errors
    /// When there is no such entry.
    pub fn set_word(&self, index: u32, word: u64) -> io::Result<()> {
        self.update(index, &word)
    }

    /// Puts a socket into a [`MapKind::Sockets`]; it leaves by being closed.
    ///
    /// # Errors
    /// When the kernel takes no such socket.
    pub fn set_socket(&self, index: u32, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.update(index, &number(socket))
    }

    /// `V` has the map's size of value.
    fn update<V>(&self, index: u32, value: &V) -> io::Result<()> {
        let (key, value) = (address(&index), address(value));
        let mut attributes = MapUpdate { map: number(self.0.as_fd()), key, value, ..MapUpdate::default() };
        // SAFETY: key and value live through the call and have the sizes that `new` gave the map.
        unsafe { call(MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
    }
}

impl AsFd for Map {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[derive(Debug)]
pub struct Program(OwnedFd);

impl Program {
    /// # Errors
    /// When the kernel has no such kind of program, or its verifier refuses this one.
    pub fn load(kind: ProgramKind, instructions: &[Instruction]) -> io::Result<Self> {
        let (kind, expected_attach) = match kind {
            ProgramKind::RawTracepoint => (17, 0),
            ProgramKind::SocketLookup => (30, ATTACH_SK_LOOKUP),
        };
        let mut attributes = ProgramLoad {
            kind,
            instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
            instructions: instructions.as_ptr().addr() as u64,
            license: LICENSE.as_ptr().addr() as u64,
            name: *b"guestd_ports\0\0\0\0",
            expected_attach,
            ..ProgramLoad::default()
        };
        // SAFETY: instructions and license live through the call; the count is theirs, the license ends with a zero; it makes a descriptor.
        Ok(Self(unsafe { open(PROG_LOAD, &mut attributes)? }))
    }

    /// Runs it at each hit of a tracepoint, on every processor, until the result is dropped.
    ///
    /// # Errors
    /// When the kernel has no such tracepoint.
    pub fn attach_to_tracepoint(&self, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
        let name = name.as_ptr().addr() as u64;
        let mut attributes =
            RawTracepointOpen { name, program: number(self.0.as_fd()), ..RawTracepointOpen::default() };
        // SAFETY: the name lives through the call and ends with a zero; it makes a descriptor.
        unsafe { open(RAW_TRACEPOINT_OPEN, &mut attributes) }
    }

    /// Runs it at each connection that comes into a network namespace, until the result is dropped.
    ///
    /// # Errors
    /// When the kernel has no such hook (before 5.9), or 64 programs are there already.
    pub fn attach_to_lookup(&self, namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let (program, target) = (number(self.0.as_fd()), number(namespace));
        let mut attributes = LinkCreate { program, target, attach: ATTACH_SK_LOOKUP, flags: 0 };
        // SAFETY: there are no addresses in it, and it makes a descriptor.
        unsafe { open(LINK_CREATE, &mut attributes) }
    }
}

/// The reading end of a [`MapKind::Ring`] whose records say no more than that they are there.
///
/// Its descriptor becomes readable with the first record after [`Ring::clear`].
#[derive(Debug)]
pub struct Ring {
    map: Map,
    consumer: NonNull<AtomicU64>,
    producer: NonNull<AtomicU64>,
    page: usize,
}

// SAFETY: the pages are shared with the kernel anyway, and are touched through atomics only.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// A ring of the least size that there is: one page.
    ///
    /// # Errors
    /// As [`Map::new`].
    pub fn new() -> io::Result<Self> {
        // SAFETY: sysconf takes no addresses.
        let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
        let map = Map::new(MapKind::Ring { bytes: u32::try_from(page).unwrap_or(4096) })?;
        // Where the ring's positions are: linux/kernel/bpf/ringbuf.c, "consumer page and producer page".
        let consumer = map_page(&map, page, libc::PROT_READ | libc::PROT_WRITE, 0)?;
        let producer = map_page(&map, page, libc::PROT_READ, page).inspect_err(|_| unmap(consumer, page))?;
        Ok(Self { map, consumer, producer, page })
    }

    pub fn map(&self) -> &Map {
        &self.map
    }

    /// Throws away what is in it.
    pub fn clear(&self) {
        // SAFETY: both pages are mapped as long as self lives, aligned, and begin with a 64-bit position.
        let (consumer, producer) = unsafe { (self.consumer.as_ref(), self.producer.as_ref()) };
        loop {
            let end = producer.load(Ordering::SeqCst);
            consumer.store(end, Ordering::SeqCst);
            // The kernel wakes for a record that finds the ring empty. One that came before it could see that is cleared here.
            fence(Ordering::SeqCst);
            if producer.load(Ordering::SeqCst) == end {
                return;
            }
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.map.0.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        unmap(self.consumer, self.page);
        unmap(self.producer, self.page);
    }
}

fn map_page(map: &Map, page: usize, protection: i32, offset: usize) -> io::Result<NonNull<AtomicU64>> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: a new shared mapping of one page at an address that the kernel chooses.
    let mapped = unsafe {
        libc::mmap(std::ptr::null_mut(), page, protection, libc::MAP_SHARED, map.0.as_raw_fd(), offset)
    };
    if mapped == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(mapped.cast()).ok_or_else(|| io::Error::other("a mapping at address zero"))
}

fn unmap(mapped: NonNull<AtomicU64>, page: usize) {
    // SAFETY: the page was mapped by `map_page` and is not used afterwards.
    unsafe { libc::munmap(mapped.as_ptr().cast(), page) };
}
