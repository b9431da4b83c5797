//! The `KEYS` map as memory: the control thread writes live session keys, and the workers read them without a system
//! call.
//!
//! Each slot is a sequence lock: `generation` is odd while the slot is written, and has a new even value after each
//! change.
//! Each map has one [`KeyWriter`], and one [`KeyReader`] per worker; XDP reads `live` only.

use std::{
    collections::HashMap,
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering, fence},
    },
    time::{Duration, Instant},
};

use cipe_common::maps::{KeySlot, Slot, key_index};
use zeroize::Zeroizing;

use super::shared::{SharedArray, Words};

/// 64-bit words of a [`KeySlot`]: generation; live and reserved; two of key.
const WORDS: usize = size_of::<KeySlot>() / size_of::<u64>();
const _: () =
    assert!(WORDS == 4 && std::mem::offset_of!(KeySlot, live) == 8 && std::mem::offset_of!(KeySlot, key) == 16);

/// Octets of a key.
pub const KEY: usize = 16;

/// A key, wiped when it is dropped. It stands in one place: octets that move, such as with the tunnel that they belong to, leave a copy
/// of themselves behind.
pub type Octets = Box<Zeroizing<[u8; KEY]>>;

/// The only writer of the key slots.
pub struct KeyWriter {
    slots: Arc<SharedArray<WORDS>>,
    changes: Arc<AtomicU64>,
    /// When each live key was written, by [`key_index`].
    written: HashMap<u32, Instant>,
}

/// A reader of the key slots, for a worker. Clones are cheap and see the same memory.
#[derive(Clone)]
pub struct KeyReader {
    slots: Arc<SharedArray<WORDS>>,
    changes: Arc<AtomicU64>,
}

impl KeyWriter {
    /// Maps `len` slots of the map behind `fd`. The caller guarantees that no other writer exists.
    ///
    /// # Errors
    /// The error of mmap(2).
    pub(super) fn map(fd: impl AsFd, len: usize) -> io::Result<Self> {
        Ok(Self { slots: Arc::new(SharedArray::map(fd, len)?), changes: Arc::default(), written: HashMap::new() })
    }

    /// Private slots, for tests of their readers.
    ///
    /// # Panics
    /// If there is no memory.
    #[cfg(any(test, feature = "harness"))]
    pub(crate) fn anonymous(len: usize) -> Self {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

        let file = memfd_create("cipe-keys-test", MemfdFlags::CLOEXEC).expect("memory for keys");
        ftruncate(&file, (len * size_of::<KeySlot>()) as u64).expect("memory for keys");
        Self::map(&file, len).expect("memory for keys")
    }

    /// Leaves a slot in the state of a writer that died while writing.
    #[cfg(test)]
    pub(crate) fn interrupt(&mut self, tunnel: u32, slot: Slot) {
        self.slots[key_index(tunnel, slot) as usize][0].fetch_or(1, Ordering::Relaxed);
    }

    /// A reader of the same slots.
    pub fn reader(&self) -> KeyReader {
        KeyReader { slots: Arc::clone(&self.slots), changes: Arc::clone(&self.changes) }
    }

    /// Puts a live key into a slot.
    ///
    /// # Panics
    /// If the table has no such tunnel.
    pub fn set(&mut self, tunnel: u32, slot: Slot, key: &[u8; KEY]) {
        let (low, high) = halves(key);
        self.write(tunnel, slot, [live_word(1), low, high]);
        self.written.insert(key_index(tunnel, slot), Instant::now());
    }

    /// How long a slot has held its key; `None` for an empty one.
    pub fn age(&self, tunnel: u32, slot: Slot) -> Option<Duration> {
        Some(self.written.get(&key_index(tunnel, slot))?.elapsed())
    }

    /// Empties a slot and erases the key.
    ///
    /// # Panics
    /// If the table has no such tunnel.
    pub fn clear(&mut self, tunnel: u32, slot: Slot) {
        self.write(tunnel, slot, [0; 3]);
        self.written.remove(&key_index(tunnel, slot));
    }

    /// Empties all slots of a tunnel.
    ///
    /// # Panics
    /// If the table has no such tunnel.
    pub fn clear_tunnel(&mut self, tunnel: u32) {
        for slot in [Slot::Static, Slot::Send, Slot::Receive, Slot::Previous] {
            self.clear(tunnel, slot);
        }
    }

    fn write(&mut self, tunnel: u32, slot: Slot, words: [u64; WORDS - 1]) {
        let [generation, content @ ..] = &self.slots[key_index(tunnel, slot) as usize];
        // Odd already if a writer died while writing: this write completes it.
        let odd = generation.load(Ordering::Relaxed) | 1;
        generation.store(odd, Ordering::Relaxed);
        // The odd generation is visible before the first word changes.
        fence(Ordering::Release);
        for (place, word) in content.iter().zip(words) {
            place.store(word, Ordering::Relaxed);
        }
        generation.store(odd.wrapping_add(1), Ordering::Release);
        self.changes.fetch_add(1, Ordering::Release);
    }
}

impl KeyReader {
    /// How often any slot of any tunnel was written: while this value stays the same, so do all slots. To check many
    /// tunnels, read this first: it is a single place, which stays in the cache.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Generation of the slot at [`key_index`]: differs from an earlier value if the key may have changed. Takes one
    /// load, for the check per batch; 0 means never set.
    ///
    /// # Panics
    /// If `index` is not below the number of slots.
    pub fn generation(&self, index: u32) -> u64 {
        self.slots[index as usize][0].load(Ordering::Acquire)
    }

