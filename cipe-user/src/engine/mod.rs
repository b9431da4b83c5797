<<<<<<< HEAD
//! The engine: what the kernel module was. Tunnels, the packet path and its workers; keys come from daemons over the
//! control socket and live in eBPF maps.
//!
//! A control thread (`manager`) owns devices, maps and connections; workers own sockets, frames and ciphers. The packet
//! path is pure functions over slices around them. May import every lower room; imported by `cli`.

pub mod checksum;
pub mod coalesce;
mod counters;
pub mod headers;
mod keys;
mod manager;
mod outer;
mod random;
pub mod replay;
pub mod segment;
#[cfg(test)]
mod testpackets;
mod tunnel;
mod worker;

pub use manager::{EngineOptions, run};
=======
//! The engine: tunnels, the packet path and its workers.

use crate::control::launch::Readiness;
use crate::control::run_dir::RunDir;

/// How an engine runs.
#[derive(Debug)]
pub struct EngineOptions {
    /// Go on when the last tunnel has gone.
    pub stay: bool,
    /// Where the control socket is.
    pub run_dir: RunDir,
    /// To be told when the engine listens, if it was started by a daemon.
    pub readiness: Option<Readiness>,
}

/// Runs the engine until its last tunnel has gone, or a signal ends it.
///
/// # Errors
/// The engine cannot start: what, where, how to fix.
pub fn run(options: EngineOptions) -> anyhow::Result<()> {
    drop(options.readiness);
    anyhow::bail!("this build has no engine; {}; build one that has", options.run_dir.path().display())
}
>>>>>>> ciped
