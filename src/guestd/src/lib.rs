//! The agent inside every microVM, as a library: `main.rs` only chooses how to start it.

pub mod filesystem;
pub mod identity;
pub mod init;
pub mod settings;
