use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::cipher::{Algorithm, Key};
use crate::engine::carrier::Via;
use crate::engine::carrier::outer::FRESH;
use crate::engine::datapath::pair::NO_LIMITS;
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::{Head, Tunnel};
use crate::inner::checksum::Sum;
use crate::inner::headers::Headers;
use crate::inner::test_packets::Flow;
use crate::kernel::keys::{KEY, KeyWriter};
use crate::wire::message::Message;
use crate::wire::packet::{self, KeyKind, Type};
use crate::xsk::{Pool, UmemConfig};

/// A tunnel with a previous key, and one that still has its first key.
const CHANGED: u16 = 0;
const FIRST: u16 = 1;

/// The key that a datagram is sealed with, and whether it is a replay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Under {
    Static,
    Previous,
    Current,
    /// A key that the tunnel does not have.
    Foreign,
    /// The previous key; the datagram is a replay.
    PreviousAgain,
}

use Under::{Current, Foreign, Previous, PreviousAgain, Static};

impl Under {
    fn kind(self) -> KeyKind {
        if self == Static { KeyKind::Static } else { KeyKind::Dynamic }
    }

    fn key(self, tunnel: u16) -> [u8; KEY] {
        let number = match self {
            Static => 1,
            Previous | PreviousAgain => 2,
            Current => 3,
            Foreign => 4,
        };
        [number + 16 * tunnel as u8; KEY]
    }
}

struct Bed {
    algorithm: Algorithm,
    umem: Umem,
    pool: Pool,
    lanes: Lanes,
    tunnels: TunnelTable<Tunnel>,
    _writer: KeyWriter,
}

impl Bed {
    fn new(algorithm: Algorithm) -> Self {
        let mut writer = KeyWriter::anonymous(8);
        let (umem, pool) = Umem::new(UmemConfig { frames: 2048, ..UmemConfig::default() }).unwrap();
        let mut tunnels = TunnelTable::default();
        let start = Instant::now();
        for number in [CHANGED, FIRST] {
            let mut keys = Keys::alone(algorithm, writer.reader(), number);
            let slot_of = u32::from(number);
            writer.set(slot_of, Slot::Static, &Static.key(number));
            if number == CHANGED {
                writer.set(slot_of, Slot::Receive, &Previous.key(number));
                keys.refresh(start);
                writer.set(slot_of, Slot::Previous, &Previous.key(number));
            }
            writer.set(slot_of, Slot::Receive, &Current.key(number));
            keys.refresh(start + Duration::from_nanos(1));
            let tunnel = Tunnel::with_keys(number, keys, NO_LIMITS);
            tunnels.insert(number, tunnel);
        }
        Self { algorithm, umem, pool, lanes: Lanes::new(), tunnels, _writer: writer }
    }

    /// A datagram as it comes from the carrier, of a payload that tells its number, in a frame.
    fn incoming(&mut self, tunnel: u16, under: Under, number: usize) -> Incoming {
        let inner = inner(number);
        let mut frame = self.pool.take().unwrap();
        let at = FRESH - packet::IV;
        let place = at..at + packet::sealed_len(inner.len());
        let chunk = self.umem.chunk_mut(&mut frame);
        // The opener must not write outside of the datagram.
        chunk.fill(0xEE);
        let datagram = &mut chunk[place.clone()];
        datagram[packet::IV..][..inner.len()].copy_from_slice(&inner);
        let iv = under.kind().mark(std::array::from_fn(|i| (number >> (8 * (i % 2))) as u8));
        packet::frame(datagram, inner.len(), Type::Data, iv, [0x5A; 7]);
        let key = Key::new(self.algorithm, &under.key(tunnel));
        self.lanes.encrypt(&mut [packet::job(&key, datagram).unwrap()]);
        let head: Head = *datagram.first_chunk().unwrap();
        let slot = Some(if under == Static { Slot::Static } else { Slot::Receive });
        let from = SocketAddr::from((Ipv4Addr::LOCALHOST, number as u16));
        Incoming { tunnel, frame, datagram: place, from, tos: 0, head, slot, via: Via::Card }
    }

