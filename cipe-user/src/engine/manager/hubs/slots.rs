//! The table of hubs by slot, and the indexes by which the programs find an Ethernet tunnel's own pair.

use anyhow::Context as _;
use cipe_common::maps::MAX_HUBS;

use super::open::OpenHub;
use crate::kernel::hub::{Framing, Hub};

/// Most tunnels on one hub. The kernel finds the device of a frame in a hash table of 256 lists, so that more tunnels would cost
/// each frame time; and one hub is enough for most engines.
const MAX_TUNNELS_PER_HUB: usize = 1024;

/// The hubs, by slot: the number of a hub in stamps, in maps, and for the workers.
pub(crate) struct Slots(Vec<Option<HubSlot>>);

/// A hub in its slot.
struct HubSlot {
    hub: Hub,
    /// Tunnels of this engine that have entered it.
    tunnels: usize,
    /// `None`: not open yet.
    open: Option<OpenHub>,
    /// Somebody deleted it: it gets no new tunnel.
    lost: bool,
    /// Somebody took it down or deleted it since the last tunnel entered it. While it is being opened, no tunnel is there to end.
    was_down: bool,
    /// The engine removes it: its end is not logged.
    going: bool,
    /// Index of the visible end in another network namespace, if it was moved there; another device may have its former index.
    moved: Option<u32>,
}

impl HubSlot {
    fn new(hub: Hub) -> Self {
        Self { hub, tunnels: 0, open: None, lost: false, was_down: false, going: false, moved: None }
    }
}

impl Slots {
    /// The hubs that an engine that died left, with devices on them.
    pub(crate) fn inherited(hubs: Vec<Hub>) -> Self {
        let entry = |hub| Some(HubSlot::new(hub));
        Self(hubs.into_iter().map(entry).collect())
    }

    /// All hubs with their slots.
    pub(crate) fn all(&self) -> impl Iterator<Item = (usize, &Hub)> {
        self.0.iter().enumerate().filter_map(|(slot, entry)| Some((slot, &entry.as_ref()?.hub)))
    }

    /// The open hubs with both ends in this network namespace.
    pub(crate) fn open_here(&self) -> impl Iterator<Item = &Hub> {
        let entries = self.0.iter().flatten();
        entries
            .filter(|entry| entry.open.is_some() && entry.moved.is_none() && !entry.lost && !entry.going)
            .map(|entry| &entry.hub)
    }

    /// The hub in a slot.
    pub(crate) fn get(&self, slot: usize) -> Option<&Hub> {
        self.0.get(slot)?.as_ref().map(|entry| &entry.hub)
    }

    fn slot_mut(&mut self, slot: usize) -> Option<&mut HubSlot> {
        self.0.get_mut(slot)?.as_mut()
    }

    /// The modes got on a hub; `None`: it is not open.
    pub(crate) fn note(&self, slot: usize) -> Option<&str> {
        self.open_hub(slot).map(|(_, open)| open.note.as_str())
    }

    /// The hub in a slot, if it is open.
    pub(crate) fn open_hub(&self, slot: usize) -> Option<(&Hub, &OpenHub)> {
        let entry = self.0.get(slot)?.as_ref()?;
        Some((&entry.hub, entry.open.as_ref()?))
    }

    /// The slot of the hub that one of its ends belongs to.
    pub(crate) fn of_device(&self, ifindex: u32) -> Option<usize> {
        let is_end = |entry: &HubSlot| {
            entry.hub.hidden_index == ifindex || (entry.hub.index == ifindex && entry.moved.is_none())
        };
        self.0.iter().position(|entry| entry.as_ref().is_some_and(is_end))
    }

    /// The visible end of an Ethernet tunnel's pair has this index in another network namespace from now on.
    pub(crate) fn set_moved(&mut self, slot: usize, index: u32) {
        if let Some(entry) = self.slot_mut(slot) {
            entry.moved = Some(index);
        }
    }

    /// The indexes by which the programs find an Ethernet tunnel's pair. If the visible end's index is in use for another such pair,
    /// that pair keeps it, and the hidden end alone identifies this one.
    pub(crate) fn ends(&self, slot: usize) -> Option<[u32; 2]> {
        let entry = self.0.get(slot)?.as_ref()?;
        let hidden = entry.hub.hidden_index;
        let Some(index) = entry.moved else { return Some([entry.hub.index, hidden]) };
        let has_it = |(other, entry): (usize, &HubSlot)| {
            let visible = match entry.moved {
                None => entry.hub.index == index,
                // Of two that were moved the first one has it.
                Some(moved) => moved == index && other < slot,
            };
            other != slot && entry.hub.framing == Framing::Ethernet && (visible || entry.hub.hidden_index == index)
        };
        let entries = self.0.iter().enumerate().filter_map(|(other, entry)| Some((other, entry.as_ref()?)));
        Some(if entries.into_iter().any(has_it) { [hidden; 2] } else { [index, hidden] })
    }

    /// Whether the pair in this slot is an Ethernet tunnel's own.
    pub(crate) fn is_ethernet(&self, slot: usize) -> bool {
        self.get(slot).is_some_and(|hub| hub.framing == Framing::Ethernet)
    }

