//! The `SHIELDS` map as memory: the keys of shielded tunnels, expanded for the programs. Only the control thread writes it.
//!
//! A key is in the map only while its tunnel is shielded, and is erased when it is replaced, when it goes, and with the shield.

use std::collections::BTreeMap;
use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use arrayvec::ArrayVec;
use cipe_common::maps::{Slot, key_index};
use cipe_common::shield::{MAX_SHIELDS, Shield, ShieldKey};

use super::keys::KeyReader;
use super::shared::{SharedArray, Words};
use crate::cipher::{Algorithm, Key};

/// 64-bit words of a [`Shield`] and of a [`ShieldKey`].
const WORDS: usize = size_of::<Shield>() / 8;
const KEY: usize = size_of::<ShieldKey>() / 8;
/// Places of words in a [`Shield`] and in a [`ShieldKey`].
const GENERATION: usize = offset_of!(Shield, generation) / 8;
const CIPHER: usize = offset_of!(Shield, cipher) / 8;
const KEYS: usize = offset_of!(Shield, keys) / 8;
const LIVE: usize = offset_of!(ShieldKey, live) / 8;
const KEY_WORDS: usize = offset_of!(ShieldKey, words) / 8;
const _: () = assert!(offset_of!(Shield, carries_ip) == offset_of!(Shield, cipher) + 4 && CIPHER != GENERATION);

/// The slots of the keys in a [`Shield`].
const SLOTS: [Slot; Shield::KEYS] = [Slot::Static, Slot::Receive, Slot::Previous];

/// The only writer of the shields.
pub struct ShieldWriter {
    entries: SharedArray<WORDS>,
    tunnels: BTreeMap<u16, Shielded>,
}

/// A tunnel with a shield.
struct Shielded {
    entry: usize,
    algorithm: Algorithm,
    /// Generations of the keys that were written last.
    seen: [u64; Shield::KEYS],
}

impl ShieldWriter {
    /// Maps the map behind `fd`, and erases what a writer before this one has left. The caller guarantees that no other writer exists.
    ///
    /// # Errors
    /// The error of mmap(2).
    pub(super) fn map(fd: impl AsFd) -> io::Result<Self> {
        let entries = SharedArray::map(fd, MAX_SHIELDS as usize)?;
        let left = |entry: &&Words<WORDS>| entry[CIPHER].load(Ordering::Relaxed) != 0;
        entries.iter().filter(left).for_each(erase);
        Ok(Self { entries, tunnels: BTreeMap::new() })
    }

    /// Private memory, for tests.
    ///
    /// # Panics
    /// If there is no memory.
    #[cfg(test)]
    pub(crate) fn anonymous() -> Self {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

        let file = memfd_create("cipe-shields-test", MemfdFlags::CLOEXEC).expect("memory for shields");
        ftruncate(&file, (MAX_SHIELDS as usize * size_of::<Shield>()) as u64).expect("memory for shields");
        Self::map(&file).expect("memory for shields")
    }

    /// Returns the number of a tunnel's shield in [`Tunnel::shield`](cipe_common::maps::Tunnel::shield); 0 without one.
    pub fn number_of(&self, tunnel: u16) -> u32 {
        self.tunnels.get(&tunnel).map_or(0, |shielded| shielded.entry as u32 + 1)
    }

    /// Writes the keys of a tunnel, now and after each [`Self::update`]. Returns `false` if all shields are in use.
    pub fn add(&mut self, tunnel: u16, algorithm: Algorithm, carries_ip: bool, keys: &KeyReader) -> bool {
        if self.tunnels.contains_key(&tunnel) {
            return true;
        }
        let is_free = |entry: &usize| self.tunnels.values().all(|shielded| shielded.entry != *entry);
        let Some(entry) = (0..MAX_SHIELDS as usize).find(is_free) else { return false };
        let cipher = match algorithm {
            Algorithm::Blowfish => Shield::BLOWFISH,
            Algorithm::Idea => Shield::IDEA,
            Algorithm::IdeaLittle => Shield::IDEA_LITTLE,
        };
        write(&self.entries[entry], |words| words[CIPHER].store(pair(cipher, carries_ip.into()), Ordering::Relaxed));
        self.tunnels.insert(tunnel, Shielded { entry, algorithm, seen: [0; Shield::KEYS] });
        self.update(tunnel, keys);
        true
    }

