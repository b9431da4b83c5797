//! The hubs and the tunnel devices on them: a hub is made and opened for its first tunnel, and removed after its last.

mod handover;
mod open;
mod slots;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::jobs::Jobs;
use super::platform::{Platform, log_failure};
use super::poll::PollTimer;
use super::workers::hub_queues;
use crate::control::protocol::Event;
use crate::kernel::bpf::{Error, XdpMode};
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::hub::Hub;
pub(super) use handover::Handover;
pub(super) use open::{Opened, QUEUE};
use slots::Slots;

/// The hubs of an engine.
pub(super) struct Hubs {
    platform: Arc<Platform>,
    slots: Slots,
    /// What the engine before this one has handed over, until its hubs are open.
    handover: Handover,
    /// A part of the devices' MAC addresses that no engine before this one had.
    salt: [u8; 3],
    /// When to look whether the programs are attached.
    poll: PollTimer,
}

/// Interval between two such looks: nothing notifies of a program that was detached.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

impl Deref for Hubs {
    type Target = Slots;

    fn deref(&self) -> &Slots {
        &self.slots
    }
}

impl DerefMut for Hubs {
    fn deref_mut(&mut self) -> &mut Slots {
        &mut self.slots
    }
}

impl Hubs {
    /// The hubs that an engine before this one left, with devices on them, and what it has handed over.
    pub(super) fn inherited(platform: Arc<Platform>, (hubs, handover): (Vec<Hub>, Handover), salt: [u8; 3]) -> Self {
        Self { platform, slots: Slots::inherited(hubs), handover, salt, poll: PollTimer::new(POLL_INTERVAL) }
    }

    /// The events that tell an engine that is to take the place of this one of the hub in this slot, if it is open.
    pub(super) fn tell_of(&self, slot: usize) -> Vec<Event> {
        self.open_hub(slot).map_or_else(Vec::new, |(hub, open)| handover::events_of(&self.platform, hub, open))
    }

    /// The events that tell it of all hubs.
    pub(super) fn tell_of_all(&self) -> Vec<Event> {
        let slots: Vec<usize> = self.all().map(|(slot, _)| slot).collect();
        slots.into_iter().flat_map(|slot| self.tell_of(slot)).chain([Event::HubsTold]).collect()
    }

    /// Attaches programs again that somebody has detached from a hub.
    pub(super) async fn poll(&mut self, now: Instant) {
        if !self.poll.is_due(now) {
            return;
        }
        let pairs: Vec<_> = self.open_here().map(|hub| (hub.index, hub.hidden_index)).collect();
        for (visible, hidden) in pairs {
            // The end of a device is an event of its own.
            let Ok((present, _)) = self.platform.netlink.attached(hidden).await else { continue };
            let mended = self.platform.programs().mend_private(visible, present);
            match mended {
                Ok(false) => {}
                Ok(true) => tracing::error!("hub {visible}: somebody has detached its eBPF programs; attached again"),
                // Somebody has moved the visible end to another network namespace.
                Err(Error::NoDevice { .. }) => {}
                Err(error) => tracing::error!("hub {visible}: its eBPF programs are detached: {error}"),
            }
        }
    }

    /// Finds or makes the hub for a new tunnel's device, and adds the tunnel to it; [`Slots::leave`] takes that back. Returns the
    /// hub's slot, and the device if it is there already: an engine that died left it under the wanted name, or it is an end of the
    /// tunnel's own pair.
    ///
    /// # Errors
    /// The kernel refuses it; nothing of it stays.
    pub(super) async fn enter(
        &mut self,
        wanted: &TunnelDevice,
        mode: XdpMode,
    ) -> anyhow::Result<(usize, Option<Device>)> {
        let (slot, device) = match wanted.ethernet {
            true => self.find_ethernet_device(wanted).await?,
            false => self.find_device(wanted, mode).await?,
        };
        self.slots.enter(slot)?;
        Ok((slot, device))
    }

    /// Starts to open the hub in this slot, unless it is open; returns whether the job was started.
    pub(super) fn begin_to_open(
        &mut self,
        slot: usize,
        mode: XdpMode,
        jobs: &mut Jobs<impl From<Opened> + Send + 'static>,
    ) -> bool {
        let Some(hub) = self.get(slot).filter(|_| self.note(slot).is_none()) else { return false };
        let (platform, hub) = (self.platform.clone(), hub.clone());
        let former = self.handover.former(&hub);
        jobs.start(async move { Opened { slot, hub: open::open(platform, (slot, hub), former, mode).await } });
        true
    }

    /// Makes a tunnel's device on the hub in this slot.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(super) async fn make_device(&self, slot: usize, wanted: &TunnelDevice) -> anyhow::Result<Device> {
        let hub = self.get(slot).context("the hub has gone")?;
        Ok(self.platform.netlink.make(hub, wanted).await?)
    }

    /// Whether the hub in this slot is of the kind that a tunnel with this XDP mode needs.
    pub(super) fn suits(&self, slot: usize, mode: XdpMode) -> bool {
        self.get(slot).is_some_and(|hub| hub.framing == open::framing(&self.platform, mode))
    }

    /// The slot of a hub for the wanted device, and the device if it is there already.
    async fn find_device(&mut self, wanted: &TunnelDevice, mode: XdpMode) -> anyhow::Result<(usize, Option<Device>)> {
        let netlink = &self.platform.netlink;
        let framing = open::framing(&self.platform, mode);
        if let Some(name) = &wanted.name {
            let (slots, hubs): (Vec<usize>, Vec<&Hub>) = self.all().unzip();
            if let Some((nth, device)) = netlink.adopt(name, wanted, &hubs).await? {
                if hubs[nth].framing == framing {
                    return Ok((slots[nth], Some(device)));
                }
                // The daemon wants another XDP mode than before.
                netlink.remove(&device).await?;
            }
        }
        if let Some(slot) = self.with_room(framing) {
            return Ok((slot, None));
        }
        let hub = netlink.make_hub(framing, hub_queues(self.platform.workers.count())).await?;
        Ok((self.put_or_remove(hub).await?, None))
    }

    /// The same for an Ethernet tunnel, whose device is an end of a pair of its own.
    async fn find_ethernet_device(&mut self, wanted: &TunnelDevice) -> anyhow::Result<(usize, Option<Device>)> {
        let netlink = &self.platform.netlink;
        if let Some(name) = &wanted.name {
            let (slots, pairs): (Vec<usize>, Vec<&Hub>) = self.all().unzip();
            if let Some((nth, device)) = netlink.adopt_ethernet(name, wanted, &pairs).await? {
                return Ok((slots[nth], Some(device)));
            }
        }
        let (pair, device) = netlink.make_ethernet(wanted, hub_queues(self.platform.workers.count())).await?;
        Ok((self.put_or_remove(pair).await?, Some(device)))
    }

    async fn put_or_remove(&mut self, hub: Hub) -> anyhow::Result<usize> {
        match self.put(hub.clone()) {
            Ok(slot) => Ok(slot),
            Err(error) => {
                log_failure(self.platform.netlink.remove_hub(&hub).await);
                Err(error)
            }
        }
    }

    /// The MAC address of a new device: locally administered, and different from those that engines before this one gave.
    pub(super) fn private_mac(&self, number: u16) -> [u8; 6] {
        let ([a, b, c], [high, low]) = (self.salt, number.to_be_bytes());
        [0x1E, a, b, c, high, low]
    }
}
