//! What we ask of the kernel: eBPF objects and maps, links and addresses, routes and neighbours.
//!
//! May import `cipe_common` and `xsk`; must not know tunnels' state, keys' lives or packets. aya is used in [`bpf`] only.

pub mod bpf;
pub mod keys;
mod shared;
