//! XDP programs of others on carrier devices. The kernel tells of none that comes or goes by a BPF link, so it is looked at now and
//! then: AF_XDP is taken again when another program has gone, and given up where its own was detached.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Manager;
use super::platform::Platform;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Programs that keep AF_XDP off devices.
pub(super) struct Rivals {
    platform: Arc<Platform>,
    /// Their numbers, by ifindex.
    programs: BTreeMap<u32, u32>,
    looked: Option<Instant>,
}

impl Rivals {
    /// None yet.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self { platform, programs: BTreeMap::new(), looked: None }
    }

    /// The program on a device that was refused for it.
    pub(super) fn on(&self, ifindex: u32) -> Option<u32> {
        self.programs.get(&ifindex).copied()
    }

    /// Notes which program keeps AF_XDP off a device that has just been refused, if it is one.
    pub(super) async fn note(&mut self, ifindex: u32) {
        if let Some(program) = self.attached(ifindex).await {
            self.programs.insert(ifindex, program);
        }
    }

    /// The program on a device. A device that is gone has none.
    async fn attached(&self, ifindex: u32) -> Option<u32> {
        match self.platform.netlink.attached(ifindex).await {
            Ok((program, _)) => program,
            Err(error) => {
                tracing::debug!("{error}");
                None
            }
        }
    }

    /// Whether it is time for another look.
    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.looked.is_none_or(|looked| now.duration_since(looked) >= LOOK);
        if is_due {
            self.looked = Some(now);
        }
        is_due
    }

    /// Looks at the devices that were refused; returns those where another program is now, or none.
    async fn look(&mut self) -> Vec<(u32, Option<u32>)> {
        let mut changed = Vec::new();
        for (ifindex, known) in self.programs.clone() {
            let present = self.attached(ifindex).await;
            match present {
                Some(program) if program == known => continue,
                Some(program) => self.programs.insert(ifindex, program),
                None => self.programs.remove(&ifindex),
            };
            changed.push((ifindex, present));
        }
        changed
    }
}

impl Manager {
    /// Looks at what is attached to the carrier devices.
    pub(super) async fn tend_rivals(&mut self, now: Instant) {
        if !self.rivals.is_due(now) {
            return;
        }
        for (ifindex, present) in self.rivals.look().await {
            if present.is_none() {
                self.tunnels.forget_refusal(ifindex);
            }
            self.choose_doors(ifindex).await;
        }
        for (ifindex, own) in self.carriers.programs() {
            // A device that is gone is closed when the kernel tells so.
            let Ok((present, _)) = self.platform.netlink.attached(ifindex).await else { continue };
            if present != Some(own) {
                self.lose_program(ifindex);
            }
        }
    }

    /// Takes up that somebody has detached the program of a carrier device: its sockets get nothing any more.
    fn lose_program(&mut self, ifindex: u32) {
        let Some(carrier) = self.carriers.get(ifindex) else { return };
        let message = format!("{}: somebody has detached the engine's XDP program; attaching it again", carrier.name);
        tracing::warn!("{message}");
        for number in self.shut_carrier(ifindex) {
            self.daemons.notice(number, message.clone());
        }
    }
}
