//! The live keys of a tunnel in a worker. They are expanded from the key map when the generation of a slot changes,
//! once for all workers.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::Instant;

use crate::cipher::{Algorithm, Key};
use crate::engine::ledger::{Ledger, Log, Record, Use};
use crate::engine::locked;
use crate::engine::tunnel::replay::{Fingerprint, ReplayFilter, StaticReplayFilter};
use crate::kernel::keys::{KEY, KeyReader, Octets};
use arrayvec::ArrayVec;
use cipe_common::maps::{SLOTS, Slot, key_index};

/// The packets that were accepted under one key.
pub(crate) enum Replay {
    /// Of a dynamic key: exact.
    Dynamic(ReplayFilter),
    /// Of the static key: bounded.
    Static(StaticReplayFilter),
}

impl Replay {
    /// The packets in a key's record. The filter of the static key continues what is known of the `past`.
    fn of(used: Use, record: &Record, past: &Mutex<Option<StaticReplayFilter>>) -> Self {
        if used == Use::Static {
            let mut filter = locked(past).take().unwrap_or_default();
            record.entries().for_each(|fold| filter.restore(fold));
            Self::Static(filter)
        } else {
            let mut filter = ReplayFilter::default();
            record.entries().for_each(|fold| filter.restore(fold));
            Self::Dynamic(filter)
        }
    }

    fn insert(&mut self, packet: Fingerprint) -> bool {
        match self {
            Self::Dynamic(filter) => filter.insert(packet),
            Self::Static(filter) => filter.insert(packet),
        }
    }
}

/// The locked packets that were accepted under one key, and their log.
pub struct Accepted<'a> {
    replay: MutexGuard<'a, Replay>,
    /// `None`: the key was replaced so many times that its record is another key's.
    log: Option<Log<'a>>,
}

impl Accepted<'_> {
    /// Returns the fingerprint of a packet, from its IV and first block.
    pub fn fingerprint(&self, head: &[u8; 16]) -> Fingerprint {
        match &*self.replay {
            Replay::Dynamic(filter) => filter.fingerprint(head),
            Replay::Static(filter) => filter.fingerprint(head),
        }
    }

    /// Prefetches the data for [`Accepted::insert`].
    pub fn prefetch(&self, packet: Fingerprint) {
        match &*self.replay {
            Replay::Dynamic(filter) => filter.prefetch(packet),
            Replay::Static(filter) => filter.prefetch(packet),
        }
    }

    /// Records a packet that has passed all other checks. Returns whether it was new.
    pub fn insert(&mut self, packet: Fingerprint) -> bool {
        let Some(log) = &mut self.log else { return false };
        let fresh = self.replay.insert(packet);
        if fresh {
            log.push(packet.fold());
        }
        fresh
    }
}

/// An expanded key and its use, shared by all workers.
pub struct LiveKey {
    octets: Octets,
    /// The expanded key.
    pub key: Key,
    /// When it was first used, by this engine or the one before.
    pub since: Instant,
    record: Record,
    replay: Mutex<Replay>,
    overdue: OnceLock<Instant>,
}

impl LiveKey {
    fn new(algorithm: Algorithm, replay: Replay, octets: Octets, record: Record, now: Instant) -> Self {
        Self {
            key: Key::new(algorithm, &octets),
            octets,
            since: record.since().unwrap_or(now),
            replay: Mutex::new(replay),
            record,
            overdue: OnceLock::new(),
        }
    }

    /// Number of packets sealed or accepted.
    pub fn packets(&self) -> u64 {
        self.record.packets()
    }

    /// Number of payload octets sealed or accepted.
    #[cfg(test)]
    pub fn octets_used(&self) -> u64 {
        self.record.octets()
    }

    /// Counts more packets and payload octets; returns both totals.
    pub fn account(&self, packets: u64, octets: u64) -> (u64, u64) {
        self.record.account(packets, octets)
    }

    /// Returns when the peer was first seen to use the key after its lifetime; `now` if this is the first time.
    pub fn overdue_since(&self, now: Instant) -> Instant {
        *self.overdue.get_or_init(|| now)
    }

    /// Locks and returns the packets accepted so far. No other worker accepts packets while this is held.
    pub fn accepted(&self) -> Accepted<'_> {
        Accepted { replay: locked(&self.replay), log: self.record.log() }
    }
}

