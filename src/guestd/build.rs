//! How the agent is linked.

use std::ffi::{CStr, c_char};

/// The first C library whose start-up code applies packed relocations to a static program.
const PACKED_SINCE: (u32, u32) = (2, 36);

unsafe extern "C" {
    /// gnu_get_libc_version(3).
    safe fn gnu_get_libc_version() -> *const c_char;
}

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=no-unwind.ld");
    pack_relocations();
    // Only what ships: backtraces of every other build stay whole.
    if std::env::var("OPT_LEVEL").is_ok_and(|level| level == "z") {
        let folder = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{folder}/no-unwind.ld,--no-eh-frame-hdr");
    }
}

/// A static program relocates itself: its table of relocations is read whole at each start. Packed (DT_RELR) it takes a fiftieth of the room.
/// The machine that builds is asked for its C library, because its static one is linked in.
fn pack_relocations() {
    // SAFETY: the function returns a string that lives as long as the program.
    let version = unsafe { CStr::from_ptr(gnu_get_libc_version()) };
    if std::env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|env| env == "gnu")
        && parse(&version.to_string_lossy()).is_some_and(|version| version >= PACKED_SINCE)
    {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

fn parse(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}
