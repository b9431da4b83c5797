//! SIGHUP: which changed options a running tunnel applies, and which need a restart.

use super::Daemon;
use crate::ciped::options::{self, Severity};

/// Options that a running tunnel applies. A new `ipdown` or `arg` applies to the next script.
const LIVE_OPTIONS: &[&str] = &["ping", "toping", "maxerr", "tokxts", "ipdown", "arg"];

impl Daemon {
    /// Reads the options again and applies those that it can; logs the others.
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
            tracing::error!("{device}: options not applied; the tunnel keeps its former options");
            return;
        };
        let (applied, kept): (Vec<_>, Vec<_>) =
            draft.changes(&self.setup.draft).into_iter().partition(|name| LIVE_OPTIONS.contains(name));
        let running = &mut self.setup.options;
        running.ping = options.ping;
        running.toping = options.toping;
        running.maxerr = options.maxerr;
        running.tokxts = options.tokxts;
        running.ipdown = options.ipdown;
        running.arg = options.arg.clone();
        self.facts.arg = options.arg;
        // The next reload compares with the options that are in use then.
        self.setup.draft.take_over(&draft, LIVE_OPTIONS);
        self.facts.options = self.setup.draft.environment();
        self.session.reload(running, self.clock.now());
        let list = |names: Vec<&str>| if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
        tracing::info!("{device}: options read again; applied: {}; needs a restart: {}", list(applied), list(kept));
    }
}
