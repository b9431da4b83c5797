//! The keys of all tunnels, and how long a receive key is kept beside its successor.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cipe_common::maps::{Slot, key_index};

use crate::cipher::Algorithm;
use crate::control::protocol::{KeyOctets, SessionKeys};
use crate::engine::ledger::{Ledger, Use};
use crate::kernel::keys::{KEY, KeyReader, KeyWriter};
use crate::kernel::shields::ShieldWriter;

/// A previous receive key. The time that it is kept begins with the first packet under its successor: until then the peer may still
/// use it, perhaps for ever.
#[derive(Debug)]
struct Previous {
    /// Generation of the receive slot that holds the successor.
    successor: u64,
    /// Whether the peer has ever used it.
    was_used: bool,
    /// How long it is kept once the successor is in use.
    keep: Duration,
    /// When that is over, once it has begun.
    until: Option<Instant>,
}

impl Previous {
    /// Whether its time is over at `now`; `used`: generation of the receive key that the peer began with last.
    fn is_over(&mut self, used: u64, now: Instant) -> bool {
        if used == self.successor {
            self.until.get_or_insert(now + self.keep);
        }
        self.until.is_some_and(|until| until <= now)
    }
}

/// The keys of all tunnels.
pub(super) struct Keyring {
    writer: KeyWriter,
    /// The same keys for the programs, expanded, of shielded tunnels.
    shields: ShieldWriter,
    /// The receive keys before the present ones, while they are kept.
    previous: BTreeMap<u16, Previous>,
}

impl Keyring {
    /// No key yet.
    pub(super) fn new(writer: KeyWriter, shields: ShieldWriter) -> Self {
        Self { writer, shields, previous: BTreeMap::new() }
    }

    /// A reader of the keys, such as the workers have.
    pub(super) fn reader(&self) -> KeyReader {
        self.writer.reader()
    }

    /// Puts a key into a slot of a tunnel.
    pub(super) fn set(&mut self, number: u16, slot: Slot, key: &[u8; KEY]) {
        self.writer.set(number.into(), slot, key);
        self.shields.update(number, &self.writer.reader());
    }

    /// Empties a slot of a tunnel.
    pub(super) fn clear(&mut self, number: u16, slot: Slot) {
        self.writer.clear(number.into(), slot);
        self.shields.update(number, &self.writer.reader());
    }

    /// Empties the slots of a tunnel but that of the static key: it accepts sealed packets only.
    pub(super) fn clear_dynamic(&mut self, number: u16) {
        self.previous.remove(&number);
        [Slot::Send, Slot::Receive, Slot::Previous].into_iter().for_each(|slot| self.writer.clear(number.into(), slot));
        self.shields.update(number, &self.writer.reader());
    }

    /// Empties all slots of a tunnel, and takes its shield.
    pub(super) fn clear_tunnel(&mut self, number: u16) {
        self.previous.remove(&number);
        self.shields.remove(number);
        self.writer.clear_tunnel(number.into());
    }

    /// Gives a tunnel a shield, with its keys from now on, and returns the shield's number; `None` if all shields are in use.
    pub(super) fn shield(&mut self, number: u16, algorithm: Algorithm, carries_ip: bool) -> Option<u32> {
        let is_added = self.shields.add(number, algorithm, carries_ip, &self.writer.reader());
        is_added.then(|| self.shields.number_of(number))
    }

    /// Takes a tunnel's shield.
    pub(super) fn unshield(&mut self, number: u16) {
        self.shields.remove(number);
    }

    /// Whether a tunnel has a shield.
    pub(super) fn is_shielded(&self, number: u16) -> bool {
        self.shields.number_of(number) > 0
    }

    /// How long ago a key was put into a slot.
    pub(super) fn age(&self, number: u16, slot: Slot) -> Option<Duration> {
        self.writer.age(number.into(), slot)
    }

    /// Makes `key` the receive key; the one before it becomes the previous one. A peer may announce several keys before it
    /// uses one, and go on under its old key until then: so a key that it has not used never takes the place of one that it
    /// has. `used`: generation of the receive key that the peer began with last.
    pub(super) fn set_receive_key(&mut self, number: u16, key: &[u8; KEY], keep: Duration, used: u64) {
        let previous = self.previous.remove(&number);
        let previous = set_receive_key(&mut self.writer, number.into(), key, keep, used, previous);
        self.previous.extend(previous.map(|previous| (number, previous)));
        self.shields.update(number, &self.writer.reader());
    }