    /// Writes the keys of a tunnel that have changed, all at once: a key that moves from one slot to another is always in one of them.
    /// Does nothing if the tunnel has no shield.
    pub fn update(&mut self, tunnel: u16, keys: &KeyReader) {
        let Some(Shielded { entry, algorithm, seen }) = self.tunnels.get_mut(&tunnel) else { return };
        let mut changed = ArrayVec::<(usize, Option<Key>), { Shield::KEYS }>::new();
        for (key, (slot, seen)) in SLOTS.into_iter().zip(seen).enumerate() {
            let index = key_index(tunnel.into(), slot);
            let generation = keys.generation(index);
            if std::mem::replace(seen, generation) != generation {
                changed.push((key, keys.read(index).map(|(_, octets)| Key::new(*algorithm, &octets))));
            }
        }
        if !changed.is_empty() {
            write(&self.entries[*entry], |words| {
                changed
                    .iter()
                    .for_each(|(key, expanded)| write_key(&words[KEYS + key * KEY..][..KEY], expanded.as_ref()));
            });
        }
    }

    /// Takes the shield from a tunnel, and erases its keys. Does nothing if it has none.
    pub fn remove(&mut self, tunnel: u16) {
        if let Some(shielded) = self.tunnels.remove(&tunnel) {
            erase(&self.entries[shielded.entry]);
        }
    }
}

/// Changes an entry. A program that reads it meanwhile lets its datagram pass.
fn write(words: &Words<WORDS>, change: impl FnOnce(&Words<WORDS>)) {
    let odd = words[GENERATION].load(Ordering::Relaxed) | 1;
    words[GENERATION].store(odd, Ordering::Relaxed);
    // The odd generation is visible before the first word changes.
    fence(Ordering::Release);
    change(words);
    words[GENERATION].store(odd.wrapping_add(1), Ordering::Release);
}

/// Erases an entry.
fn erase(words: &Words<WORDS>) {
    write(words, |words| {
        let content = words.iter().enumerate().filter(|(place, _)| *place != GENERATION);
        content.for_each(|(_, word)| word.store(0, Ordering::Relaxed));
    });
}

/// Writes an expanded key, or erases the place of one.
fn write_key(words: &[AtomicU64], key: Option<&Key>) {
    words.iter().for_each(|word| word.store(0, Ordering::Relaxed));
    let Some(key) = key else { return };
    key.for_decryption(|place, word| {
        let (place, half) = (KEY_WORDS + place / 2, place % 2);
        let halves = if half == 0 { pair(word, 0) } else { pair(0, word) };
        words[place].fetch_or(halves, Ordering::Relaxed);
    });
    words[LIVE].fetch_or(pair(1, 0), Ordering::Relaxed);
}

/// The 64-bit word of two 32-bit words in memory.
fn pair(first: u32, second: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), second.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

#[cfg(test)]
mod tests {
    use cipe_common::shield;
    use proptest::prelude::*;

    use super::*;
    use crate::cipher::{BLOCK, Job, Lanes};
    use crate::kernel::keys::KeyWriter;

