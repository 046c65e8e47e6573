//! What is fuzzed, as functions of bytes: libFuzzer calls them with what it makes up (`fuzz_targets`), and guestd's ordinary tests
//! with what is kept in `corpus`.

mod targets;

pub use targets::*;

/// Goes where no input can do harm, or ends the process.
pub fn enter_sandbox() {
    if let Err(error) = sandbox::enter() {
        eprintln!("not fuzzing: {error}");
        std::process::exit(1);
    }
}
