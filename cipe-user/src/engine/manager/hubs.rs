//! Hubs in use, opened with their first tunnel, removed after their last; and the devices on them.

use anyhow::{Context as _, bail, ensure};
use cipe_common::maps::{MAX_HUBS, PRIVATE_QUEUES, private_socket_index};

use super::Manager;
use super::attach::log_failure;
use super::workers::{hub_queues, share_of};
use crate::control::protocol::XdpMode;
use crate::engine::carrier::outer::Hop;
use crate::engine::worker::Command;
use crate::kernel::bpf::{Ends, XdpPreference};
use crate::kernel::device::{Device, TunnelDevice};
use crate::kernel::features::Feature;
use crate::kernel::hub::{Framing, Hub};
use crate::xsk::{Injector, Mode, SocketConfig};

/// Tunnels on one hub. The kernel finds the device of a frame in a table of 256 lists, so that more would cost each frame
/// time; and one hub is enough for most engines.
const TUNNELS: usize = 1024;

/// The hubs, by slot: the number that stamps, maps and the workers know them by.
#[derive(Default)]
pub struct Hubs {
    slots: Vec<Option<Place>>,
}

struct Place {
    hub: Hub,
    tunnels: usize,
    /// Mode got, for people; `None`: taken over from an engine that died, and not open yet.
    note: Option<String>,
    /// Somebody took it away: nothing new goes there.
    lost: bool,
    /// Index of the visible end in another network namespace, if it was moved there; another device may have the one before.
    moved: Option<u32>,
}

impl Place {
    fn new(hub: Hub) -> Self {
        Self { hub, tunnels: 0, note: None, lost: false, moved: None }
    }
}

impl Hubs {
    /// Those that a dead engine left, with devices on them.
    pub fn inherited(hubs: Vec<Hub>) -> Self {
        let place = |hub| Some(Place::new(hub));
        Self { slots: hubs.into_iter().map(place).collect() }
    }

    /// All hubs with their slots.
    pub fn all(&self) -> impl Iterator<Item = (usize, &Hub)> {
        self.slots.iter().enumerate().filter_map(|(slot, place)| Some((slot, &place.as_ref()?.hub)))
    }

    /// The hub in a slot.
    pub fn get(&self, slot: usize) -> Option<&Hub> {
        self.slots.get(slot)?.as_ref().map(|place| &place.hub)
    }

    /// Mode got on a hub.
    pub fn note(&self, slot: usize) -> Option<&str> {
        self.slots.get(slot)?.as_ref()?.note.as_deref()
    }

    /// The slot of the hub that one of its ends belongs to.
    pub fn of_device(&self, ifindex: u32) -> Option<usize> {
        let is_end =
            |place: &Place| place.hub.hidden_index == ifindex || (place.hub.index == ifindex && place.moved.is_none());
        self.slots.iter().position(|place| place.as_ref().is_some_and(is_end))
    }

    /// The visible end of an Ethernet tunnel's pair has this index in another network namespace from now on.
    pub fn set_moved(&mut self, slot: usize, index: u32) {
        if let Some(place) = self.slots.get_mut(slot).and_then(Option::as_mut) {
            place.moved = Some(index);
        }
    }

    /// The indexes by which the programs know an Ethernet tunnel's pair. One that the programs know another such pair by is that
    /// one's: the visible end passes for it, and the hidden end says whose a frame is.
    pub fn ends(&self, slot: usize) -> Option<[u32; 2]> {
        let place = self.slots.get(slot)?.as_ref()?;
        let hidden = place.hub.hidden_index;
        let Some(index) = place.moved else { return Some([place.hub.index, hidden]) };
        let has_it = |(other, place): (usize, &Place)| {
            let visible = match place.moved {
                None => place.hub.index == index,
                // Of two that were moved the first one has it.
                Some(moved) => moved == index && other < slot,
            };
            other != slot && place.hub.framing == Framing::Ethernet && (visible || place.hub.hidden_index == index)
        };
        let places = self.slots.iter().enumerate().filter_map(|(other, place)| Some((other, place.as_ref()?)));
        Some(if places.into_iter().any(has_it) { [hidden; 2] } else { [index, hidden] })
    }

