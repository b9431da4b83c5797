//! The engine, in the role of the old kernel module: tunnels, the packet path, and its workers. Keys come from daemons
//! over the control socket and are in eBPF maps.
//!
//! The control thread (`manager`) owns devices, maps and connections; workers own sockets, frames and ciphers. The
//! datapath between them is functions over batches. May import every lower module; imported by `cli`.

mod bucket;
mod carrier;
mod datapath;
pub mod frames;
mod icmp;
pub mod lan;
mod ledger;
mod locked;
mod manager;
mod pace;
mod port;
mod random;
mod report;
mod tunnel;
mod watchdog;
mod worker;

#[cfg(feature = "harness")]
pub use carrier::{outer, socks};
#[cfg(feature = "harness")]
pub use datapath::pair;
pub use manager::{EngineOptions, Role, run};

/// Packets of one batch: as many as the ciphers process in parallel.
pub const BATCH: usize = 128;

/// Locks a mutex, even if a worker has died while it held the lock. The guarded data are sets and single values, so
/// they are always consistent.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
