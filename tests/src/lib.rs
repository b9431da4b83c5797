//! The test bed: network namespaces, traffic, captures and guarded gateways, for scenarios, `cargo xtask run` and benches.
//!
//! Everything made here has a name that is unique by process, and is removed when its guard is dropped, also on a panic.
//! Nothing here imports `cipe-user`: the bed sees the project as an operator does, by option files, packets and status.
//! Waits end at an event or at a deadline; nothing sleeps.

pub mod bridge;
pub mod capture;
pub mod exercise;
pub mod fleet;
pub mod flows;
pub mod gateway;
pub mod impair;
pub mod line;
pub mod log;
pub mod namespace;
pub mod net;
pub mod netem;
pub mod offload;
pub mod options;
pub mod original;
pub mod peer;
pub mod ping;
pub mod process;
pub mod relayed;
pub mod socks;
pub mod status;
pub mod stream;
pub mod topology;
pub mod traffic;

use std::time::Duration;

/// Deadline of waits for something that should take well under a second; generous, since a machine may have other work and
/// a test that is done waits no longer.
pub const SOON: Duration = Duration::from_secs(60);

/// Whether we run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a test may make namespaces. Prints why it is skipped when it may not.
pub fn may_make_namespaces() -> bool {
    if !is_root() {
        eprintln!("skipped: network namespaces need root; run `cargo xtask test` as root");
    }
    is_root()
}

/// Removes every namespace and run directory of this process at once, for a signal that leaves no time to drop guards.
pub fn remove_everything() {
    let own = |owner| owner == std::process::id();
    namespace::remove_all(own);
    topology::remove_run_directories(own);
}

/// Removes what processes have left that were killed: every namespace and run directory of one that is no more.
pub fn remove_abandoned() {
    let gone = |owner| !process::exists(owner);
    namespace::remove_all(gone);
    topology::remove_run_directories(gone);
}
