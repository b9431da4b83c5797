//! See `src/sealed_packet.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cipe_fuzz::sealed_packet::run(input));
