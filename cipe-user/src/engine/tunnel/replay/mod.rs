//! Which packets were seen before: exact, where a window of sequence numbers cannot be had (protocol section 6).
//!
//! A packet is known by its IV and first cipher block. They are remembered as 64-bit fingerprints under a hash
//! (SipHash, by the standard library's `RandomState`) whose key is random and never leaves the process, so nobody can
//! choose packets that share a fingerprint or crowd a table. A fresh packet is taken for a replay with a chance of
//! n / 2^64 where n packets are remembered: at the 2^18 packets of a key, 2^-46 a packet and under 2^-28 for a key's
//! whole life. No replay is ever taken for fresh while it is remembered.
//!
//! **Insert a packet only after every other check has passed** (CRC, P, inner headers). Whoever lacks the key could
//! otherwise send an invented packet with the IV and first block of a genuine one that it has overheard and delayed,
//! and the genuine one would be refused.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Entries at which a set is split into shards.
const SPLIT: usize = 4096;
/// Shards of a large set. Each grows by itself, so that one insertion moves a 256th of all entries at most.
const SHARDS: usize = 256;
/// Slots of the smallest table with anything in it.
const SMALLEST: usize = 16;

/// An open-addressed table of fingerprints.
#[derive(Debug, Default)]
struct Table {
    /// A power of two of them, or none; zero is a free one.
    slots: Vec<u64>,
    used: usize,
}

impl Table {
    /// The slot that holds `fingerprint`, or the free one where it belongs. There is one: at most three quarters are
    /// used.
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

    /// Prefetches the place of `fingerprint`.
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
        let larger = vec![0; (self.slots.len() * 2).max(SMALLEST)];
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
        } else if self.used == SPLIT && self.tables.len() == 1 {
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

/// What a filter knows a packet by.
#[derive(Clone, Copy, Debug)]
pub struct Fingerprint(u64);

/// Zero means a free slot, so the fingerprint that would be zero shares one with another.
fn fingerprint(key: &RandomState, octets: &[u8]) -> u64 {
    let mut hasher = key.build_hasher();
    hasher.write(octets);
    hasher.finish().max(1)
}

/// The packets received under one dynamic key. It grows with them; the packet limit of the key bounds it.
///
/// Nothing while it is empty, 128 octets from the first packet, then at most 22 octets a packet: 4 MiB for 2^18.
#[derive(Debug, Default)]
pub struct ReplayFilter {
    key: RandomState,
    seen: Set,
}

impl ReplayFilter {
    /// What this filter knows a packet by, given its IV and first cipher block. Nothing is remembered yet.
    pub fn fingerprint(&self, packet: &[u8; 16]) -> Fingerprint {
        Fingerprint(fingerprint(&self.key, packet))
    }

    /// Prefetches what [`ReplayFilter::insert`] needs. Done for all packets of a batch before the first is inserted, the cache
    /// misses overlap: each packet has a place of its own in a table that is larger than the caches near the core.
    pub fn prefetch(&self, packet: Fingerprint) {
        self.seen.prefetch(packet.0);
    }

    /// Remembers a packet by its fingerprint of this filter, and returns whether it was new. For packets that passed
    /// every other check only, see the module.
    pub fn insert(&mut self, packet: Fingerprint) -> bool {
        self.seen.insert(packet.0)
    }

    /// Octets of memory in use.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.seen.memory()
    }
}

/// Entries of a generation, where a key has no end. At most 32 MiB for both generations, 16 of them from 2^20 on.
const GENERATION: usize = 1 << 20;

/// A set that forgets: at least the last `limit` entries are in it, at most twice as many.
#[derive(Debug)]
struct Generations {
    key: RandomState,
    limit: usize,
    recent: Set,
    older: Set,
    /// Tables that were forgotten, given back one an insertion: giving back megabytes at once takes milliseconds.
    retired: Vec<Table>,
}

impl Generations {
    fn new(limit: usize) -> Self {
        Self { key: RandomState::new(), limit, recent: Set::default(), older: Set::default(), retired: Vec::new() }
    }

    fn fingerprint(&self, octets: &[u8]) -> u64 {
        fingerprint(&self.key, octets)
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

/// The packets received under the static key, which lives for ever: of the last 2^20 at least, of the last 2^21 at
/// most.
///
/// What that means: whoever records a packet under the static key and waits until 2^20 more have been received under
/// it, or until the engine starts anew, can have it accepted once more. Data travels under that key only while a
/// dynamic one is negotiated, so 2^20 of them are days where keys change every minute. Memory is used as by
/// [`ReplayFilter`], up to 32 MiB.
#[derive(Debug)]
pub struct StaticReplayFilter(Generations);

impl Default for StaticReplayFilter {
    fn default() -> Self {
        Self(Generations::new(GENERATION))
    }
}

impl StaticReplayFilter {
    /// As [`ReplayFilter::fingerprint`].
    pub fn fingerprint(&self, packet: &[u8; 16]) -> Fingerprint {
        Fingerprint(self.0.fingerprint(packet))
    }

    /// As [`ReplayFilter::prefetch`].
    pub fn prefetch(&self, packet: Fingerprint) {
        self.0.prefetch(packet.0);
    }

    /// As [`ReplayFilter::insert`].
    pub fn insert(&mut self, packet: Fingerprint) -> bool {
        self.0.insert(packet.0)
    }

    /// Octets of memory in use.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.0.memory()
    }
}

/// The IVs that this end has sent under the static key, which both ends send under: a packet that comes in with one of
/// them is our own, reflected (protocol section 6). Bounded as [`StaticReplayFilter`].
#[derive(Debug)]
pub(crate) struct SentIvs(Generations);

impl Default for SentIvs {
    fn default() -> Self {
        Self(Generations::new(GENERATION))
    }
}

impl SentIvs {
    /// Remembers an IV as it goes out.
    pub(crate) fn insert(&mut self, iv: &[u8; 8]) {
        self.0.insert(self.0.fingerprint(iv));
    }

    /// Whether a packet with this IV is one of ours.
    pub(crate) fn contains(&self, iv: &[u8; 8]) -> bool {
        self.0.contains(self.0.fingerprint(iv))
    }

    /// Octets of memory in use.
    #[cfg(test)]
    pub(crate) fn memory(&self) -> usize {
        self.0.memory()
    }
}

#[cfg(test)]
mod tests;
