//! Two gateways, one on each side.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::process::Signal;

use super::{Daemon, Gateway};
use crate::options::Options;
use crate::status::Status;
use crate::topology::{Side, Topology};
use crate::{SOON, ping, process};

/// Both gateways of a topology.
pub struct Pair {
    /// Side A.
    pub a: Gateway,
    /// Side B.
    pub b: Gateway,
}

impl Pair {
    /// Starts both with the usual options after `change`, and waits until both are up.
    ///
    /// # Errors
    /// Those of [`Gateway::start`] and [`Gateway::wait_up`].
    pub fn start(net: &Topology, daemon: Daemon, change: impl Fn(Side, Options) -> Options) -> Result<Self> {
        let start = |side| Gateway::start(net, side, daemon, &change(side, Options::of(side)));
        let mut pair = Self { a: start(Side::A)?, b: start(Side::B)? };
        pair.a.wait_up()?;
        pair.b.wait_up()?;
        Ok(pair)
    }

    /// Pings from LAN to LAN, in both directions, until both ends have keys for both directions: sealed ones if both may be sealed,
    /// else dynamic ones.
    ///
    /// # Errors
    /// Logs and counters, if that takes longer than [`SOON`].
    pub fn wait_for_keys(&self, net: &Topology) -> Result<()> {
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            // Packets drive the exchange: every round sends one each way and waits for its answer.
            for side in [Side::A, Side::B] {
                let one = ping::Plan { timeout: Duration::from_millis(500), ..ping::Plan::count(1) };
                ping::run(net.lan(side), side.other().host(), &one)?;
            }
            let (a, b) = (self.a.status()?, self.b.status()?);
            if self.has_keys(&a) && self.has_keys(&b) {
                return Ok(());
            }
            if Instant::now() > deadline {
                let logs = format!("{}\n{}", self.a.log.text(), self.b.log.text());
                bail!("no keys after {SOON:?}\nA: {a:?}\nB: {b:?}\n{logs}");
            }
        }
    }

    /// Whether an end has keys for both directions, of the kind that both ends may have.
    pub fn has_keys(&self, end: &Status) -> bool {
        if [&self.a, &self.b].iter().all(|end| end.options().may_be_sealed()) {
            end.is_sealed()
        } else {
            end.has_key("send") && end.has_key("receive")
        }
    }

    /// The gateway of a side.
    pub fn of(&self, side: Side) -> &Gateway {
        match side {
            Side::A => &self.a,
            Side::B => &self.b,
        }
    }

    /// Stops both at the same time and returns how they ended.
    ///
    /// # Errors
    /// Those of [`Gateway::stop`].
    pub fn stop(self) -> Result<[ExitStatus; 2]> {
        process::signal(self.b.pid(), Signal::TERM)?;
        Ok([self.a.stop()?, self.b.stop()?])
    }
}
