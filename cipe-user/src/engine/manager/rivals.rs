//! XDP programs of others on carrier devices. The kernel tells of none that comes or goes by a BPF link, so it is looked at now and
//! then: AF_XDP is taken again when another program has gone, and given up where its own was detached.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::Manager;

/// Between two looks.
const LOOK: Duration = Duration::from_secs(1);

/// Programs that keep AF_XDP off devices.
#[derive(Debug, Default)]
pub struct Rivals {
    /// Their numbers, by ifindex.
    programs: BTreeMap<u32, u32>,
    looked: Option<Instant>,
}

impl Rivals {
    /// The program on a device that was refused for it.
    pub fn on(&self, ifindex: u32) -> Option<u32> {
        self.programs.get(&ifindex).copied()
    }
}

impl Manager {
    /// Notes which program keeps AF_XDP off a device that has just been refused, if it is one.
    pub(super) async fn note_rival(&mut self, ifindex: u32) {
        if let Ok((Some(program), _)) = self.netlink.attached(ifindex).await {
            self.rivals.programs.insert(ifindex, program);
        }
    }

    /// Looks at what is attached to the carrier devices.
    pub(super) async fn tend_rivals(&mut self, now: Instant) {
        if self.rivals.looked.is_some_and(|looked| now.duration_since(looked) < LOOK) {
            return;
        }
        self.rivals.looked = Some(now);
        for (ifindex, known) in self.rivals.programs.clone() {
            // A device that is gone has no program either.
            let present = self.netlink.attached(ifindex).await.map_or(None, |(program, _)| program);
            match present {
                Some(program) if program == known => continue,
                Some(program) => _ = self.rivals.programs.insert(ifindex, program),
                None => {
                    self.rivals.programs.remove(&ifindex);
                    self.refused.remove(&ifindex);
                    for tenant in self.tenants.values_mut() {
                        tenant.refused.take_if(|refused| *refused == ifindex);
                    }
                }
            }
            self.choose_doors(ifindex).await;
        }
        for (ifindex, own) in self.carriers.programs() {
            let Ok((present, _)) = self.netlink.attached(ifindex).await else { continue };
            if present != Some(own) {
                self.lose_program(ifindex).await;
            }
        }
    }

    /// Takes up that somebody has detached the program of a carrier device: its sockets get nothing any more.
    async fn lose_program(&mut self, ifindex: u32) {
        let Some(carrier) = self.carriers.get(ifindex) else { return };
        let message = format!("{}: somebody has detached the engine's XDP program; attaching it again", carrier.name);
        tracing::warn!("{message}");
        for number in carrier.tunnels() {
            self.notice(number, message.clone());
        }
        self.shut(ifindex).await;
        self.choose_doors(ifindex).await;
    }
}
