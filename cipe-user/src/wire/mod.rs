//! CIPE protocol 3 as pure functions over slices: packet layout, padding, P, CRC; key-exchange and control messages,
//! encrypted and in clear; the inner packet.
//!
//! Knows no sockets, clocks or tables. May import `cipher`; imported by `engine`, `ciped` and `cli`.

pub mod clear;
pub mod crc;
pub mod message;
pub mod packet;
pub mod vectors;