    /// Whether the pair in this slot is an Ethernet tunnel's own.
    pub fn is_ethernet(&self, slot: usize) -> bool {
        self.get(slot).is_some_and(|hub| hub.framing == Framing::Ethernet)
    }

    fn with_room(&self, framing: Framing) -> Option<usize> {
        let room = |place: &Place| place.hub.framing == framing && !place.lost && place.tunnels < TUNNELS;
        self.slots.iter().position(|place| place.as_ref().is_some_and(room))
    }

    fn put(&mut self, hub: Hub) -> anyhow::Result<usize> {
        let free = self.slots.iter().position(Option::is_none).unwrap_or(self.slots.len());
        anyhow::ensure!(free < MAX_HUBS as usize, "all {MAX_HUBS} hubs of the engine are in use");
        if free == self.slots.len() {
            self.slots.push(None);
        }
        self.slots[free] = Some(Place::new(hub));
        Ok(free)
    }
}

impl Manager {
    /// Finds a hub for one more tunnel, or makes it.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub(super) async fn hub_for(&mut self, framing: Framing) -> anyhow::Result<usize> {
        if let Some(slot) = self.hubs.with_room(framing) {
            return Ok(slot);
        }
        let hub = self.netlink.make_hub(framing, hub_queues(self.workers.count())).await?;
        match self.hubs.put(hub.clone()) {
            Ok(slot) => Ok(slot),
            Err(error) => {
                self.netlink.remove_hub(&hub).await?;
                Err(error)
            }
        }
    }

    /// Puts a tunnel on a hub, which is opened if it is not open yet. [`Self::leave_hub`] takes it back, after an error
    /// too.
    ///
    /// # Errors
    /// XDP or AF_XDP is refused on it.
    pub(super) async fn enter_hub(&mut self, slot: usize, mode: XdpMode) -> anyhow::Result<()> {
        let place = self.hubs.slots.get_mut(slot).and_then(Option::as_mut).context("the hub has gone")?;
        place.tunnels += 1;
        if place.note.is_none() {
            let hub = place.hub.clone();
            let note = self.open_hub(slot, &hub, mode).await?;
            tracing::info!("{}: {note}", hub.name);
            if let Some(place) = &mut self.hubs.slots[slot] {
                place.note = Some(note);
            }
        }
        Ok(())
    }

    async fn open_hub(&mut self, slot: usize, hub: &Hub, mode: XdpMode) -> anyhow::Result<String> {
        let (ends, preference) = match (hub.framing, mode) {
            (Framing::Superframes, _) => (Ends::Hub, XdpPreference::Generic),
            (Framing::SingleFrames, _) => (Ends::Hub, XdpPreference::Native),
            (Framing::Ethernet, XdpMode::Native) => (Ends::Ethernet, XdpPreference::Native),
            (Framing::Ethernet, XdpMode::Auto | XdpMode::Generic) => (Ends::Ethernet, XdpPreference::Generic),
        };
        let mode = self.programs.attach_private(ends, hub.index, hub.hidden_index, preference)?;
        let mut sockets = Vec::new();
        // One that another engine made may have more or fewer queues than there are workers now.
        let queues = self.netlink.card(hub.hidden_index).await?.receive_queues.clamp(1, PRIVATE_QUEUES);
        let queues = if preference == XdpPreference::Generic && queues > 1 { queues - 1 } else { queues };
        for queue in 0..queues {
            // No veth has zero copy: asking for it costs a bind that fails.
            let config = SocketConfig { mode: Mode::Copy, ..SocketConfig::default() };
            let socket = self.bind_queue(hub.hidden_index, queue, config).await?;
            self.programs.set_private_socket(private_socket_index(slot as u32, queue), &socket)?;
            sockets.push(socket);
        }
        let count = self.workers.count();
        let injectors = (0..count).map(|_| Injector::open(hub.hidden_index)).collect::<Result<Vec<_>, _>>()?;
        let note = format!("private side: {mode} XDP, {count} worker(s)");
        let mut shares = share_of(sockets, count).into_iter().zip(injectors);
        // No tunnel is alive before the workers have put frames where packets go.
        let listen = self.workers.ask_all(|_, done| {
            let (sockets, injector) = shares.next().expect("there is a share for each worker");
            Command::AddHub(slot, sockets, injector, ends, done)
        });
        ensure!(listen.in_time().await, "the workers do not take the hub");
        Ok(note)
    }

    /// Takes a tunnel off a hub, whose device is gone; removes the hub after the last. One that still carries devices,
    /// of daemons that have not come to this engine yet, stays.
    pub(super) async fn leave_hub(&mut self, slot: usize) {
        let Some(place) = self.hubs.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        place.tunnels = place.tunnels.saturating_sub(1);
        if place.tunnels > 0 {
            return;
        }
        let hub = place.hub.clone();
        if self.netlink.is_in_use(&hub).await.unwrap_or(true) {
            return;
        }
        self.hubs.slots[slot] = None;
        self.workers.ask_all(|_, done| Command::RemoveHub(slot, done)).in_time().await;
        match self.netlink.remove_hub(&hub).await {
            Ok(()) => self.programs.detach_private(hub.index),
            Err(error) => tracing::warn!("while removing a hub: {error}"),
        }
    }

    /// A hub was taken down or deleted; returns the tunnels on it.
    pub(super) fn lose_hub(&mut self, slot: usize, deleted: bool) -> Vec<u16> {
        if let Some(place) = self.hubs.slots.get_mut(slot).and_then(Option::as_mut) {
            place.lost |= deleted;
            tracing::warn!("{}: somebody took it down; its tunnels end", place.hub.name);
        }
        self.tenants.iter().filter(|(_, tenant)| tenant.hub == slot).map(|(number, _)| *number).collect()
    }

    /// Takes over the device that a dead engine left under the wanted name, or makes one; returns it with the slot of its
    /// hub, which it has entered.
    pub(super) async fn device(&mut self, wanted: TunnelDevice, mode: XdpMode) -> anyhow::Result<(usize, Device)> {
        if wanted.ethernet {
            return self.ethernet_device(wanted, mode).await;
        }
        let framing = self.framing(mode);
        if let Some(name) = &wanted.name {
            let (slots, hubs): (Vec<usize>, Vec<&Hub>) = self.hubs.all().unzip();
            if let Some((place, device)) = self.netlink.adopt(name, &wanted, &hubs).await? {
                let (slot, fits) = (slots[place], hubs[place].framing == framing);
                if fits {
                    return match self.enter_hub(slot, mode).await {
                        Ok(()) => Ok((slot, device)),
                        Err(error) => {
                            self.discard(slot, Some(&device)).await;
                            Err(error)
                        }
                    };
                }
                // The daemon wants another XDP mode than before.
                self.netlink.remove(&device).await?;
            }
        }
        let slot = self.hub_for(framing).await?;
        let entered = self.enter_hub(slot, mode).await;
        let hub = self.hubs.get(slot).cloned();
        let made = match (entered, hub) {
            (Ok(()), Some(hub)) => self.netlink.make(&hub, &wanted).await.map_err(Into::into),
            (entered, _) => entered.and_then(|()| bail!("the hub has gone")),
        };
        match made {
            Ok(device) => Ok((slot, device)),
            Err(error) => {
                self.discard(slot, None).await;
                Err(error)
            }
        }
    }

    /// The same for an Ethernet tunnel, whose device is an end of a pair of its own.
    async fn ethernet_device(&mut self, wanted: TunnelDevice, mode: XdpMode) -> anyhow::Result<(usize, Device)> {
        let mut adopted = None;
        if let Some(name) = &wanted.name {
            let (slots, pairs): (Vec<usize>, Vec<&Hub>) = self.hubs.all().unzip();
            adopted = self.netlink.adopt_ethernet(name, &wanted, &pairs).await?.map(|(at, device)| (slots[at], device));
        }
        let (slot, device) = match adopted {
            Some(found) => found,
            None => {
                let (pair, device) = self.netlink.make_ethernet(&wanted, hub_queues(self.workers.count())).await?;
                match self.hubs.put(pair.clone()) {
                    Ok(slot) => (slot, device),
                    Err(error) => {
                        log_failure(self.netlink.remove_hub(&pair).await);
                        return Err(error);
                    }
                }
            }
        };
        match self.enter_hub(slot, mode).await {
            Ok(()) => Ok((slot, device)),
            Err(error) => {
                self.discard(slot, Some(&device)).await;
                Err(error)
            }
        }
    }

    /// Removes a device that did not become a tunnel's, and leaves its hub.
    async fn discard(&mut self, hub: usize, device: Option<&Device>) {
        if let Some(device) = device {
            log_failure(self.netlink.remove(device).await);
        }
        self.leave_hub(hub).await;
    }

    /// The address of a new device: locally administered, and unlike those that engines before this one gave.
    pub(super) fn private_mac(&self, number: u16) -> [u8; 6] {
        let ([a, b, c], [high, low]) = (self.salt, number.to_be_bytes());
        [0x1E, a, b, c, high, low]
    }

    /// What the engine takes from a tunnel's device. Native XDP takes no superframes; generic XDP does, and the engine cuts them
    /// at less cost than the kernel, unless AF_XDP takes no frame larger than a descriptor.
    pub(super) fn framing(&self, mode: XdpMode) -> Framing {
        match mode {
            _ if self.lacks.contains(&Feature::MultiBuffer) => Framing::SingleFrames,
            XdpMode::Native => Framing::SingleFrames,
            XdpMode::Auto | XdpMode::Generic => Framing::Superframes,
        }
    }

    /// Takes up that a tunnel's device has another address.
    pub(super) fn set_private_address(&mut self, number: u16, mac: [u8; 6]) {
        let Some(tenant) = self.tenants.get_mut(&number).filter(|tenant| tenant.device.mac != mac) else { return };
        let Some(hub) = self.hubs.get(tenant.hub) else { return };
        let old = std::mem::replace(&mut tenant.device.mac, mac);
        if self.hubs.is_ethernet(tenant.hub) {
            return;
        }
        log_failure(self.programs.remove_private_address(old));
        log_failure(self.programs.set_private_address(mac, number.into()));
        log_failure(self.programs.set_tunnel(number.into(), tenant.entry()));
        let hop = Hop { source: hub.hidden_mac, destination: mac };
        self.workers.tell_all(|_| Command::SetPrivateHop(number, hop));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moved_pair_has_its_new_index_unless_another_ethernet_pair_has_it() {
        let hub =
            |framing, index| Hub { name: String::new(), index, hidden_index: index + 100, hidden_mac: [2; 6], framing };
        let ethernet = |index| hub(Framing::Ethernet, index);
        let mut hubs = Hubs::inherited(vec![hub(Framing::Superframes, 5), ethernet(6), ethernet(7), ethernet(8)]);
        assert_eq!([1, 2].map(|slot| hubs.ends(slot)), [Some([6, 106]), Some([7, 107])]);
        for (index, ends) in [(9, [9, 107]), (5, [5, 107]), (6, [107; 2]), (106, [107; 2]), (105, [105, 107])] {
            hubs.set_moved(2, index);
            assert_eq!(hubs.ends(2), Some(ends), "moved to {index}");
        }
        // Of two in other namespaces with one index, the first has it; the one that was here is free again.
        hubs.set_moved(2, 9);
        hubs.set_moved(3, 9);
        assert_eq!([2, 3].map(|slot| hubs.ends(slot)), [Some([9, 107]), Some([108; 2])]);
        hubs.set_moved(2, 8);
        assert_eq!([2, 3].map(|slot| hubs.ends(slot)), [Some([8, 107]), Some([9, 108])]);
    }
}
