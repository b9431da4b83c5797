//! The replay filters: exact, because the protocol has no sequence numbers for a window (protocol section 6).
//!
//! A packet is identified by its IV and first cipher block, folded to 64 bits. The filter stores 64-bit fingerprints of these
//! under a keyed hash (SipHash, by the standard library's `RandomState`) with a random key that never leaves the process. So
//! nobody can choose packets that fill one table; nor packets that share a fold, since the cipher block depends on the key. A
//! fresh packet is taken for a replay with probability n / 2^63, where n is the number of stored packets: at the 2^18 packets
//! of a key, 2^-45 per packet and below 2^-27 for the whole life of a key. A stored packet is never taken for a fresh one.
//!
//! The folds of accepted packets are also in the tunnel's [ledger](crate::engine::ledger), from which the next engine fills its
//! filters if this one is killed.
//!
//! **Insert a packet only after all other checks have passed** (CRC, P, inner headers). Otherwise an attacker without
//! the key could delay a genuine packet, send a forged one with the same IV and first block, and the genuine one would
//! be refused.

mod journal;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use crate::engine::ledger::Ledger;

pub(crate) use journal::Journal;

/// Number of entries at which a set is split into shards.
const SPLIT_ENTRIES: usize = 4096;
/// Number of shards of a large set. Each grows by itself, so that an insertion moves at most a 256th of all entries.
const SHARDS: usize = 256;
/// Slots of the smallest table that is not empty.
const MIN_SLOTS: usize = 16;

/// An open-addressed table of fingerprints.
#[derive(Debug, Default)]
struct Table {
    /// Slots, a power of two or none; zero means free.
    slots: Vec<u64>,
    used: usize,
}

impl Table {
    /// Returns the slot of `fingerprint`, or the free slot where it belongs. There is always one: at most three
    /// quarters are in use.
    fn find(&self, fingerprint: u64) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = fingerprint as usize & mask;
        while self.slots[at] != 0 && self.slots[at] != fingerprint {
            at = (at + 1) & mask;
        }
        at
    }

    fn contains(&self, fingerprint: u64) -> bool {
        !self.slots.is_empty() && self.slots[self.find(fingerprint)] != 0
    }

    /// Prefetches the slot of `fingerprint`.
    fn prefetch(&self, fingerprint: u64) {
        let mask = self.slots.len().wrapping_sub(1);
        std::hint::black_box(self.slots.get(fingerprint as usize & mask).copied());
    }

    fn insert(&mut self, fingerprint: u64) -> bool {
        if self.used * 4 >= self.slots.len() * 3 {
            self.grow();
        }
        let at = self.find(fingerprint);
        let fresh = self.slots[at] == 0;
        self.slots[at] = fingerprint;
        self.used += usize::from(fresh);
        fresh
    }

    fn grow(&mut self) {
        let larger = vec![0; (self.slots.len() * 2).max(MIN_SLOTS)];
        let smaller = std::mem::replace(&mut self.slots, larger);
        for fingerprint in smaller.into_iter().filter(|slot| *slot != 0) {
            let at = self.find(fingerprint);
            self.slots[at] = fingerprint;
        }
    }
}

/// A set of fingerprints: one table while it is small, then shards by the upper bits.
#[derive(Debug, Default)]
struct Set {
    tables: Vec<Table>,
    used: usize,
}

impl Set {
    fn shard(&self, fingerprint: u64) -> usize {
        if self.tables.len() == SHARDS { (fingerprint >> 56) as usize } else { 0 }
    }

    fn contains(&self, fingerprint: u64) -> bool {
        self.tables.get(self.shard(fingerprint)).is_some_and(|table| table.contains(fingerprint))
    }

    fn prefetch(&self, fingerprint: u64) {
        if let Some(table) = self.tables.get(self.shard(fingerprint)) {
            table.prefetch(fingerprint);
        }
    }

    fn insert(&mut self, fingerprint: u64) -> bool {
        if self.tables.is_empty() {
            self.tables = vec![Table::default()];
        } else if self.used == SPLIT_ENTRIES && self.tables.len() == 1 {
            self.split();
        }
        let shard = self.shard(fingerprint);
        let fresh = self.tables[shard].insert(fingerprint);
        self.used += usize::from(fresh);
        fresh
    }

