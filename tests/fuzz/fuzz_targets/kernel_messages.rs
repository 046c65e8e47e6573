#![no_main]

libfuzzer_sys::fuzz_target!(init: guestd_fuzz::enter_sandbox(), |data: &[u8]| guestd_fuzz::kernel_messages::run(data));