    const TUNNEL: u16 = 3;
    const ALGORITHMS: [Algorithm; 3] = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];

    /// An entry as the programs see it.
    fn entry(shields: &ShieldWriter, number: u32) -> Box<Shield> {
        let words = &shields.entries[number as usize - 1];
        let octets: Vec<u8> = words.iter().flat_map(|word| word.load(Ordering::Relaxed).to_ne_bytes()).collect();
        // SAFETY: there are as many octets as the type has, which is made of integers only.
        Box::new(unsafe { octets.as_ptr().cast::<Shield>().read_unaligned() })
    }

    fn is_empty(shields: &ShieldWriter, number: u32) -> bool {
        let Shield { cipher, carries_ip, keys, .. } = *entry(shields, number);
        (cipher, carries_ip) == (0, 0)
            && keys.iter().all(|key| key.live == 0 && key.words.iter().all(|word| *word == 0))
    }

    #[test]
    fn the_keys_are_those_of_the_slots_and_are_erased_with_them() {
        let (mut keys, mut shields) = (KeyWriter::anonymous(16), ShieldWriter::anonymous());
        let reader = keys.reader();
        keys.set(TUNNEL.into(), Slot::Static, &[1; 16]);
        keys.set(TUNNEL.into(), Slot::Send, &[2; 16]);
        assert_eq!(shields.number_of(TUNNEL), 0);
        assert!(shields.add(TUNNEL, Algorithm::Blowfish, true, &reader));
        let number = shields.number_of(TUNNEL);
        let live = |shields: &ShieldWriter| entry(shields, number).keys.map(|key| key.live);
        assert_eq!(live(&shields), [1, 0, 0]);
        assert_eq!((entry(&shields, number).cipher, entry(&shields, number).carries_ip), (Shield::BLOWFISH, 1));
        keys.set(TUNNEL.into(), Slot::Receive, &[3; 16]);
        keys.set(TUNNEL.into(), Slot::Previous, &[4; 16]);
        assert_eq!(live(&shields), [1, 0, 0]);
        let before = entry(&shields, number).generation;
        shields.update(TUNNEL, &reader);
        assert_eq!(entry(&shields, number).generation, before + 2, "a program saw one of two changes");
        shields.update(TUNNEL, &reader);
        assert_eq!(entry(&shields, number).generation, before + 2);
        assert_eq!(live(&shields), [1, 1, 1]);
        keys.clear(TUNNEL.into(), Slot::Previous);
        shields.update(TUNNEL, &reader);
        assert_eq!(live(&shields), [1, 1, 0]);
        assert!(entry(&shields, number).keys[2].words.iter().all(|word| *word == 0));
        let before = entry(&shields, number).generation;
        shields.remove(TUNNEL);
        assert!(is_empty(&shields, number) && shields.number_of(TUNNEL) == 0);
        let after = entry(&shields, number).generation;
        assert!(after != before && after.is_multiple_of(2));
    }

    #[test]
    fn the_keys_of_a_writer_that_died_are_erased_by_the_next() {
        use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

        let file = memfd_create("cipe-shields-test", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, (MAX_SHIELDS as usize * size_of::<Shield>()) as u64).unwrap();
        let mut keys = KeyWriter::anonymous(16);
        keys.set(TUNNEL.into(), Slot::Static, &[1; 16]);
        let mut shields = ShieldWriter::map(&file).unwrap();
        assert!(shields.add(TUNNEL, Algorithm::Idea, true, &keys.reader()));
        let number = shields.number_of(TUNNEL);
        assert!(!is_empty(&shields, number));
        drop(shields);
        assert!(is_empty(&ShieldWriter::map(&file).unwrap(), number));
    }

    #[test]
    fn there_is_a_bounded_number_of_shields() {
        let (keys, mut shields) = (KeyWriter::anonymous(4 * (MAX_SHIELDS as usize + 1)), ShieldWriter::anonymous());
        let reader = keys.reader();
        for tunnel in 0..MAX_SHIELDS as u16 {
            assert!(shields.add(tunnel, Algorithm::Idea, true, &reader));
        }
        assert!(!shields.add(MAX_SHIELDS as u16, Algorithm::Idea, true, &reader));
        assert!(shields.add(0, Algorithm::Idea, true, &reader));
        shields.remove(7);
        assert!(shields.add(MAX_SHIELDS as u16, Algorithm::Idea, true, &reader));
        assert_eq!(shields.number_of(MAX_SHIELDS as u16), 8);
    }

    proptest! {
        #[test]
        fn blocks_are_decrypted_as_by_the_engine(octets in any::<[u8; 16]>(), blocks in any::<[[u8; BLOCK]; 2]>()) {
            let (mut keys, mut shields) = (KeyWriter::anonymous(16), ShieldWriter::anonymous());
            keys.set(TUNNEL.into(), Slot::Receive, &octets);
            let mut lanes = Lanes::with(Some("scalar"), Some("scalar"));
            for algorithm in ALGORITHMS {
                assert!(shields.add(TUNNEL, algorithm, true, &keys.reader()));
                let entry = entry(&shields, shields.number_of(TUNNEL));
                let mut expected = blocks;
                let key = Key::new(algorithm, &octets);
                for data in &mut expected {
                    lanes.decrypt(&mut [Job { key: &key, iv: [0; BLOCK], data }]);
                }
                prop_assert_eq!(shield::decrypt(entry.cipher, &entry.keys[1].words, blocks), expected, "{:?}", algorithm);
                shields.remove(TUNNEL);
            }
        }
    }
}
