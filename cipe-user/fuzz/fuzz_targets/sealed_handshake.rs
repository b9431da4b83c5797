//! See `src/sealed_handshake.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| cipe_fuzz::sealed_handshake::run(input));
