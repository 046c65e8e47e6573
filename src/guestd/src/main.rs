//! guestd: the agent inside every microVM.

fn main() {}
