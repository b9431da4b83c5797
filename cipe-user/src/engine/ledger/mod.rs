//! The use of a tunnel's keys, in memory that outlives the engine: which packets were accepted under each key, and how much each was
//! used. So another engine can go on under the same keys and accept nothing twice.
//!
//! The memory is a file without a name (memfd_create(2)), never on a disk: the daemon holds its descriptor while the engine works in
//! it, and hands it to the next engine with the keys. **No key is in it**, only salted hashes by which a key is known again; an entry
//! of a log is folded from an IV and a cipher block, which everybody on the carrier has seen.
//!
//! An engine may be killed between any two stores. Entries are written before their count, records before their number: so what is
//! counted is there. A packet is counted before it is delivered.

mod layout;
mod record;
mod sealed;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, ensure};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::locked;
use crate::kernel::keys::KEY;
use crate::kernel::shared::SharedArray;
use layout::{
    BROKEN_WORD, HASH, IV_LOG, LOGGED, MAGIC, MAGIC_WORD, NEXT_WORD, NUMBER, OCTETS, PACKETS, RECEIVE_RECORDS, RECORDS,
    SALT_WORDS, SEALED_RECEIVE, SEALED_SEND, SEND_RECORDS, SENT_IVS_WORD, SINCE, STATIC_ENTRIES, VERSION, VERSION_WORD,
    WORDS,
};
pub(super) use record::{Log, Record};
pub(super) use sealed::{Handed, NextCounter, WindowWords, boottime};

/// The use of a key. A key for both directions counts as two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The static key, for both directions.
    Static,
    /// A dynamic key for sending.
    Send,
    /// A dynamic key for receiving.
    Receive,
    /// A key for sending sealed packets.
    SealedSend,
    /// A key for receiving sealed packets.
    SealedReceive,
}

impl Use {
    /// The indexes of its records.
    fn records(self) -> std::ops::Range<usize> {
        match self {
            Self::Static => 0..1,
            Self::Send => 1..1 + SEND_RECORDS,
            Self::Receive => 1 + SEND_RECORDS..1 + SEND_RECORDS + RECEIVE_RECORDS,
            Self::SealedSend => SEALED_SEND,
            Self::SealedReceive => SEALED_RECEIVE,
        }
    }
}

/// The ledger of one tunnel, shared by all workers.
pub struct Ledger {
    words: SharedArray<1>,
    /// Held while a record is given away.
    opening: Mutex<()>,
    /// Held while the log of a record is written, or the record is given to another key.
    records: [Mutex<()>; RECORDS],
    /// The number of [`Record`]s of each record in the file: their keys are live.
    holders: [AtomicU32; RECORDS],
}