    /// Goes on under the keys of an engine before this one, which has recorded their use in `ledger`. Returns the generation of the
    /// receive key if the peer has begun to use it, else 0.
    ///
    /// The newest receive key may not be in the ledger: then no packet was ever accepted under it. Of those before it, one that is
    /// not there may have been forgotten, so it is not taken.
    pub(super) fn resume(&mut self, number: u16, keys: &SessionKeys, ledger: &Ledger) -> u64 {
        if let Some(key) = &keys.send {
            self.set(number, Slot::Send, key);
        }
        let Some((newest, older)) = keys.receive.split_first() else { return 0 };
        let packets = |key: &KeyOctets| ledger.packets(Use::Receive, key);
        let recorded = || older.iter().filter_map(|key| Some((key, packets(key)? > 0)));
        let previous = recorded().find(|(_, was_used)| *was_used).or_else(|| recorded().next());
        if let Some((key, _)) = previous {
            self.set(number, Slot::Previous, key);
        }
        self.set(number, Slot::Receive, newest);
        let successor = self.reader().generation(key_index(number.into(), Slot::Receive));
        if let Some((_, was_used)) = previous {
            let keep = Duration::from_millis(keys.keep_ms);
            self.previous.insert(number, Previous { successor, was_used, keep, until: None });
        }
        if packets(newest).is_some_and(|packets| packets > 0) { successor } else { 0 }
    }

    /// Clears the slots of previous keys whose time is over at `now`; `used`: by tunnel, as for [`Self::set_receive_key`].
    pub(super) fn forget_previous(&mut self, used: impl Fn(u16) -> u64, now: Instant) {
        self.previous.retain(|number, previous| {
            let over = previous.is_over(used(*number), now);
            if over {
                self.writer.clear((*number).into(), Slot::Previous);
                self.shields.update(*number, &self.writer.reader());
            }
            !over
        });
    }
}

