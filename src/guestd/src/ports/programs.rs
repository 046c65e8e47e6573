//! The two programs that run in the kernel, instruction by instruction (contract: the kernel's Documentation/bpf/standardization).

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// TCP_LISTEN of `net/tcp_states.h`.
const LISTEN: i32 = 10;

/// Helpers that the programs call, as `linux/bpf.h` numbers them.
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const RINGBUF_OUTPUT: i32 = 130;

/// "Go on" for a socket lookup.
const SK_PASS: i32 = 1;

/// Where the fields are in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;
const LOCAL_PORT: i16 = 60;

/// `struct bpf_insn`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    code: u8,
    /// The destination in the low half, the source in the high one.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// Operation codes.
const LOAD_32: u8 = 0x61;
const LOAD_64: u8 = 0x79;
const STORE_32: u8 = 0x63;
const STORE_IMMEDIATE_32: u8 = 0x62;
const STORE_IMMEDIATE_64: u8 = 0x7a;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const AND_IMMEDIATE: u8 = 0x57;
const SHIFT_RIGHT: u8 = 0x7f;
const SHIFT_RIGHT_IMMEDIATE: u8 = 0x77;
const JUMP_IF_EQUAL: u8 = 0x15;
const JUMP_UNLESS_EQUAL: u8 = 0x55;
const JUMP_UNLESS_EQUAL_32: u8 = 0x56;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const LOAD_WIDE: u8 = 0x18;
/// In the source register of [`LOAD_WIDE`]: the immediate is a map's descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// The register that points to the end of the stack.
const FRAME: u8 = 10;

#[derive(Debug, Default)]
struct Assembler {
    instructions: Vec<Instruction>,
    /// Jumps to the end, whose distance is not known yet.
    to_end: Vec<usize>,
}

impl Assembler {
    fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> &mut Self {
        self.instructions.push(Instruction { code, registers: to | from << 4, offset, immediate });
        self
    }

    fn jump_to_end(&mut self, code: u8, register: u8, immediate: i32) -> &mut Self {
        self.to_end.push(self.instructions.len());
        self.add(code, register, 0, 0, immediate)
    }

    fn load_map(&mut self, to: u8, map: BorrowedFd<'_>) -> &mut Self {
        self.add(LOAD_WIDE, to, MAP_DESCRIPTOR, 0, map.as_raw_fd()).add(0, 0, 0, 0, 0)
    }

    /// A pointer to a place on the stack.
    fn load_place(&mut self, to: u8, place: i16) -> &mut Self {
        self.add(MOVE, to, FRAME, 0, 0).add(ADD_IMMEDIATE, to, 0, 0, i32::from(place))
    }

    /// The end, which all jumps lead to: returns `result`.
    fn end(mut self, result: i32) -> Vec<Instruction> {
        let end = self.instructions.len();
        for index in self.to_end.drain(..) {
            self.instructions[index].offset = i16::try_from(end - index - 1).unwrap_or_default();
        }
        self.add(MOVE_IMMEDIATE, 0, 0, 0, result).add(EXIT, 0, 0, 0, 0);
        self.instructions
    }
}

/// For the tracepoint `inet_sock_set_state(socket, old state, new state)`: a record in `ring` when a socket begins or ceases to listen.
pub fn announce_listeners(ring: impl AsFd) -> Vec<Instruction> {
    let mut program = Assembler::default();
    program
        .add(LOAD_64, 2, 1, 8, 0)
        .add(LOAD_64, 3, 1, 16, 0)
        // Over the next instruction when it listened before.
        .add(JUMP_IF_EQUAL, 2, 0, 1, LISTEN)
        .jump_to_end(JUMP_UNLESS_EQUAL, 3, LISTEN)
        .add(STORE_IMMEDIATE_64, FRAME, 0, -8, 0)
        .load_map(1, ring.as_fd())
        .load_place(2, -8)
        .add(MOVE_IMMEDIATE, 3, 0, 0, 8)
        .add(MOVE_IMMEDIATE, 4, 0, 0, 0)
        .add(CALL, 0, 0, 0, RINGBUF_OUTPUT);
    program.end(0)
}

/// For socket lookups: a TCP connection to `address` and a port whose bit is set in `ports` goes to the socket at `index` of `sockets`.
/// Everything else goes where it would have gone.
pub fn steer(address: IpAddr, index: u32, ports: impl AsFd, sockets: impl AsFd) -> Vec<Instruction> {
    let mut program = Assembler::default();
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    program
        .add(MOVE, 6, 1, 0, 0)
        .add(LOAD_32, 0, 6, FAMILY, 0)
        .jump_to_end(JUMP_UNLESS_EQUAL, 0, family)
        .add(LOAD_32, 0, 6, PROTOCOL, 0)
        .jump_to_end(JUMP_UNLESS_EQUAL, 0, libc::IPPROTO_TCP);
    let (octets, field) = match address {
        IpAddr::V4(address) => (address.octets().to_vec(), LOCAL_IP4),
        IpAddr::V6(address) => (address.octets().to_vec(), LOCAL_IP6),
    };
    for (word, place) in octets.as_chunks::<4>().0.iter().zip((field..).step_by(4)) {
        program.add(LOAD_32, 0, 6, place, 0).jump_to_end(JUMP_UNLESS_EQUAL_32, 0, i32::from_ne_bytes(*word));
    }
    program
        // The word of the port's bit, and the bit.
        .add(LOAD_32, 7, 6, LOCAL_PORT, 0)
        .add(MOVE, 8, 7, 0, 0)
        .add(SHIFT_RIGHT_IMMEDIATE, 8, 0, 0, 6)
        .add(STORE_32, FRAME, 8, -4, 0)
        .load_map(1, ports.as_fd())
        .load_place(2, -4)
        .add(CALL, 0, 0, 0, MAP_LOOKUP_ELEM)
        .jump_to_end(JUMP_IF_EQUAL, 0, 0)
        .add(LOAD_64, 1, 0, 0, 0)
        .add(AND_IMMEDIATE, 7, 0, 0, 63)
        .add(SHIFT_RIGHT, 1, 7, 0, 0)
        .add(AND_IMMEDIATE, 1, 0, 0, 1)
        .jump_to_end(JUMP_IF_EQUAL, 1, 0)
        // The socket. An index has few bits: it is a number that an i32 holds.
        .add(STORE_IMMEDIATE_32, FRAME, 0, -4, i32::try_from(index).unwrap_or_default())
        .load_map(1, sockets.as_fd())
        .load_place(2, -4)
        .add(CALL, 0, 0, 0, MAP_LOOKUP_ELEM)
        .jump_to_end(JUMP_IF_EQUAL, 0, 0)
        .add(MOVE, 7, 0, 0, 0)
        .add(MOVE, 1, 6, 0, 0)
        .add(MOVE, 2, 7, 0, 0)
        .add(MOVE_IMMEDIATE, 3, 0, 0, 0)
        .add(CALL, 0, 0, 0, SK_ASSIGN)
        .add(MOVE, 1, 7, 0, 0)
        .add(CALL, 0, 0, 0, SK_RELEASE);
    program.end(SK_PASS)
}
