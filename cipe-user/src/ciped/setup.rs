//! The configuration of a daemon.

use super::identity::Identity;
use super::memory::MemoryFile;
use super::options::{Draft, Options, Sources};
use crate::control::launch::Launch;
use crate::control::run_dir::RunDir;

/// The options of a daemon, and how it reaches its engine.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where the options came from, to be read again on SIGHUP.
    pub sources: Sources,
    /// As read at the start.
    pub draft: Draft,
    /// The options in use, after names are resolved and rules are checked.
    pub options: Options,
    /// Where the engine is.
    pub run_dir: RunDir,
    /// What is remembered from one daemon of the tunnel to the next.
    pub memory: MemoryFile,
    /// How to start it.
    pub engine: Launch,
}

impl Setup {
    /// What makes its tunnel the same one when another daemon runs it.
    pub(super) fn identity(&self) -> Identity {
        Identity::new(&self.sources, &self.options)
    }
}