/// [`Keyring::set_receive_key`] on the slots of one tunnel; returns its previous key, if it has one now. `used`: generation of the
/// receive key that the peer began with last.
fn set_receive_key(
    keys: &mut KeyWriter,
    tunnel: u32,
    key: &[u8; KEY],
    keep: Duration,
    used: u64,
    previous: Option<Previous>,
) -> Option<Previous> {
    let (reader, index) = (keys.reader(), key_index(tunnel, Slot::Receive));
    let Some((generation, old)) = reader.read(index) else {
        keys.set(tunnel, Slot::Receive, key);
        return previous;
    };
    if **old == *key {
        return previous;
    }
    let is_used = used == generation;
    let stays = !is_used && previous.as_ref().is_some_and(|previous| previous.was_used);
    if !stays {
        // In this order: the worker takes the old key's replay filter along to the previous slot.
        keys.set(tunnel, Slot::Previous, &old);
    }
    keys.set(tunnel, Slot::Receive, key);
    let successor = reader.generation(index);
    Some(Previous { successor, was_used: is_used || stays, keep, until: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Duration = Duration::from_secs(20);

    /// The slots of one tunnel, and what the manager knows beside them.
    struct Bed {
        keys: KeyWriter,
        previous: Option<Previous>,
        used: u64,
    }

    impl Bed {
        fn new() -> Self {
            Self { keys: KeyWriter::anonymous(8), previous: None, used: 0 }
        }

        fn announced(&mut self, key: u8) {
            let previous = self.previous.take();
            self.previous = set_receive_key(&mut self.keys, 1, &[key; KEY], KEEP, self.used, previous);
        }

        /// The peer begins with the newest key.
        fn begins(&mut self) {
            self.used = self.keys.reader().generation(key_index(1, Slot::Receive));
        }

        /// The keys that packets are opened under.
        fn opens(&self) -> Vec<u8> {
            let slots = [Slot::Receive, Slot::Previous].into_iter();
            slots.filter_map(|slot| Some(self.keys.reader().read(key_index(1, slot))?.1[0])).collect()
        }
    }

    #[test]
    fn the_key_in_use_stays_however_many_are_announced() {
        let mut bed = Bed::new();
        bed.announced(1);
        bed.begins();
        for key in 2..10 {
            bed.announced(key);
            assert_eq!(bed.opens(), [key, 1]);
            bed.announced(key);
            assert_eq!(bed.opens(), [key, 1], "the same one again");
        }
        bed.begins();
        bed.announced(10);
        assert_eq!(bed.opens(), [10, 9]);
        bed.announced(11);
        assert_eq!(bed.opens(), [11, 9]);
    }

    #[test]
    fn before_any_is_used_the_last_two_are_kept() {
        let mut bed = Bed::new();
        for (key, opens) in [(1, &[1][..]), (2, &[2, 1]), (3, &[3, 2])] {
            bed.announced(key);
            assert_eq!(bed.opens(), opens);
        }
    }

    #[test]
    fn a_previous_key_is_kept_until_its_successor_is_used_and_some_time_longer() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut bed = Bed::new();
        bed.announced(1);
        bed.begins();
        bed.announced(2);
        bed.announced(3);
        let used = bed.used;
        bed.begins();
        let previous = bed.previous.as_mut().unwrap();
        // The peer still uses the key itself, or has used none yet.
        for used in [0, used] {
            assert!(!previous.is_over(used, after(1000)));
        }
        assert!(!previous.is_over(bed.used, after(2000)));
        assert!(!previous.is_over(bed.used, after(2019)));
        assert!(previous.is_over(bed.used, after(2020)));
    }

    /// A keyring after an engine with this ledger died; returns also the generation of the receive key that is in use.
    fn resumed(ledger: &Ledger, receive: &[u8]) -> (Keyring, u64) {
        let mut keyring = Keyring::new(KeyWriter::anonymous(8), ShieldWriter::anonymous());
        let receive = receive.iter().map(|key| KeyOctets::new(&[*key; KEY])).collect();
        let keys = SessionKeys { send: Some(KeyOctets::new(&[9; KEY])), receive, keep_ms: KEEP.as_millis() as u64 };
        let used = keyring.resume(1, &keys, ledger);
        assert_eq!(keyring.reader().read(key_index(1, Slot::Send)).map(|(_, key)| **key), Some([9; KEY]));
        (keyring, used)
    }

    fn slots(keyring: &Keyring) -> [Option<u8>; 2] {
        [Slot::Receive, Slot::Previous].map(|slot| Some(keyring.reader().read(key_index(1, slot))?.1[0]))
    }

    #[test]
    fn after_an_engine_died_its_receive_keys_go_on_as_they_were() {
        let ledger = Ledger::new().unwrap().0;
        let use_key = |key: u8, packets| ledger.open(Use::Receive, &[key; KEY]).account(packets, 0);
        // The first key is in use; of its successors, one has been seen by a worker, and one by nobody.
        use_key(1, 5);
        use_key(2, 0);
        let (keyring, used) = resumed(&ledger, &[3, 2, 1]);
        assert_eq!((slots(&keyring), used), ([Some(3), Some(1)], 0));
        assert!(keyring.previous[&1].was_used);
        // The peer has begun with the newest one.
        use_key(3, 1);
        let (mut keyring, used) = resumed(&ledger, &[3, 2, 1]);
        assert_eq!((slots(&keyring), used), ([Some(3), Some(1)], keyring.previous[&1].successor));
        let now = Instant::now();
        keyring.forget_previous(|_| used, now);
        keyring.forget_previous(|_| used, now + KEEP);
        assert_eq!(slots(&keyring), [Some(3), None]);
    }

    #[test]
    fn a_tunnel_that_leaves_protocol_3_keeps_its_static_key_only() {
        let mut keyring = Keyring::new(KeyWriter::anonymous(8), ShieldWriter::anonymous());
        for slot in [Slot::Static, Slot::Send] {
            keyring.set(1, slot, &[9; KEY]);
        }
        (1..3).for_each(|key| keyring.set_receive_key(1, &[key; KEY], KEEP, 0));
        assert_eq!(slots(&keyring), [Some(2), Some(1)]);
        keyring.clear_dynamic(1);
        let live = |slot| keyring.reader().read(key_index(1, slot)).is_some();
        assert_eq!([Slot::Static, Slot::Send, Slot::Receive, Slot::Previous].map(live), [true, false, false, false]);
        assert!(keyring.previous.is_empty());
    }

    #[test]
    fn a_previous_key_whose_packets_are_not_known_is_not_taken() {
        let ledger = Ledger::new().unwrap().0;
        let (keyring, used) = resumed(&ledger, &[2, 1]);
        assert_eq!((slots(&keyring), used), ([Some(2), None], 0));
        assert_eq!(slots(&resumed(&ledger, &[]).0), [None; 2]);
    }
}
