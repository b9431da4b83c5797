//! Inside an IP packet: everything that looks into a packet of the private side, or makes one. Pure functions over slices: any
//! octets give an answer, none a panic.
//!
//! May import `cipe-common` only, and no other room; imported by `engine` and `cli`.

pub mod checksum;
pub mod coalesce;
pub mod ecn;
pub mod ethernet;
pub mod fragment;
pub mod headers;
pub mod ip;
pub mod mss;
pub mod nested;
pub mod payload;
pub mod segment;
#[cfg(test)]
pub(crate) mod test_packets;
pub mod too_big;
