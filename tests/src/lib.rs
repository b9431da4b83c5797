//! The test bed: network namespaces, traffic, captures and guarded gateways, for scenarios, `cargo xtask run` and benches.
//!
//! Everything made here has a name that is unique by process, and is removed when its guard is dropped, also on a panic.
//! Nothing here imports `cipe-user`: the bed uses the project as an operator does, by option files, packets and status. Waits
//! end at an event or at a deadline; nothing sleeps.

pub mod attacked;
pub mod bpf;
pub mod bridge;
pub mod capture;
pub mod exercise;
pub mod fleet;
pub mod flows;
pub mod forged;
pub mod gateway;
pub mod impair;
pub mod joined;
pub mod leak;
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
pub mod sealed_peer;
pub mod soak;
pub mod socks;
pub mod status;
pub mod stream;
pub mod topology;
pub mod traces;
pub mod traffic;

use std::time::Duration;

/// Deadline for events that should take well under a second. It is long, since a machine may be busy, and it costs nothing,
/// since a wait ends at the event.
pub const SOON: Duration = Duration::from_secs(60);

/// Whether we run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a test may make namespaces; if not, prints why the test is skipped.
pub fn may_make_namespaces() -> bool {
    if !is_root() {
        eprintln!("skipped: network namespaces need root; run `cargo xtask test` as root");
    }
    is_root()
}

/// Removes every namespace and run directory of this process at once, for a signal handler that cannot drop guards.
pub fn remove_everything() {
    let own = |owner| owner == std::process::id();
    namespace::remove_all(own);
    topology::remove_run_directories(own);
}

/// Removes what killed processes have left: every namespace and run directory of a process that no longer exists.
pub fn remove_abandoned() {
    let gone = |owner| !process::exists(owner);
    namespace::remove_all(gone);
    topology::remove_run_directories(gone);
}