    /// The live key at [`key_index`] with its generation; `None` for an empty slot, and for a slot whose writer has
    /// stopped while writing.
    ///
    /// # Panics
    /// If `index` is not below the number of slots.
    pub fn read(&self, index: u32) -> Option<(u64, Octets)> {
        /// Many more than a writer needs for four stores, unless it lost its CPU: then the caller continues with its
        /// present key and tries again at its next batch.
        const MAX_READ_ATTEMPTS: usize = 1_000;
        let words = &self.slots[index as usize];
        for _ in 0..MAX_READ_ATTEMPTS {
            if let Some((generation, [live, low, high])) = consistent(words) {
                return (live != 0).then(|| (generation, octets(low, high)));
            }
            std::hint::spin_loop();
        }
        None
    }
}

/// One attempt of the sequence lock: `None` if a writer was active.
fn consistent(words: &Words<WORDS>) -> Option<(u64, [u64; WORDS - 1])> {
    let [generation, content @ ..] = words;
    let before = generation.load(Ordering::Acquire);
    let seen = content.each_ref().map(|word: &AtomicU64| word.load(Ordering::Relaxed));
    // Read the words before the generation is read again.
    fence(Ordering::Acquire);
    let after = generation.load(Ordering::Relaxed);
    (before == after && before % 2 == 0).then_some((before, seen))
}

/// The word that `live` and `reserved` share.
fn live_word(live: u32) -> u64 {
    let l = live.to_ne_bytes();
    u64::from_ne_bytes([l[0], l[1], l[2], l[3], 0, 0, 0, 0])
}

fn halves(key: &[u8; KEY]) -> (u64, u64) {
    let [low, high] = [0, 8].map(|at| u64::from_ne_bytes(std::array::from_fn(|i| key[at + i])));
    (low, high)
}

fn octets(low: u64, high: u64) -> Octets {
    let mut octets = Octets::default();
    for (half, word) in octets.as_chunks_mut::<8>().0.iter_mut().zip([low, high]) {
        *half = word.to_ne_bytes();
    }
    octets
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    fn table(slots: usize) -> KeyWriter {
        KeyWriter::anonymous(slots)
    }

    #[test]
    fn a_slot_never_set_has_generation_0_and_no_key() {
        let reader = table(4).reader();
        assert_eq!(reader.generation(0), 0);
        assert!(reader.read(0).is_none());
    }

    #[test]
    fn a_key_is_read_as_it_was_set_under_a_new_even_generation() {
        let mut writer = table(8);
        let reader = writer.reader();
        let key = *b"0123456789abcdef";
        writer.set(1, Slot::Receive, &key);
        let index = key_index(1, Slot::Receive);
        let (generation, read) = reader.read(index).unwrap();
        assert_eq!((**read, generation), (key, reader.generation(index)));
        assert_eq!(generation % 2, 0);
        writer.set(1, Slot::Receive, &key);
        assert_ne!(reader.generation(index), generation);
        for other in (0..8).filter(|i| *i != index) {
            assert!(reader.read(other).is_none());
        }
    }

    #[test]
    fn the_layout_is_that_of_the_map() {
        let mut writer = table(4);
        writer.set(0, Slot::Static, b"0123456789abcdef");
        let octets: Vec<u8> =
            writer.slots[0].iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        assert_eq!(octets[8..12], 1u32.to_ne_bytes());
        assert_eq!(&octets[16..], b"0123456789abcdef");
    }

    #[test]
    fn clearing_leaves_no_octet_of_the_key() {
        let mut writer = table(4);
        let reader = writer.reader();
        writer.set(0, Slot::Send, &[0xAA; KEY]);
        let before = reader.generation(1);
        writer.clear_tunnel(0);
        assert!(reader.read(1).is_none());
        assert!(writer.slots[1][1..].iter().all(|word| word.load(Ordering::Relaxed) == 0));
        assert_ne!(reader.generation(1), before);
    }

    #[test]
    fn every_write_is_a_change_for_all_to_see() {
        let mut writer = table(8);
        let reader = writer.reader();
        let before = reader.changes();
        writer.set(1, Slot::Send, &[1; KEY]);
        let after = reader.changes();
        writer.clear(0, Slot::Send);
        assert!(after != before && reader.changes() != after);
    }

    #[test]
    fn a_write_that_was_cut_off_is_no_key_and_is_mended_by_the_next() {
        let mut writer = table(4);
        let reader = writer.reader();
        writer.interrupt(0, Slot::Static);
        assert!(reader.read(0).is_none());
        writer.set(0, Slot::Static, &[7; KEY]);
        assert_eq!(reader.read(0).map(|(generation, key)| (generation, **key)), Some((2, [7; KEY])));
    }

    #[test]
    fn readers_never_see_half_of_one_key_and_half_of_another() {
        let mut writer = table(4);
        let reader = writer.reader();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let checks = scope.spawn(|| {
                let mut last = 0;
                while !done.load(Ordering::Relaxed) {
                    if let Some((generation, key)) = reader.read(0) {
                        assert!(key.iter().all(|octet| *octet == key[0]), "torn: {key:?}");
                        assert!(generation >= last && generation % 2 == 0);
                        last = generation;
                    }
                }
            });
            for round in 0..200_000u32 {
                writer.set(0, Slot::Static, &[round as u8; KEY]);
                if checks.is_finished() {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