    fn split(&mut self) {
        let whole = std::mem::take(&mut self.tables);
        self.tables.resize_with(SHARDS, Table::default);
        for fingerprint in whole.into_iter().flat_map(|table| table.slots).filter(|slot| *slot != 0) {
            let shard = self.shard(fingerprint);
            self.tables[shard].insert(fingerprint);
        }
    }

    #[cfg(test)]
    fn memory(&self) -> usize {
        let slots: usize = self.tables.iter().map(|table| table.slots.capacity()).sum();
        slots * size_of::<u64>() + self.tables.capacity() * size_of::<Table>()
    }
}

/// The fingerprint of a packet in one filter.
#[derive(Clone, Copy, Debug)]
pub struct Fingerprint {
    /// IV and first cipher block, the same in all filters.
    fold: u64,
    hash: u64,
}

impl Fingerprint {
    fn of(key: &RandomState, fold: u64) -> Self {
        Self { fold, hash: fingerprint(key, fold) }
    }

    /// What the fingerprint is made from.
    pub fn fold(self) -> u64 {
        self.fold
    }
}

/// Folds IV and first cipher block. With one of them fixed, different ones of the other have different folds.
fn fold(packet: &[u8; 16]) -> u64 {
    let [iv, block] = [0, 8].map(|at| u64::from_be_bytes(std::array::from_fn(|octet| packet[at + octet])));
    // An odd number of rotations can be undone.
    iv ^ iv.rotate_left(23) ^ iv.rotate_left(41) ^ block
}

/// Zero means a free slot, so the fingerprint 0 is replaced by another one.
fn fingerprint(key: &RandomState, fold: u64) -> u64 {
    let mut hasher = key.build_hasher();
    hasher.write_u64(fold);
    hasher.finish().max(1)
}

/// The packets received under one dynamic key. Its size follows their number, which the packet limit of the key bounds.
///
/// Memory: none while it is empty, 128 octets from the first packet on, then at most 22 octets per packet: 4 MiB for
/// 2^18.
#[derive(Debug, Default)]
pub(crate) struct ReplayFilter {
    key: RandomState,
    seen: Set,
}

impl ReplayFilter {
    /// Returns the fingerprint of a packet, from its IV and first cipher block. Does not store it.
    pub(crate) fn fingerprint(&self, packet: &[u8; 16]) -> Fingerprint {
        Fingerprint::of(&self.key, fold(packet))
    }

    /// Stores a packet that an engine before this one has accepted, by its [fold](Fingerprint::fold).
    pub(crate) fn restore(&mut self, fold: u64) {
        self.insert(Fingerprint::of(&self.key, fold));
    }

    /// Prefetches the data for [`ReplayFilter::insert`]. Each packet has its own slot in a table that is larger than
    /// the inner caches; if this is done for all packets of a batch first, the cache misses overlap.
    pub(crate) fn prefetch(&self, packet: Fingerprint) {
        self.seen.prefetch(packet.hash);
    }

    /// Stores the fingerprint of a packet; returns whether it was new. Only for packets that have passed all other
    /// checks, see the module.
    pub(crate) fn insert(&mut self, packet: Fingerprint) -> bool {
        self.seen.insert(packet.hash)
    }

    /// Returns the octets of memory in use.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.seen.memory()
    }
}

/// Entries of a generation, for a key without a limit. Both generations together need at most 32 MiB, from 2^20 entries
/// on at least 16 MiB.
const GENERATION_ENTRIES: usize = 1 << 20;

/// A set that forgets old entries: it has at least the last `limit` entries, and at most twice as many.
#[derive(Debug)]
struct Generations {
    key: RandomState,
    limit: usize,
    recent: Set,
    older: Set,
    /// Tables that are no longer used. One is freed per insertion, because freeing megabytes at once takes
    /// milliseconds.
    retired: Vec<Table>,
}

impl Generations {
    fn new(limit: usize) -> Self {
        Self { key: RandomState::new(), limit, recent: Set::default(), older: Set::default(), retired: Vec::new() }
    }

    fn fingerprint(&self, fold: u64) -> Fingerprint {
        Fingerprint::of(&self.key, fold)
    }