    /// A hub that has room for one more tunnel.
    pub(crate) fn with_room(&self, framing: Framing) -> Option<usize> {
        let room = |entry: &HubSlot| entry.hub.framing == framing && !entry.lost && entry.tunnels < MAX_TUNNELS_PER_HUB;
        self.0.iter().position(|entry| entry.as_ref().is_some_and(room))
    }

    /// Adds a new hub, and returns its slot.
    ///
    /// # Errors
    /// All slots are in use.
    pub(crate) fn put(&mut self, hub: Hub) -> anyhow::Result<usize> {
        let free = self.0.iter().position(Option::is_none).unwrap_or(self.0.len());
        anyhow::ensure!(free < MAX_HUBS as usize, "all {MAX_HUBS} hubs of the engine are in use");
        if free == self.0.len() {
            self.0.push(None);
        }
        self.0[free] = Some(HubSlot::new(hub));
        Ok(free)
    }

    /// Adds a tunnel to the hub in this slot.
    ///
    /// # Errors
    /// The hub has gone.
    pub(crate) fn enter(&mut self, slot: usize) -> anyhow::Result<()> {
        let entry = self.slot_mut(slot).context("the hub has gone")?;
        entry.tunnels += 1;
        entry.was_down = false;
        Ok(())
    }

    /// Notes that the hub in this slot is open.
    ///
    /// # Errors
    /// Somebody took it down meanwhile.
    pub(crate) fn opened(&mut self, slot: usize, open: OpenHub) -> anyhow::Result<()> {
        let entry = self.slot_mut(slot).context("the hub has gone")?;
        anyhow::ensure!(!entry.was_down, "{}: somebody took it down while it was opened; try again", entry.hub.name);
        entry.open = Some(open);
        Ok(())
    }

    /// Takes a tunnel off a hub, which is returned if it was the last one: it is to be removed, or to be kept.
    pub(crate) fn leave(&mut self, slot: usize) -> Option<Hub> {
        let entry = self.slot_mut(slot)?;
        entry.tunnels = entry.tunnels.saturating_sub(1);
        entry.going = entry.tunnels == 0;
        entry.going.then(|| entry.hub.clone())
    }

    /// Returns a hub that no tunnel of this engine has entered: it is to be removed, or to be kept.
    pub(crate) fn vacate(&mut self, slot: usize) -> Option<Hub> {
        let entry = self.slot_mut(slot).filter(|entry| entry.tunnels == 0)?;
        entry.going = true;
        Some(entry.hub.clone())
    }

    /// Keeps a hub without tunnels of this engine: it has devices of daemons that have not connected yet.
    pub(crate) fn keep(&mut self, slot: usize) {
        if let Some(entry) = self.slot_mut(slot) {
            entry.going = false;
        }
    }

    /// Notes that a hub was taken down or deleted; its tunnels end. Logs it, unless the engine removes the hub itself, or all its
    /// tunnels are ending already.
    pub(crate) fn lose(&mut self, slot: usize, deleted: bool, has_tunnels: bool) {
        if let Some(entry) = self.slot_mut(slot) {
            entry.lost |= deleted;
            entry.was_down = true;
            let is_going = entry.going || (entry.tunnels > 0 && !has_tunnels);
            if !is_going {
                tracing::warn!("{}: somebody has taken it away; its tunnels end, or start over", entry.hub.name);
            }
        }
    }

    /// Forgets a hub that is removed.
    pub(crate) fn remove(&mut self, slot: usize) {
        if let Some(entry) = self.0.get_mut(slot) {
            *entry = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::bpf::XdpMode;

    fn hub(framing: Framing, index: u32) -> Hub {
        Hub { name: String::new(), index, hidden_index: index + 100, hidden_mac: [2; 6], framing }
    }

    fn open() -> OpenHub {
        OpenHub { note: "open".to_owned(), mode: XdpMode::Generic, sockets: Vec::new() }
    }

    /// No tunnel on it hears of that: the one that it is opened for is not there yet.
    #[test]
    fn a_hub_that_is_taken_down_while_it_is_opened_is_refused() {
        let mut hubs = Slots::inherited(vec![hub(Framing::Superframes, 5), hub(Framing::Superframes, 6)]);
        for slot in [0, 1] {
            hubs.enter(slot).unwrap();
        }
        hubs.lose(0, false, false);
        assert!(hubs.opened(0, open()).is_err());
        assert!(hubs.note(0).is_none());
        assert!(hubs.leave(0).is_some());
        hubs.enter(0).unwrap();
        hubs.opened(0, open()).unwrap();
        hubs.opened(1, open()).unwrap();
        // One that is open may be taken down and up again; its tunnels have ended.
        hubs.lose(1, false, true);
        assert_eq!(hubs.with_room(Framing::Superframes), Some(0));
        hubs.lose(0, true, false);
        assert_eq!(hubs.with_room(Framing::Superframes), Some(1));
    }

    #[test]
    fn a_moved_pair_has_its_new_index_unless_another_ethernet_pair_has_it() {
        let ethernet = |index| hub(Framing::Ethernet, index);
        let mut hubs = Slots::inherited(vec![hub(Framing::Superframes, 5), ethernet(6), ethernet(7), ethernet(8)]);
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