    fn open(&mut self, incoming: &mut [Incoming]) -> Vec<Result<Opened, Verdict>> {
        let mut opened = Vec::new();
        let mut opener = Opener { tunnels: &self.tunnels, umem: &self.umem, lanes: &mut self.lanes };
        opener.decrypt(incoming);
        opener.judge_all(incoming, &mut opened);
        opened
    }

    fn accepted(&self, tunnel: u16, slot: Slot) -> u64 {
        self.tunnels.get(&tunnel).unwrap().keys.get(slot).map_or(0, |live| live.packets())
    }
}

/// Returns an inner packet that holds its number. The number also determines its length.
fn inner(number: usize) -> Vec<u8> {
    let payload: Vec<u8> = number.to_be_bytes().into_iter().cycle().take(8 + number % 97).collect();
    Flow::udp4().packet(&payload)
}

/// Opens a batch. Asserts the outcome of each datagram, how many each key has accepted, and that no other octet changed.
fn each_as_it_should_be(algorithm: Algorithm, batch: &[(u16, Under)]) {
    let mut bed = Bed::new(algorithm);
    let mut incoming = Vec::new();
    let mut last_previous = None;
    for (index, (tunnel, under)) in batch.iter().enumerate() {
        // A replay has the number of the last datagram under the previous key.
        let number = if *under == PreviousAgain { last_previous.unwrap() } else { index };
        if *under == Previous && *tunnel == CHANGED {
            last_previous = Some(number);
        }
        incoming.push(bed.incoming(*tunnel, *under, number));
    }
    let opened = bed.open(&mut incoming);
    assert_eq!(opened.len(), batch.len());
    for (index, ((tunnel, under), opened)) in batch.iter().zip(&opened).enumerate() {
        let (what, item) = (format!("{index}: {under:?} of {tunnel}"), &incoming[index]);
        let expected = match (*under, *tunnel) {
            (Static, _) => Ok(Slot::Static),
            (Current, _) => Ok(Slot::Receive),
            (Previous, CHANGED) => Ok(Slot::Previous),
            (PreviousAgain, CHANGED) => Err(Verdict::Replayed),
            _ => Err(Verdict::BadCrc),
        };
        match (opened, expected) {
            (Ok(Opened::Data(place, headers)), Ok(slot)) => {
                assert_eq!(item.slot, Some(slot), "{what}");
                let chunk = bed.umem.chunk(&item.frame);
                assert!(chunk[item.datagram.clone()][place.clone()] == inner(index), "{what}");
                assert_eq!(headers.ip(), Headers::parse(&inner(index)).as_ref().ok(), "{what}");
            }
            (Err(verdict), Err(expected)) => assert_eq!(*verdict, expected, "{what}"),
            other => panic!("{what}: {other:?}"),
        }
        let chunk = bed.umem.chunk(&item.frame);
        let around = chunk[..item.datagram.start].iter().chain(&chunk[item.datagram.end..]);
        assert!(around.eq(std::iter::repeat_n(&0xEE, chunk.len() - item.datagram.len())), "{what}: around it");
    }
    for tunnel in [CHANGED, FIRST] {
        for (slot, under) in [(Slot::Static, Static), (Slot::Receive, Current), (Slot::Previous, Previous)] {
            let due = batch.iter().filter(|item| **item == (tunnel, under)).count();
            let due = if slot == Slot::Previous && tunnel == FIRST { 0 } else { due };
            assert_eq!(bed.accepted(tunnel, slot), due as u64, "{slot:?} of {tunnel}");
        }
    }
    incoming.into_iter().for_each(|item| bed.pool.put(item.frame));
    assert_eq!(bed.pool.free(), bed.pool.total());
}

const ALGORITHMS: [Algorithm; 3] = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];

#[test]
fn packets_of_the_previous_key_amid_those_of_the_new_one_are_all_delivered() {
    for algorithm in ALGORITHMS {
        let mut batch = [(CHANGED, Current); BATCH];
        batch[40..90].fill((CHANGED, Previous));
        each_as_it_should_be(algorithm, &batch);
    }
}

