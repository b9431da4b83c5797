//! Access to the kernel: eBPF objects and maps, links and addresses, routes and neighbours.
//!
//! May import `cipe_common`, `xsk` and `cipher`; must not know the state of tunnels, the lives of keys, or packets. Imported by
//! `engine`, `ciped` and `cli`. Only [`bpf`] uses aya; all netlink code acts in the network namespace of the calling
//! thread.

pub mod addresses;
pub mod attached;
pub mod bpf;
pub mod confinement;
pub mod device;
mod ethernet;
pub mod ethtool;
mod events;
pub mod features;
pub mod forwarding;
mod genetlink;
pub mod guard_routes;
pub mod hub;
pub mod keys;
pub mod known_bad;
pub mod links;
mod local_addresses;
pub mod neighbours;
pub mod netdev;
pub mod netlink;
pub mod nexthop;
pub mod owner;
pub mod policies;
pub mod release;
pub mod routes;
pub mod scheduling;
mod settings;
pub(crate) mod shared;
pub mod shields;
mod sysctl;
#[cfg(test)]
pub(crate) mod testnet;
pub mod thread_state;
mod whole;
pub mod zone;