/// The keys of one tunnel that are live in any worker. Each is expanded once, and has one replay filter.
pub(crate) struct Expanded {
    keys: Mutex<Vec<(Use, Weak<LiveKey>)>>,
    /// What earlier engines have accepted under the static key, until that is live.
    past: Mutex<Option<StaticReplayFilter>>,
    ledger: Arc<Ledger>,
}

/// The use of a slot's key.
fn use_of(slot: Slot) -> Use {
    match slot {
        Slot::Static => Use::Static,
        Slot::Send => Use::Send,
        Slot::Receive | Slot::Previous => Use::Receive,
    }
}

impl Expanded {
    /// Returns the key that another worker has expanded, or expands it.
    fn get(&self, algorithm: Algorithm, used: Use, octets: &Octets, now: Instant) -> Arc<LiveKey> {
        let mut keys = locked(&self.keys);
        keys.retain(|(_, key)| key.strong_count() > 0);
        let known = keys.iter().filter(|(other, _)| *other == used).filter_map(|(_, key)| key.upgrade());
        if let Some(known) = known.into_iter().find(|known| known.octets == *octets) {
            return known;
        }
        let record = self.ledger.open(used, octets);
        let replay = Replay::of(used, &record, &self.past);
        let made = Arc::new(LiveKey::new(algorithm, replay, octets.clone(), record, now));
        keys.push((used, Arc::downgrade(&made)));
        made
    }
}

/// The keys in the four slots of one tunnel.
pub struct Keys {
    algorithm: Algorithm,
    table: KeyReader,
    tunnel: u32,
    refreshed: Option<Instant>,
    /// The value of [`KeyReader::changes`] at the last refresh.
    changes: Option<u64>,
    seen: [u64; SLOTS as usize],
    /// The contents of the map's slots at the last refresh. A live key may be in another slot for a moment.
    wanted: [Option<Octets>; SLOTS as usize],
    live: [Option<Arc<LiveKey>>; SLOTS as usize],
    expanded: Arc<Expanded>,
}

impl Keys {
    /// Creates the keys of tunnel number `tunnel`; no key is live before the first [`Keys::refresh`].
    pub fn new(algorithm: Algorithm, table: KeyReader, tunnel: u16, ledger: Arc<Ledger>) -> Self {
        Self::of(
            algorithm,
            table,
            tunnel.into(),
            Arc::new(Expanded { keys: Mutex::default(), past: Mutex::default(), ledger }),
        )
    }

    /// The same with a new ledger.
    ///
    /// # Panics
    /// If there is no memory for it.
    #[cfg(any(test, feature = "harness"))]
    pub fn alone(algorithm: Algorithm, table: KeyReader, tunnel: u16) -> Self {
        Self::new(algorithm, table, tunnel, Ledger::new().expect("memory for a ledger").0)
    }

    fn of(algorithm: Algorithm, table: KeyReader, tunnel: u32, expanded: Arc<Expanded>) -> Self {
        Self {
            algorithm,
            table,
            expanded,
            tunnel,
            refreshed: None,
            changes: None,
            seen: [0; SLOTS as usize],
            wanted: [const { None }; SLOTS as usize],
            live: [const { None }; SLOTS as usize],
        }
    }

    /// Refuses packets under the static key with these heads, which an earlier engine has accepted. Call it before the key is
    /// live.
    pub fn refuse(&self, heads: &[[u8; 16]]) {
        let mut filter = StaticReplayFilter::default();
        for head in heads {
            filter.insert(filter.fingerprint(head));
        }
        *locked(&self.expanded.past) = Some(filter);
    }

    /// Returns the same tunnel's keys for another worker.
    pub fn for_another_worker(&self) -> Self {
        Self::of(self.algorithm, self.table.clone(), self.tunnel, self.expanded.clone())
    }

