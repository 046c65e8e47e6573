//! wire
/// Generated
#[allow(missing_docs, unreachable_pub, missing_debug_implementations, clippy::all)]
pub mod wire {
    include!(concat!(env!("OUT_DIR"), "/wire.rs"));
}