impl Ledger {
    /// Makes an empty ledger; returns also its memory, for the daemon to hold: an engine has no descriptors to spare for it.
    ///
    /// # Errors
    /// No memory, no descriptor, or no random octets.
    pub fn new() -> anyhow::Result<(Arc<Self>, OwnedFd)> {
        let make = || -> io::Result<OwnedFd> {
            let memory = memfd_create("cipe-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&memory, Self::octets())?;
            // Whoever has the descriptor cannot take the memory away from under an engine.
            fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(memory)
        };
        let memory = make().context("memory for the use of keys")?;
        let ledger = Self::map(&memory)?;
        let mut salt = [0; 16];
        getrandom::fill(&mut salt).context("the system gives no random numbers")?;
        for (word, octets) in SALT_WORDS.zip(salt.as_chunks::<8>().0) {
            ledger.word(word).store(u64::from_ne_bytes(*octets), Ordering::Relaxed);
        }
        ledger.word(NEXT_WORD).store(1, Ordering::Relaxed);
        ledger.word(VERSION_WORD).store(VERSION, Ordering::Relaxed);
        ledger.word(MAGIC_WORD).store(MAGIC, Ordering::Release);
        Ok((ledger, memory))
    }

    /// Takes over the ledger of an engine that has ended.
    ///
    /// # Errors
    /// It is none, one of another version, or one that has missed something: keys must be exchanged anew.
    pub fn take_over(memory: BorrowedFd<'_>) -> anyhow::Result<Arc<Self>> {
        let seals = fcntl_get_seals(memory).context("not a ledger")?;
        ensure!(seals.contains(SealFlags::SHRINK), "not a ledger: it may shrink");
        let length = fstat(memory)?.st_size;
        ensure!(
            length == Self::octets() as i64,
            "{length} octets instead of {}: a ledger of another version",
            Self::octets()
        );
        let ledger = Self::map(memory)?;
        ensure!(ledger.word(MAGIC_WORD).load(Ordering::Acquire) == MAGIC, "not a ledger");
        let version = ledger.word(VERSION_WORD).load(Ordering::Relaxed);
        ensure!(version == VERSION, "a ledger of version {version}; this engine knows version {VERSION}");
        ensure!(ledger.word(BROKEN_WORD).load(Ordering::Relaxed) == 0, "it has missed packets");
        Ok(ledger)
    }

    fn map(memory: impl AsFd) -> anyhow::Result<Arc<Self>> {
        let words = SharedArray::map(memory, WORDS).context("memory for the use of keys")?;
        Ok(Arc::new(Self {
            words,
            opening: Mutex::default(),
            records: Default::default(),
            holders: Default::default(),
        }))
    }

    const fn octets() -> u64 {
        (WORDS * size_of::<u64>()) as u64
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        &self.words[index][0]
    }

    /// Something has happened that is not in the ledger: no other engine may go on by it.
    fn set_broken(&self) {
        self.word(BROKEN_WORD).store(1, Ordering::Relaxed);
    }

    fn hash(&self, used: Use, key: &[u8]) -> [u64; 2] {
        let mut hash = Sha256::new_with_prefix([used as u8]);
        SALT_WORDS.for_each(|word| hash.update(self.word(word).load(Ordering::Relaxed).to_ne_bytes()));
        let digest = Zeroizing::new(<[u8; 32]>::from(hash.chain_update(key).finalize()));
        let words = digest.as_chunks::<8>().0;
        [words[0], words[1]].map(u64::from_ne_bytes)
    }

    fn find(&self, used: Use, hash: [u64; 2]) -> Option<(usize, u64)> {
        used.records().find_map(|index| {
            let field = |field| self.word(layout::record(index) + field);
            let number = field(NUMBER).load(Ordering::Acquire);
            let same = (0..2).all(|word| field(HASH + word).load(Ordering::Relaxed) == hash[word]);
            (number != 0 && same).then_some((index, number))
        })
    }

    /// How many packets the engine before this one, or this one, has sealed or accepted under a key; `None`: none was, or that was
    /// so long ago that it is not known.
    pub fn packets(&self, used: Use, key: &[u8; KEY]) -> Option<u64> {
        let (index, _) = self.find(used, self.hash(used, key))?;
        let [packets, logged] =
            [PACKETS, LOGGED].map(|field| self.word(layout::record(index) + field).load(Ordering::Relaxed));
        // The engine may have been killed between the two.
        Some(packets.max(logged))
    }

    /// Returns the record of a key: its own if it has one, else a new one, in the place of the oldest of the same use whose key is not
    /// live. A peer may announce any number of keys while it uses another: so if all are live, in the place of the oldest without a
    /// packet.
    pub fn open(self: &Arc<Self>, used: Use, key: &[u8; KEY]) -> Record {
        let hash = self.hash(used, key);
        let _opening = locked(&self.opening);
        let known = self.find(used, hash);
        let (index, number) = known.unwrap_or_else(|| self.begin(used, hash));
        Record::new(self.clone(), index, number, known.is_none())
    }

    /// The number of a new record.
    fn next_number(&self) -> u64 {
        self.word(NEXT_WORD).fetch_add(1, Ordering::Relaxed)
    }

    fn begin(&self, used: Use, hash: [u64; 2]) -> (usize, u64) {
        let number_of = |index: usize| self.word(layout::record(index) + NUMBER);
        let worth = |index: &usize| {
            let is_live = self.holders[*index].load(Ordering::Relaxed) > 0;
            let has_packets = self.word(layout::record(*index) + PACKETS).load(Ordering::Relaxed) > 0;
            (is_live, is_live && has_packets, number_of(*index).load(Ordering::Relaxed))
        };
        let index = used.records().min_by_key(worth).unwrap_or(used.records().start);
        let _record = locked(&self.records[index]);
        let number = self.next_number();
        // Empty while it is written.
        number_of(index).store(0, Ordering::Release);
        let set = |field: usize, value: u64| self.word(layout::record(index) + field).store(value, Ordering::Relaxed);
        [PACKETS, OCTETS, LOGGED].into_iter().for_each(|field| set(field, 0));
        set(SINCE, record::monotonic());
        set(HASH, hash[0]);
        set(HASH + 1, hash[1]);
        number_of(index).store(number, Ordering::Release);
        (index, number)
    }

    /// Records an IV that is sent under the static key. One caller at a time.
    pub fn note_iv(&self, iv: u64) {
        let count = self.word(SENT_IVS_WORD).load(Ordering::Relaxed);
        self.word(IV_LOG + count as usize % STATIC_ENTRIES).store(iv, Ordering::Relaxed);
        self.word(SENT_IVS_WORD).store(count + 1, Ordering::Release);
    }

    /// The last IVs that were sent under the static key, oldest first.
    pub fn sent_ivs(&self) -> impl Iterator<Item = u64> {
        self.ring(IV_LOG, self.word(SENT_IVS_WORD).load(Ordering::Acquire), STATIC_ENTRIES)
    }

    /// The last entries of a ring that `count` were written to in all.
    fn ring(&self, start: usize, count: u64, entries: usize) -> impl Iterator<Item = u64> {
        let first = count.saturating_sub(entries as u64);
        (first..count).map(move |at| self.word(start + at as usize % entries).load(Ordering::Relaxed))
    }
}