    /// Applies changes of the map. If nothing has changed in any tunnel, this costs one atomic load.
    ///
    /// A receive key that moves to the previous slot keeps its replay filter and counts. The control thread writes the
    /// key to the previous slot before it writes the new key to the receive slot. In between, both slots have the same
    /// key, and it is live in the previous one only.
    pub fn refresh(&mut self, now: Instant) {
        // Once per round: the key of a slot must not change in the middle of a batch.
        if self.refreshed.replace(now) == Some(now) {
            return;
        }
        // Read before the slots: a later change is then seen at the next refresh.
        let changes = Some(self.table.changes());
        if std::mem::replace(&mut self.changes, changes) == changes {
            return;
        }
        for slot in [Slot::Static, Slot::Send] {
            if self.read_slot(slot) {
                self.make_live(&[slot], now);
            }
        }
        // The receive slot is read first: if it has the new key, the previous slot has the old one already.
        let receive = self.read_slot(Slot::Receive);
        if self.read_slot(Slot::Previous) || receive {
            self.make_live(&[Slot::Previous, Slot::Receive], now);
        }
    }

    /// Reads a slot of the map. Returns whether its key may have changed.
    fn read_slot(&mut self, slot: Slot) -> bool {
        let index = key_index(self.tunnel, slot);
        let generation = self.table.generation(index);
        // A slot that is being written keeps its key until the next batch.
        if generation == self.seen[slot as usize] || !generation.is_multiple_of(2) {
            return false;
        }
        let (generation, octets) = match self.table.read(index) {
            Some((generation, octets)) => (generation, Some(octets)),
            None if self.table.generation(index) == generation => (generation, None),
            // The writer has just started to write.
            None => return false,
        };
        self.seen[slot as usize] = generation;
        self.wanted[slot as usize] = octets;
        true
    }

    /// Makes the keys of the map in `slots` live. A key that is already live in one of them moves without a change. A
    /// key in both is live in the first only.
    fn make_live(&mut self, slots: &[Slot], now: Instant) {
        let mut known: ArrayVec<Arc<LiveKey>, 2> =
            slots.iter().filter_map(|slot| self.live[*slot as usize].take()).collect();
        for (place, slot) in slots.iter().enumerate() {
            let Some(octets) = &self.wanted[*slot as usize] else { continue };
            if slots[..place].iter().any(|earlier| self.wanted[*earlier as usize].as_ref() == Some(octets)) {
                continue;
            }
            let key = match known.iter().position(|live| live.octets == *octets) {
                Some(at) => known.remove(at),
                None => self.expanded.get(self.algorithm, use_of(*slot), octets, now),
            };
            self.live[*slot as usize] = Some(key);
        }
    }

    /// Expands a key that is in no slot, for this tunnel's cipher.
    pub fn expand(&self, octets: &[u8; KEY]) -> Key {
        Key::new(self.algorithm, octets)
    }

    /// Returns the key in a slot.
    pub fn get(&self, slot: Slot) -> Option<&Arc<LiveKey>> {
        self.live[slot as usize].as_ref()
    }

    /// Returns the generation of a slot at the last refresh.
    pub fn generation(&self, slot: Slot) -> u64 {
        self.seen[slot as usize]
    }

    /// Returns the slot of the key for data: the dynamic send key, or else the static key.
    pub fn sending(&self) -> Option<Slot> {
        [Slot::Send, Slot::Static].into_iter().find(|slot| self.get(*slot).is_some())
    }

