//! Hubs in use, opened with their first tunnel, removed after their last; and the devices on them.

mod slots;

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use anyhow::Context as _;
use cipe_common::maps::{PRIVATE_QUEUES, private_socket_index};

use super::departure::Begun;
use super::platform::Platform;
use super::workers::{hub_queues, share_of};
use crate::engine::worker::Command;
use crate::kernel::bpf::{Ends, XdpMode};
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::ethtool::{self, Offloads};
use crate::kernel::features::Feature;
use crate::kernel::hub::{Framing, Hub};
use crate::xsk::{Injector, Mode, SocketConfig};
use slots::Slots;

/// The hubs of an engine.
pub(super) struct Hubs {
    platform: Arc<Platform>,
    slots: Slots,
    /// Part of the devices' addresses that no engine before had.
    salt: [u8; 3],
}

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

/// Why a tunnel cannot be, and what was begun for it.
pub(super) struct Refused {
    pub error: anyhow::Error,
    pub begun: Option<Begun>,
}

impl<E: Into<anyhow::Error>> From<E> for Refused {
    fn from(error: E) -> Self {
        Self { error: error.into(), begun: None }
    }
}

impl Hubs {
    /// Those that a dead engine left, with devices on them.
    pub(super) fn inherited(platform: Arc<Platform>, hubs: Vec<Hub>, salt: [u8; 3]) -> Self {
        Self { platform, slots: Slots::inherited(hubs), salt }
    }

