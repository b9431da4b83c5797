//! Everything that reads or writes IP packets of the private side. Pure functions over slices: they accept any octets
//! and never panic.
//!
//! May import `cipe-common`, and no other module of this crate; imported by `engine` and `cli`.

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
