//! See `src/socks.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cipe_fuzz::socks::run(input));
