//! XDP programs of others on carrier devices. The kernel notifies of none that comes or goes by a BPF link, so they are polled:
//! AF_XDP is tried again when another program has gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::platform::Platform;
use super::super::poll::PollTimer;

/// Interval between two polls of the programs on devices.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Programs that keep AF_XDP off devices.
pub(super) struct Rivals {
    platform: Arc<Platform>,
    /// Their ids, by ifindex.
    programs: BTreeMap<u32, u32>,
    poll: PollTimer,
}

impl Rivals {
    /// No such program is known yet.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self { platform, programs: BTreeMap::new(), poll: PollTimer::new(POLL_INTERVAL) }
    }

    /// The program that keeps AF_XDP off a device.
    pub(super) fn on(&self, ifindex: u32) -> Option<u32> {
        self.programs.get(&ifindex).copied()
    }

    /// Notes the program on a device that has just been refused, if there is one.
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

    /// Whether the programs are to be polled now.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        self.poll.is_due(now)
    }

    /// Polls the devices that were refused; returns those whose program has changed, with the present one.
    pub(super) async fn poll(&mut self) -> Vec<(u32, Option<u32>)> {
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
