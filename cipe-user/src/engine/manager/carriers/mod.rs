//! Carrier devices that AF_XDP serves: opened for the first tunnel whose next hop is on them, closed after the last, or when the UDP
//! sockets are the faster door. Opening and closing wait for workers and the kernel, so they are jobs; the UDP sockets serve
//! meanwhile.

mod carrier;
mod handover;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cipe_common::maps::MAX_CARRIERS;

use super::habit::Habit;
use super::jobs::Jobs;
use super::platform::Platform;
use super::trial::{Trial, TrialChange};
use crate::kernel::bpf::XdpMode;
use crate::kernel::links::{Card, CardKind};
use crate::kernel::netdev;
pub(super) use carrier::Carrier;
use handover::Handover;

/// The carrier devices in use.
pub(super) struct Carriers {
    handover: Arc<Handover>,
    /// By ifindex.
    devices: HashMap<u32, Device>,
    /// How single frames come on devices that might deliver superframes.
    habits: HashMap<u32, Habit>,
    /// The trials of zero copy on devices whose drivers have it; they stay when a device is closed.
    trials: HashMap<u32, Trial>,
}

/// A carrier device and where it stands between the UDP sockets and AF_XDP.
enum Device {
    /// Its AF_XDP sockets are being opened; `gone`: it is to be closed again then.
    Opening { slot: usize, gone: bool },
    /// AF_XDP serves it.
    Open(Carrier),
    /// Its AF_XDP sockets are being closed; `choose`: doors are to be chosen anew then.
    Closing { slot: usize, choose: bool },
}

/// The result of opening or closing a device.
pub(super) enum Ended {
    /// AF_XDP serves the device for the tunnel `asker`, or cannot; `unlikely`: a refusal was to be expected of this device.
    Opened { ifindex: u32, asker: u16, unlikely: bool, carrier: anyhow::Result<Carrier> },
    /// The UDP sockets serve the device again.
    Closed { ifindex: u32 },
}

/// Whether AF_XDP serves a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Served {
    /// Yes.
    Open,
    /// It is being opened or closed; doors are chosen anew after that.
    Changing,
    /// No.
    No,
}

