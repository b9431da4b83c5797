//! The engine: what the kernel module was. Tunnels, the packet path and its workers; keys come from daemons over the
//! control socket and live in eBPF maps.
//!
//! A control thread (`manager`) owns devices, maps and connections; workers own sockets, frames and ciphers. The packet
//! path is pure functions over slices around them. May import every lower room; imported by `cli`.

mod bucket;
mod carrier;
mod datapath;
pub mod frames;
mod icmp;
pub mod lan;
mod locked;
mod manager;
mod pace;
mod port;
mod random;
mod report;
mod tunnel;
mod worker;

#[cfg(feature = "harness")]
pub use datapath::pair;
pub use manager::{EngineOptions, run};

/// Packets of one batch: as many as the ciphers run side by side.
pub const BATCH: usize = 128;

/// What a mutex guards. A worker that died while it held it left nothing half done: all that is guarded so are sets and
/// single values.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
