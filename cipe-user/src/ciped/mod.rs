//! The daemon: options, key exchange, scripts; one process a tunnel.

pub mod exchange;
