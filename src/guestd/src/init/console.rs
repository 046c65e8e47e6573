//! What init says on the console. A console that cannot be written to must never stop the machine, so every error
//! of writing is dropped here, and only here.

use std::fmt::Arguments;
use std::io::Write;

/// One line on the console, with the prefix that tells it apart from the kernel's.
pub(super) fn write_line(line: Arguments<'_>) {
    // One write for the whole line: the kernel and the agent write to the same console.
    let text = format!("guestd: {line}\n");
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Like `println!`, but on the console, and it cannot fail.
macro_rules! say {
    ($($part:tt)*) => { $crate::init::console::write_line(format_args!($($part)*)) };
}
pub(super) use say;
