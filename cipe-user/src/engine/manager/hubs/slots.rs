//! The hubs by slot, and by what the programs know the ends of an Ethernet tunnel's own pair.

use cipe_common::maps::MAX_HUBS;

use crate::kernel::hub::{Framing, Hub};

/// Tunnels on one hub. The kernel finds the device of a frame in a table of 256 lists, so that more would cost each frame
/// time; and one hub is enough for most engines.
const TUNNELS: usize = 1024;

/// The hubs, by slot: the number that stamps, maps and the workers know them by.
pub(crate) struct Slots(Vec<Option<HubSlot>>);

/// A hub in its slot.
pub(crate) struct HubSlot {
    pub hub: Hub,
    pub tunnels: usize,
    /// Mode got, for people; `None`: taken over from an engine that died, and not open yet.
    pub note: Option<String>,
    /// Somebody took it away: nothing new goes there.
    pub lost: bool,
    /// It is being removed: that it has gone is no news.
    pub going: bool,
    /// Index of the visible end in another network namespace, if it was moved there; another device may have the one before.
    moved: Option<u32>,
}

impl HubSlot {
    fn new(hub: Hub) -> Self {
        Self { hub, tunnels: 0, note: None, lost: false, going: false, moved: None }
    }
}

impl Slots {
    /// Those that a dead engine left, with devices on them.
    pub(crate) fn inherited(hubs: Vec<Hub>) -> Self {
        let place = |hub| Some(HubSlot::new(hub));
        Self(hubs.into_iter().map(place).collect())
    }

    /// All hubs with their slots.
    pub(crate) fn all(&self) -> impl Iterator<Item = (usize, &Hub)> {
        self.0.iter().enumerate().filter_map(|(slot, place)| Some((slot, &place.as_ref()?.hub)))
    }

    /// The hub in a slot.
    pub(crate) fn get(&self, slot: usize) -> Option<&Hub> {
        self.0.get(slot)?.as_ref().map(|place| &place.hub)
    }

    /// The same with what is known of it, to change that.
    pub(crate) fn place_mut(&mut self, slot: usize) -> Option<&mut HubSlot> {
        self.0.get_mut(slot)?.as_mut()
    }

    /// Mode got on a hub.
    pub(crate) fn note(&self, slot: usize) -> Option<&str> {
        self.0.get(slot)?.as_ref()?.note.as_deref()
    }

    /// The slot of the hub that one of its ends belongs to.
    pub(crate) fn of_device(&self, ifindex: u32) -> Option<usize> {
        let is_end = |place: &HubSlot| {
            place.hub.hidden_index == ifindex || (place.hub.index == ifindex && place.moved.is_none())
        };
        self.0.iter().position(|place| place.as_ref().is_some_and(is_end))
    }

    /// The visible end of an Ethernet tunnel's pair has this index in another network namespace from now on.
    pub(crate) fn set_moved(&mut self, slot: usize, index: u32) {
        if let Some(place) = self.place_mut(slot) {
            place.moved = Some(index);
        }
    }

    /// The indexes by which the programs know an Ethernet tunnel's pair. One that the programs know another such pair by is that
    /// one's: the visible end passes for it, and the hidden end says whose a frame is.
    pub(crate) fn ends(&self, slot: usize) -> Option<[u32; 2]> {
        let place = self.0.get(slot)?.as_ref()?;
        let hidden = place.hub.hidden_index;
        let Some(index) = place.moved else { return Some([place.hub.index, hidden]) };
        let has_it = |(other, place): (usize, &HubSlot)| {
            let visible = match place.moved {
                None => place.hub.index == index,
                // Of two that were moved the first one has it.
                Some(moved) => moved == index && other < slot,
            };
            other != slot && place.hub.framing == Framing::Ethernet && (visible || place.hub.hidden_index == index)
        };
        let places = self.0.iter().enumerate().filter_map(|(other, place)| Some((other, place.as_ref()?)));
        Some(if places.into_iter().any(has_it) { [hidden; 2] } else { [index, hidden] })
    }

    /// Whether the pair in this slot is an Ethernet tunnel's own.
    pub(crate) fn is_ethernet(&self, slot: usize) -> bool {
        self.get(slot).is_some_and(|hub| hub.framing == Framing::Ethernet)
    }

    /// A hub that takes one more tunnel.
    pub(crate) fn with_room(&self, framing: Framing) -> Option<usize> {
        let room = |place: &HubSlot| place.hub.framing == framing && !place.lost && place.tunnels < TUNNELS;
        self.0.iter().position(|place| place.as_ref().is_some_and(room))
    }

    /// Takes up a new hub, and returns its slot.
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

    /// Forgets a hub that is removed.
    pub(crate) fn remove(&mut self, slot: usize) {
        if let Some(place) = self.0.get_mut(slot) {
            *place = None;
        }
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