impl Carriers {
    /// None yet.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self {
            handover: Arc::new(Handover::new(platform)),
            devices: HashMap::new(),
            habits: HashMap::new(),
            trials: HashMap::new(),
        }
    }

    /// Whether AF_XDP serves a device as a carrier, or is about to, or still does.
    pub(super) fn has(&self, ifindex: u32) -> bool {
        self.devices.contains_key(&ifindex)
    }

    /// A device that AF_XDP serves.
    pub(super) fn get(&self, ifindex: u32) -> Option<&Carrier> {
        match self.devices.get(&ifindex) {
            Some(Device::Open(carrier)) => Some(carrier),
            _ => None,
        }
    }

    fn open(&self) -> impl Iterator<Item = (u32, &Carrier)> {
        self.devices.iter().filter_map(|(ifindex, device)| match device {
            Device::Open(carrier) => Some((*ifindex, carrier)),
            _ => None,
        })
    }

    /// The devices that AF_XDP serves, with the numbers of the programs that were attached.
    pub(super) fn programs(&self) -> Vec<(u32, u32)> {
        self.open().filter_map(|(ifindex, carrier)| Some((ifindex, carrier.program?))).collect()
    }

    /// Adds a tunnel to the users of a device, if AF_XDP serves that. If the device is being opened or closed, doors are chosen anew
    /// after that.
    pub(super) fn join(&mut self, ifindex: u32, number: u16) -> Served {
        match self.devices.get_mut(&ifindex) {
            Some(Device::Open(carrier)) => {
                carrier.tunnels.insert(number);
                Served::Open
            }
            Some(Device::Opening { gone, .. }) => {
                *gone = false;
                Served::Changing
            }
            Some(Device::Closing { choose, .. }) => {
                *choose = true;
                Served::Changing
            }
            None => Served::No,
        }
    }

    /// Starts to open a device for a tunnel; `by_sight`: because single frames were seen on it.
    ///
    /// # Errors
    /// There is no slot for it.
    pub(super) fn begin(
        &mut self,
        card: Card,
        mode: XdpMode,
        by_sight: bool,
        asker: u16,
        jobs: &mut Jobs<impl From<Ended> + Send + 'static>,
    ) -> anyhow::Result<()> {
        let ifindex = card.ifindex;
        let is_used = |slot: usize| self.devices.values().any(|device| device.slot() == slot);
        let slot = (0..MAX_CARRIERS as usize).find(|slot| !is_used(*slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_CARRIERS} carrier slots are in use"))?;
        let given_up = self.trials.get(&ifindex).is_some_and(Trial::is_given_up);
        let (handover, unlikely) = (self.handover.clone(), is_unlikely(&card));
        self.devices.insert(ifindex, Device::Opening { slot, gone: false });
        jobs.start(async move {
            let mut carrier = handover.open(card, slot, mode, given_up).await;
            if let Ok(carrier) = &mut carrier
                && by_sight
            {
                carrier.note.push_str(", until it is calm");
            }
            Ended::Opened { ifindex, asker, unlikely, carrier }
        });
        Ok(())
    }

    /// Stores a device that was opened, or forgets one that was refused. A device that has gone meanwhile is closed again.
    pub(super) fn opened(
        &mut self,
        ifindex: u32,
        carrier: Option<Carrier>,
        jobs: &mut Jobs<impl From<Ended> + Send + 'static>,
    ) {
        let is_gone = matches!(self.devices.remove(&ifindex), Some(Device::Opening { gone: true, .. }));
        let Some(carrier) = carrier else { return };
        if carrier.some_zero_copy {
            self.trials.entry(ifindex).or_default();
        }
        self.devices.insert(ifindex, Device::Open(carrier));
        if is_gone {
            self.close(ifindex, jobs);
        }
    }

    /// Closes a device that no tunnel uses: all that asked for it have gone meanwhile.
    pub(super) fn close_unused(&mut self, ifindex: u32, jobs: &mut Jobs<impl From<Ended> + Send + 'static>) {
        if self.get(ifindex).is_some_and(|carrier| carrier.tunnels.is_empty()) {
            self.close(ifindex, jobs);
        }
    }

    /// Takes a tunnel off a device, and closes that after its last.
    pub(super) fn release(&mut self, ifindex: u32, number: u16, jobs: &mut Jobs<impl From<Ended> + Send + 'static>) {
        if let Some(Device::Open(carrier)) = self.devices.get_mut(&ifindex) {
            carrier.tunnels.remove(&number);
            self.close_unused(ifindex, jobs);
        }
    }

    /// Closes a device and forgets what was seen on it; returns the tunnels that used it, which send by their UDP sockets.
    pub(super) fn close(&mut self, ifindex: u32, jobs: &mut Jobs<impl From<Ended> + Send + 'static>) -> BTreeSet<u16> {
        self.habits.remove(&ifindex);
        self.shut(ifindex, false, jobs)
    }

    /// Closes a device; its sockets are read out before any other socket. `choose`: doors are chosen anew after that.
    /// Returns the tunnels that used it.
    pub(super) fn shut(
        &mut self,
        ifindex: u32,
        choose: bool,
        jobs: &mut Jobs<impl From<Ended> + Send + 'static>,
    ) -> BTreeSet<u16> {
        let (slot, tunnels) = match self.devices.get_mut(&ifindex) {
            Some(Device::Open(carrier)) => (carrier.slot, std::mem::take(&mut carrier.tunnels)),
            Some(Device::Opening { gone, .. }) => {
                *gone = true;
                return BTreeSet::new();
            }
            Some(Device::Closing { .. }) | None => return BTreeSet::new(),
        };
        self.devices.insert(ifindex, Device::Closing { slot, choose });
        let (handover, is_used) = (self.handover.clone(), !tunnels.is_empty());
        jobs.start(async move {
            handover.close(ifindex, slot, is_used).await;
            Ended::Closed { ifindex }
        });
        tunnels
    }

    /// Forgets a device that is closed; returns whether doors are to be chosen anew.
    pub(super) fn closed(&mut self, ifindex: u32) -> bool {
        matches!(self.devices.remove(&ifindex), Some(Device::Closing { choose: true, .. }))
    }

    /// Whether a device that might deliver superframes was seen not to.
    pub(super) fn has_single_frames(&self, ifindex: u32) -> bool {
        self.habits.get(&ifindex).is_some_and(Habit::has_single_frames)
    }

    /// Notes that a device delivers single frames; returns whether that is new.
    pub(super) fn see_single_frames(&mut self, ifindex: u32) -> bool {
        self.habits.entry(ifindex).or_default().see_single_frames(Instant::now())
    }

    /// Whether a device can be sent live frames.
    pub(super) fn may_send_live(&self, card: &Card) -> bool {
        self.handover.may_send_live(card)
    }

    /// Polls which devices take live frames; returns those where that has changed.
    pub(super) fn poll_live_frames(&mut self) -> Vec<u32> {
        let mut changed = Vec::new();
        for (ifindex, device) in &mut self.devices {
            let Device::Open(carrier) = device else { continue };
            if !carrier.can_live {
                continue;
            }
            let takes_live = netdev::takes_xdp_frames(*ifindex);
            if std::mem::replace(&mut carrier.takes_live, takes_live) != takes_live {
                changed.push(*ifindex);
            }
        }
        changed
    }

    /// Devices that might deliver superframes and are calm.
    pub(super) fn calm(&mut self, now: Instant) -> Vec<u32> {
        let mut calm = Vec::new();
        for (ifindex, device) in &self.devices {
            let Device::Open(carrier) = device else { continue };
            if carrier.superframes && self.habits.entry(*ifindex).or_default().is_calm(carrier.traffic.authentic(), now)
            {
                calm.push(*ifindex);
            }
        }
        calm
    }

    /// A calm device goes back to the UDP sockets; returns for how many seconds it was calm.
    pub(super) fn leave_calm(&mut self, ifindex: u32, now: Instant) -> u64 {
        self.habits.entry(ifindex).or_default().leave(now).as_secs()
    }

    /// Polls the trials of zero copy; returns the devices where it is to be given up, or tried again.
    pub(super) fn poll_zero_copy(&mut self, now: Instant) -> Vec<(u32, TrialChange)> {
        let mut changed = Vec::new();
        for (ifindex, device) in &self.devices {
            let Device::Open(carrier) = device else { continue };
            let Some(trial) = self.trials.get_mut(ifindex) else { continue };
            let (opened, received) = (carrier.opened, carrier.traffic.received());
            if let Some(change) = trial.judge(carrier.some_zero_copy, opened, received, now) {
                changed.push((*ifindex, change));
            }
        }
        changed
    }
}

impl Device {
    fn slot(&self) -> usize {
        match self {
            Self::Opening { slot, .. } | Self::Closing { slot, .. } => *slot,
            Self::Open(carrier) => carrier.slot,
        }
    }
}

/// Whether AF_XDP is likely to be refused on a device: it is no Ethernet device, or it is only tried whether it has native XDP, which
/// a VLAN has not.
pub(super) fn is_unlikely(card: &Card) -> bool {
    card.kind != CardKind::Ethernet || card.superframes
}