    fn contains(&self, fingerprint: u64) -> bool {
        self.recent.contains(fingerprint) || self.older.contains(fingerprint)
    }

    fn prefetch(&self, fingerprint: u64) {
        self.recent.prefetch(fingerprint);
        self.older.prefetch(fingerprint);
    }

    fn insert(&mut self, fingerprint: u64) -> bool {
        self.retired.pop();
        if self.older.contains(fingerprint) {
            return false;
        }
        let fresh = self.recent.insert(fingerprint);
        if self.recent.used == self.limit {
            let forgotten = std::mem::replace(&mut self.older, std::mem::take(&mut self.recent));
            self.retired = forgotten.tables;
        }
        fresh
    }

    #[cfg(test)]
    fn memory(&self) -> usize {
        let retired: usize = self.retired.iter().map(|table| table.slots.capacity() * size_of::<u64>()).sum();
        self.recent.memory() + self.older.memory() + retired
    }
}

/// The packets received under the static key, which never expires: at least the last 2^20, at most the last 2^21.
///
/// The consequence: an attacker who records a packet under the static key can replay it once after 2^20 more packets
/// under this key, or after a restart and 2^18 more, which a [`Journal`] holds at least. Data is under the static key only
/// during a key exchange, so 2^18 packets take days even if keys change every minute. Memory as for [`ReplayFilter`], up to
/// 32 MiB.
#[derive(Debug)]
pub(crate) struct StaticReplayFilter(Generations);

impl Default for StaticReplayFilter {
    fn default() -> Self {
        Self(Generations::new(GENERATION_ENTRIES))
    }
}

impl StaticReplayFilter {
    /// As [`ReplayFilter::fingerprint`].
    pub(crate) fn fingerprint(&self, packet: &[u8; 16]) -> Fingerprint {
        self.0.fingerprint(fold(packet))
    }

    /// As [`ReplayFilter::restore`].
    pub(crate) fn restore(&mut self, fold: u64) {
        self.insert(self.0.fingerprint(fold));
    }

    /// As [`ReplayFilter::prefetch`].
    pub(crate) fn prefetch(&self, packet: Fingerprint) {
        self.0.prefetch(packet.hash);
    }

    /// As [`ReplayFilter::insert`].
    pub(crate) fn insert(&mut self, packet: Fingerprint) -> bool {
        self.0.insert(packet.hash)
    }

    /// Returns the octets of memory in use.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.0.memory()
    }
}

/// The IVs that this end has sent under the static key, which both ends use: a received packet with one of them is our
/// own packet, reflected (protocol section 6). Bounded like [`StaticReplayFilter`].
pub(crate) struct SentIvs {
    set: Generations,
    ledger: Option<Arc<Ledger>>,
}

impl Default for SentIvs {
    fn default() -> Self {
        Self { set: Generations::new(GENERATION_ENTRIES), ledger: None }
    }
}

impl SentIvs {
    /// Those that are in the ledger of a tunnel, where those to come are recorded, too.
    pub(crate) fn of(ledger: Arc<Ledger>) -> Self {
        let mut set = Generations::new(GENERATION_ENTRIES);
        for iv in ledger.sent_ivs() {
            set.insert(set.fingerprint(iv).hash);
        }
        Self { set, ledger: Some(ledger) }
    }

    /// Stores an IV that is sent.
    pub(crate) fn insert(&mut self, iv: &[u8; 8]) {
        if let Some(ledger) = &self.ledger {
            ledger.note_iv(u64::from_be_bytes(*iv));
        }
        self.restore(iv);
    }

    /// Stores an IV that an earlier engine sent.
    pub(crate) fn restore(&mut self, iv: &[u8; 8]) {
        self.set.insert(self.set.fingerprint(u64::from_be_bytes(*iv)).hash);
    }

    /// Whether this IV is one of ours.
    pub(crate) fn contains(&self, iv: &[u8; 8]) -> bool {
        self.set.contains(self.set.fingerprint(u64::from_be_bytes(*iv)).hash)
    }

    /// Returns the octets of memory in use.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.set.memory()
    }
}

#[cfg(test)]
mod tests;