#[test]
fn one_packet_of_the_previous_key_anywhere_in_a_batch_is_delivered() {
    for at in [0, 1, 63, 64, BATCH - 1] {
        let mut batch = [(CHANGED, Current); BATCH];
        batch[at] = (CHANGED, Previous);
        each_as_it_should_be(Algorithm::Blowfish, &batch);
    }
}

#[test]
fn more_packets_of_the_previous_key_than_the_ciphers_take_at_once_are_all_delivered() {
    for count in [BATCH - 1, BATCH, BATCH + 1, 3 * BATCH, 3 * BATCH + 7] {
        each_as_it_should_be(Algorithm::Idea, &vec![(CHANGED, Previous); count]);
        let mut batch = vec![(CHANGED, Previous); count];
        batch.extend(vec![(CHANGED, Current); count]);
        each_as_it_should_be(Algorithm::Blowfish, &batch);
    }
}

#[test]
fn keys_and_tunnels_in_turn_and_what_no_key_opens_are_told_apart() {
    const TURNS: [(u16, Under); 11] = [
        (CHANGED, Current),
        (FIRST, Current),
        (CHANGED, Previous),
        (CHANGED, Previous),
        (CHANGED, PreviousAgain),
        (FIRST, Previous),
        (CHANGED, Foreign),
        (CHANGED, Static),
        (FIRST, Foreign),
        (FIRST, Static),
        (CHANGED, Current),
    ];
    for algorithm in ALGORITHMS {
        for count in [TURNS.len(), BATCH, 3 * BATCH + 5] {
            let batch: Vec<_> = TURNS.iter().copied().cycle().take(count).collect();
            each_as_it_should_be(algorithm, &batch);
        }
    }
}

/// Genuine datagrams and others are told apart by two blocks, and the key of each genuine one is found.
#[test]
fn the_sieve_keeps_all_that_a_key_opens_and_little_else() {
    for algorithm in ALGORITHMS {
        let mut bed = Bed::new(algorithm);
        let under = |number: usize| match number % 7 {
            0 => (CHANGED, Current),
            1 => (CHANGED, Previous),
            2 => (CHANGED, Static),
            3 => (FIRST, Current),
            4 => (FIRST, Previous),
            _ => (CHANGED, Foreign),
        };
        let count = 10 * BATCH + 5;
        let mut incoming: Vec<_> =
            (0..count).map(|number| bed.incoming(under(number).0, under(number).1, number)).collect();
        let mut opener = Opener { tunnels: &bed.tunnels, umem: &bed.umem, lanes: &mut bed.lanes };
        let refused = opener.sieve(&mut incoming);
        assert_eq!(refused.len() + incoming.len(), count);
        let number = |item: &Incoming| usize::from(item.from.port());
        for item in &refused {
            assert!(matches!(under(number(item)), (_, Foreign) | (FIRST, Previous)), "{}", number(item));
        }
        let by_no_key = (0..count).filter(|number| number % 7 >= 4).count();
        assert!(refused.len() + 10 > by_no_key, "{} of {by_no_key}", refused.len());
        assert!(incoming.is_sorted_by_key(number));
        let numbers: Vec<_> = incoming.iter().map(number).collect();
        let opened = bed.open(&mut incoming);
        for ((number, item), opened) in numbers.into_iter().zip(&incoming).zip(&opened) {
            let expected = match under(number) {
                (_, Static) => Some(Slot::Static),
                (_, Current) => Some(Slot::Receive),
                (CHANGED, Previous) => Some(Slot::Previous),
                _ => None,
            };
            assert_eq!(opened.is_ok(), expected.is_some(), "{number}");
            assert!(expected.is_none() || item.slot == expected, "{number}");
        }
        refused.into_iter().chain(incoming).for_each(|item| bed.pool.put(item.frame));
    }
}

