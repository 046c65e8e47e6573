//! guestd: the agent inside every microVM.

mod filesystem;
mod identity;
mod init;
mod settings;

fn main() {}
