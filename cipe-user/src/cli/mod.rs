//! The command line for people.

pub mod bench_cipher;
