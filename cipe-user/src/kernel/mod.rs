//! What we ask of the kernel: eBPF objects and maps, links and addresses, routes and neighbours.
//!
//! Knows no tunnels, keys' use or packets. Imported by `engine` and `cli`. Everything netlink acts in the network
//! namespace of the thread that calls it.

pub mod device;
pub mod ethtool;
mod events;
pub mod links;
pub mod neighbours;
pub mod netlink;

pub mod nexthop;
mod owner;
pub mod routes;
mod sysctl;
#[cfg(test)]
mod testnet;