    /// Takes over the device that a dead engine left under the wanted name, or makes one; returns it with the slot of its
    /// hub, which it has entered.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(super) async fn device(&mut self, wanted: TunnelDevice, mode: XdpMode) -> Result<(usize, Device), Refused> {
        let (slot, device) = match wanted.ethernet {
            true => self.find_ethernet_device(&wanted).await?,
            false => self.find_device(&wanted, mode).await?,
        };
        if let Err(error) = self.enter(slot, mode).await {
            return Err(Refused { error, begun: Some(Begun::Device(slot, device)) });
        }
        match (device, self.get(slot)) {
            (Some(device), _) => Ok((slot, device)),
            (None, Some(hub)) => match self.platform.netlink.make(hub, &wanted).await {
                Ok(device) => Ok((slot, device)),
                Err(error) => Err(Refused { error: error.into(), begun: Some(Begun::Device(slot, None)) }),
            },
            (None, None) => Err(anyhow::anyhow!("the hub has gone").into()),
        }
    }

    /// The slot of a hub for the wanted device, and the device if it is there already.
    async fn find_device(&mut self, wanted: &TunnelDevice, mode: XdpMode) -> anyhow::Result<(usize, Option<Device>)> {
        let netlink = &self.platform.netlink;
        let framing = self.framing(mode);
        if let Some(name) = &wanted.name {
            let (slots, hubs): (Vec<usize>, Vec<&Hub>) = self.all().unzip();
            if let Some((place, device)) = netlink.adopt(name, wanted, &hubs).await? {
                if hubs[place].framing == framing {
                    return Ok((slots[place], Some(device)));
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
            if let Some((place, device)) = netlink.adopt_ethernet(name, wanted, &pairs).await? {
                return Ok((slots[place], Some(device)));
            }
        }
        let (pair, device) = netlink.make_ethernet(wanted, hub_queues(self.platform.workers.count())).await?;
        Ok((self.put_or_remove(pair).await?, Some(device)))
    }

    async fn put_or_remove(&mut self, hub: Hub) -> anyhow::Result<usize> {
        match self.put(hub.clone()) {
            Ok(slot) => Ok(slot),
            Err(error) => {
                self.platform.netlink.remove_hub(&hub).await?;
                Err(error)
            }
        }
    }

    /// Puts a tunnel on a hub, which is opened if it is not open yet. [`Self::leave`] takes it back, after an error too.
    async fn enter(&mut self, slot: usize, mode: XdpMode) -> anyhow::Result<()> {
        let place = self.slots.place_mut(slot).context("the hub has gone")?;
        place.tunnels += 1;
        if place.note.is_none() {
            let hub = place.hub.clone();
            let note = self.open(slot, &hub, mode).await?;
            tracing::info!("{}: {note}", hub.name);
            if let Some(place) = self.slots.place_mut(slot) {
                place.note = Some(note);
            }
        }
        Ok(())
    }

    async fn open(&self, slot: usize, hub: &Hub, mode: XdpMode) -> anyhow::Result<String> {
        let platform = &self.platform;
        let (ends, preference) = match (hub.framing, mode) {
            (Framing::Superframes, _) => (Ends::Hub, XdpMode::Generic),
            (Framing::SingleFrames, _) => (Ends::Hub, XdpMode::Native),
            (Framing::Ethernet, XdpMode::Native) => (Ends::Ethernet, XdpMode::Native),
            (Framing::Ethernet, XdpMode::Auto | XdpMode::Generic) => (Ends::Ethernet, XdpMode::Generic),
        };
        // The program stamps what the engine is to segment, so it is attached first.
        let takes_superframes = self.framing(mode) == Framing::Superframes;
        let mode = platform.programs().attach_private(ends, hub.index, hub.hidden_index, preference)?;
        if ends == Ends::Ethernet && takes_superframes {
            ethtool::set_offloads(&hub.name, hub.index, Offloads::SUPERFRAMES)?;
        }
        let mut sockets = Vec::new();
        // One that another engine made may have more or fewer queues than there are workers now.
        let queues = platform.netlink.card(hub.hidden_index).await?.receive_queues.clamp(1, PRIVATE_QUEUES);
        let queues = if preference == XdpMode::Generic && queues > 1 { queues - 1 } else { queues };
        for queue in 0..queues {
            // No veth has zero copy: asking for it costs a bind that fails.
            let config = SocketConfig { mode: Mode::Copy, ..SocketConfig::default() };
            let socket = platform.bind_queue(hub.hidden_index, queue, config).await?;
            platform.programs().set_private_socket(private_socket_index(slot as u32, queue), &socket)?;
            sockets.push(socket);
        }
        let count = platform.workers.count();
        let injectors = (0..count).map(|_| Injector::open(hub.hidden_index)).collect::<Result<Vec<_>, _>>()?;
        let note = format!("private side: {mode} XDP, {count} worker(s)");
        // A worker takes it before the tunnel that enters it, and no tunnel is alive before the workers have taken that.
        let mut shares = share_of(sockets, count).into_iter().zip(injectors);
        platform.workers.tell_all(|_| {
            let (sockets, injector) = shares.next().expect("there is a share for each worker");
            Command::AddHub(slot, sockets, injector, ends)
        });
        Ok(note)
    }

    /// Takes a tunnel off a hub, which is returned if it was the last one: it is to be removed, or to be kept.
    pub(super) fn leave(&mut self, slot: usize) -> Option<Hub> {
        let place = self.slots.place_mut(slot)?;
        place.tunnels = place.tunnels.saturating_sub(1);
        place.going = place.tunnels == 0;
        place.going.then(|| place.hub.clone())
    }

    /// A hub that has no tunnel of this engine stays for the devices of daemons that have not come yet.
    pub(super) fn keep(&mut self, slot: usize) {
        if let Some(place) = self.slots.place_mut(slot) {
            place.going = false;
        }
    }

    /// A hub was taken down or deleted; its tunnels end. That is no news of one that goes, or whose tunnels all go already.
    pub(super) fn lose(&mut self, slot: usize, deleted: bool, has_tunnels: bool) {
        if let Some(place) = self.slots.place_mut(slot) {
            place.lost |= deleted;
            let is_going = place.going || (place.tunnels > 0 && !has_tunnels);
            if !is_going {
                tracing::warn!("{}: somebody took it down; its tunnels end", place.hub.name);
            }
        }
    }

    /// The address of a new device: locally administered, and unlike those that engines before this one gave.
    pub(super) fn private_mac(&self, number: u16) -> [u8; 6] {
        let ([a, b, c], [high, low]) = (self.salt, number.to_be_bytes());
        [0x1E, a, b, c, high, low]
    }

    /// What the engine takes from a tunnel's device. Native XDP takes no superframes; generic XDP does, and the engine cuts them
    /// at less cost than the kernel, unless AF_XDP takes no frame larger than a descriptor.
    fn framing(&self, mode: XdpMode) -> Framing {
        match mode {
            _ if self.platform.lacks.contains(&Feature::MultiBuffer) => Framing::SingleFrames,
            XdpMode::Native => Framing::SingleFrames,
            XdpMode::Auto | XdpMode::Generic => Framing::Superframes,
        }
    }
}