#[test]
fn the_sieve_leaves_datagrams_without_a_cipher_or_key_alone() {
    let mut bed = Bed::new(Algorithm::Blowfish);
    let mut incoming = vec![bed.incoming(CHANGED, Foreign, 1), bed.incoming(CHANGED, Foreign, 2)];
    incoming[0].slot = None;
    incoming[1].slot = Some(Slot::Send);
    let mut opener = Opener { tunnels: &bed.tunnels, umem: &bed.umem, lanes: &mut bed.lanes };
    assert!(opener.sieve(&mut incoming).is_empty());
    assert_eq!(incoming.len(), 2);
}

/// The payload of a genuine packet, and what is nearly one.
fn contents() -> impl Strategy<Value = Vec<u8>> {
    let lengths = prop_oneof![0usize..120, 0usize..1500];
    let first = prop_oneof![Just(0x45u8), Just(0x46), Just(0x4F), Just(0x60), 0x70u8..0x78, 0u8..4, any::<u8>()];
    (lengths, first, prop::collection::vec(any::<u8>(), 40), any::<bool>()).prop_map(|(len, first, start, is_right)| {
        let mut payload = start;
        payload[0] = first;
        payload.resize(len, 0x5A);
        if is_right && first >> 4 == 6 && len >= 40 {
            payload[4..6].copy_from_slice(&(len as u16 - 40).to_be_bytes());
        }
        if is_right && first >> 4 == 4 && len >= 20 {
            payload[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            payload[6..12].fill(0);
            let header = (usize::from(first & 15) * 4).clamp(20, len);
            let mut sum = Sum::default();
            sum.add(&payload[..header]);
            payload[10..12].copy_from_slice(&sum.checksum());
        }
        payload
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_096))]
    #[test]
    fn what_the_whole_check_accepts_passes_the_sieve(payload in contents(), control in any::<bool>(), ethernet in any::<bool>()) {
        let tunnel = |protocol| {
            let keys = Keys::alone(Algorithm::Idea, KeyWriter::anonymous(4).reader(), 0);
            Tunnel { protocol, ..Tunnel::with_keys(0, keys, NO_LIMITS) }
        };
        let key = Key::new(Algorithm::Idea, &[5; KEY]);
        let mut lanes = Lanes::with(Some("scalar"), Some("scalar"));
        let kind = if control { Type::Control } else { Type::Data };
        let mut datagram = vec![0; packet::sealed_len(payload.len())];
        datagram[packet::IV..][..payload.len()].copy_from_slice(&payload);
        packet::seal(&mut lanes, &key, &mut datagram, payload.len(), kind, [0x93; 8], [0x5A; 7]);
        let head = *datagram.first_chunk().unwrap();
        let mut ends = Ends::of(&datagram).unwrap();
        lanes.decrypt(&mut ends.jobs(&key));
        lanes.decrypt(&mut [packet::job(&key, &mut datagram).unwrap()]);
        let tunnel = tunnel(if ethernet { Protocol::Ethernet } else { Protocol::Ip });
        let is_accepted = match tunnel.judge(&datagram, &head, Slot::Receive) {
            Ok(Opened::Control(place)) => Message::parse(&datagram[place]).is_ok(),
            opened => opened.is_ok(),
        };
        prop_assert!(!is_accepted || ends.are_possible(!ethernet));
    }
}

/// The previous key keeps its replay window: packets that it accepted before the key change are replays after it.
#[test]
fn a_packet_received_before_a_key_change_is_a_replay_after_it() {
    let mut bed = Bed::new(Algorithm::Blowfish);
    let mut first = vec![bed.incoming(CHANGED, Previous, 7)];
    assert!(bed.open(&mut first)[0].is_ok());
    let mut again = vec![bed.incoming(CHANGED, Previous, 7), bed.incoming(CHANGED, Previous, 8)];
    let opened = bed.open(&mut again);
    assert_eq!(opened[0], Err(Verdict::Replayed));
    assert!(opened[1].is_ok());
    assert_eq!(bed.accepted(CHANGED, Slot::Previous), 2);
}
