//! The targets by name, and what they stand on. Shared with `src/guestd/tests/replay_fuzz_corpora.rs`.

#[path = "agent.rs"]
pub mod agent;
#[path = "connect_envelope.rs"]
pub mod connect_envelope;
#[path = "json_bodies.rs"]
pub mod json_bodies;
#[path = "kernel_messages.rs"]
pub mod kernel_messages;
#[path = "multipart.rs"]
pub mod multipart;
#[path = "path_resolution.rs"]
pub mod path_resolution;
#[path = "process_state_machine.rs"]
pub mod process_state_machine;
#[path = "sandbox.rs"]
pub mod sandbox;
#[path = "signature.rs"]
pub mod signature;

/// One input.
pub type Target = fn(&[u8]);

/// All of them.
pub const TARGETS: [(&str, Target); 7] = [
    ("connect_envelope", connect_envelope::run),
    ("json_bodies", json_bodies::run),
    ("kernel_messages", kernel_messages::run),
    ("multipart", multipart::run),
    ("path_resolution", path_resolution::run),
    ("process_state_machine", process_state_machine::run),
    ("signature", signature::run),
];
