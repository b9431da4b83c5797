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
    anyhow::bail!("this build has no engine ({options:?}); build one that has")
}
