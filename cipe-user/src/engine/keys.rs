//! A tunnel's live keys as a worker holds them: expanded from the key map whenever a slot's generation changes.

use std::time::Instant;

use cipe_common::maps::{Slot, key_index};

use super::replay::{ReplayFilter, StaticReplayFilter};
use crate::cipher::{Algorithm, Key};
use crate::kernel::keys::KeyReader;
use zeroize::Zeroizing;

const SLOTS: [Slot; 4] = [Slot::Static, Slot::Send, Slot::Previous, Slot::Receive];

/// Packets already accepted under one key.
pub enum Replay {
    /// A dynamic key's, exact.
    Dynamic(ReplayFilter),
    /// The static key's, bounded.
    Static(StaticReplayFilter),
}

impl Replay {
    fn of(slot: Slot) -> Self {
        if slot == Slot::Static { Self::Static(Default::default()) } else { Self::Dynamic(Default::default()) }
    }

    /// Remembers a packet that passed every other check; whether it was new.
    pub fn insert(&mut self, head: &[u8; 16]) -> bool {
        match self {
            Self::Dynamic(filter) => filter.insert(head),
            Self::Static(filter) => filter.insert(head),
        }
    }
}

/// One expanded key and what happened under it.
pub struct LiveKey {
    octets: Zeroizing<[u8; 16]>,
    /// The expanded key.
    pub key: Key,
    /// Packets already accepted under it (receiving slots).
    pub replay: Replay,
    /// Packets sealed or accepted.
    pub packets: u64,
    /// Payload octets sealed or accepted.
    pub octets_used: u64,
    /// When this worker took the key up.
    pub since: Instant,
}

/// The four slots of one tunnel.
pub struct Keys {
    algorithm: Algorithm,
    table: KeyReader,
    tunnel: u32,
    refreshed: Option<Instant>,
    seen: [u64; 4],
    live: [Option<LiveKey>; 4],
}

impl Keys {
    /// Keys of tunnel number `tunnel`; nothing is live before the first [`Keys::refresh`].
    pub fn new(algorithm: Algorithm, table: KeyReader, tunnel: u16) -> Self {
        Self { algorithm, table, tunnel: tunnel.into(), refreshed: None, seen: [0; 4], live: [const { None }; 4] }
    }

    /// Takes up what changed in the map. Four atomic loads when nothing did.
    ///
    /// A receive key that moves to the previous slot keeps its replay filter and counts.
    pub fn refresh(&mut self, now: Instant) {
        // Once a round: in the middle of a batch a slot must not come to mean another key.
        if self.refreshed.replace(now) == Some(now) {
            return;
        }
        for slot in SLOTS {
            let index = key_index(self.tunnel, slot);
            if self.table.generation(index) == self.seen[slot as usize] {
                continue;
            }
            let Some((generation, octets)) = self.table.read(index) else {
                self.seen[slot as usize] = self.table.generation(index);
                self.live[slot as usize] = None;
                continue;
            };
            if slot == Slot::Previous && self.holds(Slot::Receive, &octets) {
                self.live[Slot::Previous as usize] = self.live[Slot::Receive as usize].take();
                self.seen[Slot::Receive as usize] = 0;
                self.seen[slot as usize] = generation;
                continue;
            }
            if slot == Slot::Receive && self.holds(Slot::Previous, &octets) {
                // The control thread has moved the key but not yet written its successor: look again at the next batch.
                self.live[slot as usize] = None;
                continue;
            }
            if !self.holds(slot, &octets) {
                let key = Key::new(self.algorithm, &octets);
                self.live[slot as usize] =
                    Some(LiveKey { octets, key, replay: Replay::of(slot), packets: 0, octets_used: 0, since: now });
            }
            self.seen[slot as usize] = generation;
        }
    }

    fn holds(&self, slot: Slot, octets: &[u8; 16]) -> bool {
        self.live[slot as usize].as_ref().is_some_and(|live| *live.octets == *octets)
    }

    /// The key in a slot.
    pub fn get(&self, slot: Slot) -> Option<&LiveKey> {
        self.live[slot as usize].as_ref()
    }

    /// The key in a slot, to account for its use.
    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut LiveKey> {
        self.live[slot as usize].as_mut()
    }

    /// The slot that data is sealed under: the dynamic send key, else the static key.
    pub fn sending(&self) -> Option<Slot> {
        [Slot::Send, Slot::Static].into_iter().find(|slot| self.get(*slot).is_some())
    }

    /// The slot to try first for a packet under the peer's dynamic key.
    pub fn receiving(&self) -> Option<Slot> {
        [Slot::Receive, Slot::Previous].into_iter().find(|slot| self.get(*slot).is_some())
    }
}
