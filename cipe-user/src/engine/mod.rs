//! The engine: tunnels, the packet path and its workers.

pub mod checksum;
pub mod coalesce;
pub mod headers;
pub mod replay;
pub mod segment;

#[cfg(test)]
mod testpackets;
