//! SIGHUP: what a running tunnel can take over of changed options, and what wants a restart.

use super::Daemon;
use crate::ciped::options::{self, Severity};

/// Options that a running tunnel takes over. The new `ipup` and `arg` are for the scripts to come.
const LIVE: &[&str] = &["ping", "toping", "maxerr", "tokxts", "ipdown", "arg"];

impl Daemon {
    /// Reads the options again and applies what can be applied; says what could not.
    pub(super) fn reload(&mut self) {
        let device = self.facts.device.clone();
        let (draft, problems) = options::load(&self.setup.sources);
        let (options, problems) = options::settle(&draft, problems);
        for problem in &problems {
            match problem.severity {
                Severity::Error => tracing::error!("{device}: {problem}"),
                Severity::Warning => tracing::warn!("{device}: {problem}"),
            }
        }
        let Some(options) = options else {
            tracing::error!("{device}: options not applied; the tunnel goes on with those it has");
            return;
        };
        let (applied, kept): (Vec<_>, Vec<_>) =
            draft.changes(&self.setup.draft).into_iter().partition(|name| LIVE.contains(name));
        let running = &mut self.setup.options;
        running.ping = options.ping;
        running.toping = options.toping;
        running.maxerr = options.maxerr;
        running.tokxts = options.tokxts;
        running.ipdown = options.ipdown;
        running.arg = options.arg.clone();
        self.facts.arg = options.arg;
        // The next reload compares with what runs by then.
        self.setup.draft.take_over(&draft, LIVE);
        self.facts.options = self.setup.draft.environment();
        self.session.reload(running, self.clock.now());
        let list = |names: Vec<&str>| if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        tracing::info!("{device}: options read again; applied: {}; needs a restart: {}", list(applied), list(kept));
    }
}
