//! The agent inside every microVM, as a library: `main.rs` only chooses how to start it.
//!
//! A folder is a capability: each has one type that owns its state and one thin file that speaks its wire protocol. [`agent`] puts them
//! together; [`doors`] are the ways in.

pub mod access;
pub mod activity;
pub mod agent;
pub mod cgroup;
pub mod code;
pub mod doors;
pub mod filesystem;
pub mod freeze;
pub mod identity;
pub mod inhibit;
pub mod init;
pub mod logs;
pub mod memory;
pub mod mmds;
pub mod notice;
pub mod ports;
pub mod process;
pub mod services;
pub mod settings;
pub mod system;
pub mod trust;
pub mod upgrade;
pub mod volumes;