    /// Returns the slot to try first for a packet under the peer's dynamic key.
    pub fn receiving(&self) -> Option<Slot> {
        [Slot::Receive, Slot::Previous].into_iter().find(|slot| self.get(*slot).is_some())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kernel::keys::KeyWriter;

    const K1: [u8; KEY] = [1; KEY];
    const K2: [u8; KEY] = [2; KEY];
    const K3: [u8; KEY] = [3; KEY];
    const PACKET: [u8; 16] = [9; 16];

    fn pair() -> (KeyWriter, Keys) {
        let writer = KeyWriter::anonymous(8);
        let keys = Keys::alone(Algorithm::Blowfish, writer.reader(), 1);
        (writer, keys)
    }

    /// Changes a key like the manager; the worker refreshes in `between`.
    fn change(writer: &mut KeyWriter, old: &[u8; KEY], new: &[u8; KEY], between: impl FnOnce()) {
        writer.set(1, Slot::Previous, old);
        between();
        writer.set(1, Slot::Receive, new);
    }

    fn octets(keys: &Keys, slot: Slot) -> Option<[u8; KEY]> {
        keys.get(slot).map(|live| **live.octets)
    }

    fn use_once(keys: &Keys, slot: Slot) -> bool {
        let live = keys.get(slot).unwrap();
        live.account(1, 0);
        let mut accepted = live.accepted();
        let packet = accepted.fingerprint(&PACKET);
        accepted.insert(packet)
    }

    #[test]
    fn nothing_is_live_before_it_is_set_and_after_it_is_cleared() {
        let (mut writer, mut keys) = pair();
        keys.refresh(Instant::now());
        assert_eq!((keys.sending(), keys.receiving()), (None, None));
        for slot in [Slot::Static, Slot::Send, Slot::Receive, Slot::Previous] {
            writer.set(1, slot, &[slot as u8; KEY]);
        }
        writer.set(0, Slot::Send, &K3);
        keys.refresh(Instant::now());
        assert_eq!((keys.sending(), keys.receiving()), (Some(Slot::Send), Some(Slot::Receive)));
        assert_eq!(octets(&keys, Slot::Send), Some([Slot::Send as u8; KEY]));
        writer.clear(1, Slot::Send);
        writer.clear(1, Slot::Receive);
        keys.refresh(Instant::now());
        assert_eq!((keys.sending(), keys.receiving()), (Some(Slot::Static), Some(Slot::Previous)));
        writer.clear_tunnel(1);
        keys.refresh(Instant::now());
        assert_eq!((keys.sending(), keys.receiving()), (None, None));
    }

    #[test]
    fn a_receive_key_takes_its_filter_and_counts_along_to_the_previous_slot() {
        for looks_between in [false, true] {
            let (mut writer, mut keys) = pair();
            writer.set(1, Slot::Receive, &K1);
            keys.refresh(Instant::now());
            assert!(use_once(&keys, Slot::Receive));
            change(&mut writer, &K1, &K2, || {
                if looks_between {
                    keys.refresh(Instant::now());
                    assert_eq!((keys.receiving(), octets(&keys, Slot::Receive)), (Some(Slot::Previous), None));
                }
            });
            keys.refresh(Instant::now());
            assert_eq!((octets(&keys, Slot::Receive), octets(&keys, Slot::Previous)), (Some(K2), Some(K1)));
            assert_eq!(keys.get(Slot::Previous).unwrap().packets(), 1);
            assert!(!use_once(&keys, Slot::Previous), "a replay after the change is seen");
            assert!(use_once(&keys, Slot::Receive), "the new key has a filter of its own");
        }
    }

    #[test]
    fn a_change_that_was_slept_through_leaves_the_last_two_keys() {
        let (mut writer, mut keys) = pair();
        writer.set(1, Slot::Receive, &K1);
        keys.refresh(Instant::now());
        change(&mut writer, &K1, &K2, || {});
        change(&mut writer, &K2, &K3, || {});
        keys.refresh(Instant::now());
        assert_eq!((octets(&keys, Slot::Receive), octets(&keys, Slot::Previous)), (Some(K3), Some(K2)));
        writer.clear(1, Slot::Previous);
        keys.refresh(Instant::now());
        assert_eq!((octets(&keys, Slot::Receive), octets(&keys, Slot::Previous)), (Some(K3), None));
    }

    #[test]
    fn what_an_earlier_engine_accepted_under_the_static_key_is_refused_by_each_worker() {
        let (mut writer, mut keys) = pair();
        keys.refuse(&[PACKET]);
        let mut other = keys.for_another_worker();
        writer.set(1, Slot::Receive, &K1);
        writer.set(1, Slot::Static, &K2);
        keys.refresh(Instant::now());
        other.refresh(Instant::now());
        assert!(!use_once(&keys, Slot::Static) && !use_once(&other, Slot::Static));
        assert!(use_once(&keys, Slot::Receive), "another key");
    }

    #[test]
    fn a_key_that_is_set_again_or_comes_back_keeps_its_filter() {
        let (mut writer, mut keys) = pair();
        writer.set(1, Slot::Receive, &K1);
        keys.refresh(Instant::now());
        assert!(use_once(&keys, Slot::Receive));
        writer.set(1, Slot::Receive, &K1);
        keys.refresh(Instant::now());
        assert!(!use_once(&keys, Slot::Receive));
        // The writer died between the two writes, and its successor has undone the first.
        writer.set(1, Slot::Previous, &K1);
        keys.refresh(Instant::now());
        writer.clear(1, Slot::Previous);
        keys.refresh(Instant::now());
        assert_eq!((octets(&keys, Slot::Receive), octets(&keys, Slot::Previous)), (Some(K1), None));
        assert!(!use_once(&keys, Slot::Receive));
        // The keys of the two slots are exchanged.
        change(&mut writer, &K1, &K2, || {});
        keys.refresh(Instant::now());
        change(&mut writer, &K2, &K1, || {});
        keys.refresh(Instant::now());
        assert_eq!((octets(&keys, Slot::Receive), octets(&keys, Slot::Previous)), (Some(K1), Some(K2)));
        assert!(!use_once(&keys, Slot::Receive));
    }

    #[test]
    fn a_send_key_that_is_set_again_keeps_its_counts_and_a_new_one_begins_at_0() {
        let (mut writer, mut keys) = pair();
        writer.set(1, Slot::Send, &K1);
        let start = Instant::now();
        keys.refresh(start);
        assert_eq!(keys.get(Slot::Send).unwrap().account(1, 20), (1, 20));
        assert_eq!(keys.get(Slot::Send).unwrap().account(1, 30), (2, 50));
        writer.set(1, Slot::Send, &K1);
        keys.refresh(Instant::now());
        assert_eq!(keys.get(Slot::Send).map(|live| (live.packets(), live.since)), Some((2, start)));
        writer.set(1, Slot::Send, &K2);
        let later = Instant::now();
        keys.refresh(later);
        assert_eq!(keys.get(Slot::Send).map(|live| (live.packets(), live.since)), Some((0, later)));
        assert_eq!(keys.generation(Slot::Send), writer.reader().generation(key_index(1, Slot::Send)));
    }

    #[test]
    fn workers_share_a_key_its_counts_and_its_filter() {
        let (mut writer, mut keys) = pair();
        let mut other = keys.for_another_worker();
        for slot in [Slot::Static, Slot::Send, Slot::Receive] {
            writer.set(1, slot, &K1);
        }
        keys.refresh(Instant::now());
        assert!(use_once(&keys, Slot::Receive));
        // The other worker refreshes later, when the key has been replaced once more.
        change(&mut writer, &K1, &K2, || {});
        other.refresh(Instant::now());
        assert!(!use_once(&other, Slot::Previous), "a replay by another worker is seen");
        assert_eq!(keys.get(Slot::Receive).unwrap().packets(), 2);
        assert!(Arc::ptr_eq(keys.get(Slot::Receive).unwrap(), other.get(Slot::Previous).unwrap()));
        assert!(use_once(&other, Slot::Receive), "the successor has a filter of its own");
        for slot in [Slot::Static, Slot::Send] {
            assert_eq!(other.get(slot).unwrap().packets(), 0, "one key in several places is several");
        }
        // A key that no worker has is forgotten.
        drop((keys, other.live[Slot::Previous as usize].take()));
        let known = locked(&other.expanded.keys).iter().filter(|(_, key)| key.strong_count() > 0).count();
        assert_eq!(known, 3);
    }

    #[test]
    fn a_change_is_taken_up_in_the_next_round_and_not_in_the_middle_of_one() {
        let (mut writer, mut keys) = pair();
        let round = Instant::now();
        keys.refresh(round);
        writer.set(1, Slot::Send, &K1);
        keys.refresh(round);
        assert_eq!(octets(&keys, Slot::Send), None);
        keys.refresh(round + Duration::from_nanos(1));
        assert_eq!(octets(&keys, Slot::Send), Some(K1));
    }

    #[test]
    fn a_slot_that_is_being_written_keeps_its_key_until_it_is_done() {
        let (mut writer, mut keys) = pair();
        writer.set(1, Slot::Send, &K1);
        keys.refresh(Instant::now());
        writer.interrupt(1, Slot::Send);
        keys.refresh(Instant::now());
        assert_eq!(octets(&keys, Slot::Send), Some(K1));
        writer.set(1, Slot::Send, &K2);
        keys.refresh(Instant::now());
        assert_eq!(octets(&keys, Slot::Send), Some(K2));
    }
}
