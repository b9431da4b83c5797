use std::collections::VecDeque;
use std::net::SocketAddr;

use cipe_common::Verdict;
use cipe_common::maps::Slot;
use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::pair::{Datagram, End, Pair};
use crate::cipher::Algorithm;
use crate::control::protocol::{Event, Protocol, Wanted};
use crate::engine::report::WorkerReport;
use crate::inner::test_packets::Flow;
use crate::kernel::keys::KEY;

const KEYS: [[u8; KEY]; 2] = [[1; KEY], [2; KEY]];

fn pair() -> Pair {
    let mut pair = Pair::new(Algorithm::Blowfish, Protocol::Ip).unwrap();
    pair.change_key(&KEYS[0], None);
    pair
}

fn udp(octets: usize) -> Vec<u8> {
    Flow { dont_fragment: false, ..Flow::udp4() }.packet(&vec![7; octets])
}

fn counted(end: &End, verdict: Verdict) -> u64 {
    end.counters().of(verdict)
}

/// Queues one frame that may not be sent. Asserts that nothing is sent, and the verdict of all its packets.
fn refused(pair: &mut Pair, packet: &[u8], gso_size: u16, verdict: Verdict, packets: u64) {
    let before = (counted(&pair.a, verdict), pair.a.accounted());
    assert!(pair.a.push(packet, gso_size));
    assert!(pair.a.seal().is_empty(), "{verdict:?}");
    assert_eq!(counted(&pair.a, verdict) - before.0, packets, "{verdict:?}");
    assert_eq!(pair.a.accounted() - before.1, packets, "{verdict:?} alone");
    pair.assert_frames_are_back();
}

mod outbound {
    use super::*;

    #[test]
    fn each_frame_that_may_not_go_out_is_under_its_verdict() {
        let mut pair = pair();
        refused(&mut pair, b"", 0, Verdict::PrivateNotIp, 1);
        refused(&mut pair, &[0x50; 100], 0, Verdict::PrivateNotIp, 1);
        let mut packet = udp(100);
        packet[3] += 1;
        refused(&mut pair, &packet, 0, Verdict::PrivateMalformed, 1);
        refused(&mut pair, &packet, 10, Verdict::PrivateMalformed, 1);
        pair.a.tunnel().peer = None;
        refused(&mut pair, &udp(100), 0, Verdict::NoPeer, 1);
        refused(&mut pair, &udp(100), 10, Verdict::NoPeer, 10);
    }

    #[test]
    fn without_a_key_nothing_leaves_and_one_is_asked_for_once() {
        let mut pair = Pair::new(Algorithm::Blowfish, Protocol::Ip).unwrap();
        refused(&mut pair, &udp(100), 0, Verdict::NoSendKey, 1);
        refused(&mut pair, &udp(100), 25, Verdict::NoSendKey, 4);
        assert!(matches!(
            pair.a.reports.try_recv(),
            Ok((0, WorkerReport::Event(Event::KeyWanted { reason: Wanted::NoSendKey })))
        ));
        assert!(pair.a.reports.try_recv().is_err());
    }

    #[test]
    fn a_key_that_goes_between_two_batches_is_used_no_more() {
        let mut pair = pair();
        pair.a.push(&udp(10), 0);
        assert_eq!(pair.a.seal().len(), 1);
        pair.a.clear_key(Slot::Send);
        refused(&mut pair, &udp(10), 0, Verdict::NoSendKey, 1);
    }

    #[test]
    fn what_is_too_large_and_must_not_be_cut_is_told_to_its_sender() {
        let mut pair = pair();
        let packet = Flow::udp4().packet(&[7; 1500]);
        refused(&mut pair, &packet, 0, Verdict::TooBig, 1);
        let messages: Vec<_> = pair.a.datapath.too_big.take().collect();
        assert_eq!(messages.len(), 1);
        assert_eq!(messages[0].to, Flow::udp4().source);
        assert_eq!(messages[0].octets[6..8], 1442_u16.to_be_bytes());
    }

    #[test]
    fn a_superframe_of_segments_that_are_too_large_ends_whole_and_is_told_once() {
        let mut pair = pair();
        let packet = Flow::tcp4().packet(&[7; 16_000]);
        refused(&mut pair, &packet, 1600, Verdict::TooBig, 10);
        assert_eq!(pair.a.datapath.too_big.take().count(), 1);
    }

    #[test]
    fn of_a_superframe_with_too_few_frames_each_segment_is_counted() {
        const SEGMENTS: usize = 48;
        const FREE: usize = 10;
        let mut pair = pair();
        let packet = Flow::tcp4().packet(&vec![7; SEGMENTS * 1000]);
        assert!(pair.a.push(&packet, 1000));
        let pool = &mut pair.a.datapath.pool;
        let held: Vec<_> = (FREE..pool.free()).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pair.a.seal().len(), FREE);
        held.into_iter().for_each(|frame| pair.a.datapath.pool.put(frame));
        assert_eq!(counted(&pair.a, Verdict::Sent), FREE as u64);
        assert_eq!(counted(&pair.a, Verdict::NoFrame), (SEGMENTS - FREE) as u64);
        assert_eq!(pair.a.accounted(), SEGMENTS as u64);
        pair.assert_frames_are_back();
    }

    #[test]
    fn a_packet_that_is_too_large_and_may_be_cut_arrives_in_fragments() {
        let mut pair = pair();
        pair.a.push(&udp(1600), 0);
        let sealed = pair.a.seal();
        assert_eq!(sealed.len(), 2);
        let Pair { a, b } = &mut pair;
        let fragments = b.receive(a, &sealed);
        assert_eq!(fragments.iter().map(|fragment| fragment.len() - 20).sum::<usize>(), 1608);
    }

    #[test]
    fn a_frame_whose_end_is_missing_gives_its_memory_back() {
        let mut pair = pair();
        pair.a.push(&udp(5000), 0);
        pair.a.drop_last_piece();
        assert!(pair.a.seal().is_empty());
        pair.assert_frames_are_back();
    }
}

mod inbound {
    use super::*;

    fn sealed(pair: &mut Pair) -> Datagram {
        pair.a.push(&udp(100), 0);
        pair.a.seal().remove(0)
    }

    /// Receives one datagram that is not delivered. Asserts its verdict.
    fn dropped(pair: &mut Pair, from: SocketAddr, datagram: &Datagram, verdict: Verdict) {
        let before = (counted(&pair.b, verdict), pair.b.accounted());
        pair.b.push_datagram(from, datagram);
        pair.b.open();
        assert_eq!(pair.b.device.frames.len(), 0, "{verdict:?}");
        assert_eq!(counted(&pair.b, verdict) - before.0, 1, "{verdict:?}");
        assert_eq!(pair.b.accounted() - before.1, 1, "{verdict:?} alone");
        pair.assert_frames_are_back();
    }

    #[test]
    fn each_datagram_that_is_not_delivered_is_under_its_verdict() {
        let mut pair = pair();
        let peer = pair.a.me();
        let good = sealed(&mut pair);
        let with = |octets: Vec<u8>| Datagram { octets, tos: 0 };
        for short in [0, 1, 8, 15, 17] {
            let octets = good.octets[..short].to_vec();
            dropped(&mut pair, peer, &with(octets), Verdict::BadLength);
        }
        dropped(&mut pair, peer, &with(vec![0xFF; 3000]), Verdict::BadLength);
        dropped(&mut pair, peer, &with(vec![0; 64]), Verdict::ClearControl);
        dropped(&mut pair, peer, &with(vec![0xFF; 64]), Verdict::BadCrc);
        let (a, b) = (&mut pair.a, &mut pair.b);
        assert_eq!(b.receive(a, std::slice::from_ref(&good)), [udp(100)]);
        dropped(&mut pair, peer, &good, Verdict::Replayed);
        let marked = Datagram { tos: 3, ..sealed(&mut pair) };
        dropped(&mut pair, peer, &marked, Verdict::CongestionDrop);
        let fresh = sealed(&mut pair);
        pair.b.tunnel().pinned = true;
        dropped(&mut pair, SocketAddr::from(([192, 0, 2, 9], 1)), &fresh, Verdict::WrongPeer);
        pair.b.clear_key(Slot::Receive);
        dropped(&mut pair, peer, &fresh, Verdict::NoReceiveKey);
    }

    #[test]
    fn a_datagram_to_another_address_is_no_tunnels() {
        let mut pair = pair();
        let (good, me) = (sealed(&mut pair), pair.b.me());
        pair.b.datapath.remove_address(&me);
        pair.b.push_datagram(pair.a.me(), &good);
        pair.b.open();
        assert_eq!(pair.b.accounted(), 0);
        pair.assert_frames_are_back();
    }

    #[test]
    fn a_message_that_the_daemon_has_no_room_for_is_counted() {
        let mut pair = pair();
        let message = super::super::ControlMessage {
            octets: [0x10; 80][..].into(),
            under: crate::control::protocol::Under::Live,
            announces: false,
        };
        pair.b.fill_reports();
        for verdict in [Verdict::ControlFull, Verdict::ControlReceived] {
            let sealed = pair.a.seal_message(&message);
            assert_eq!(sealed.len(), 1);
            let (a, b) = (&pair.a, &mut pair.b);
            assert!(b.receive(a, &sealed).is_empty());
            assert_eq!(counted(b, verdict), 1);
            while b.reports.try_recv().is_ok() {}
        }
        pair.assert_frames_are_back();
    }

    /// A message may hold a key, also one that comes twice.
    #[test]
    fn no_frame_keeps_a_message() {
        let mut pair = pair();
        let secret = [0xC5; 80];
        let octets = [&[0x10][..], &secret].concat().as_slice().into();
        let message =
            super::super::ControlMessage { octets, under: crate::control::protocol::Under::Live, announces: false };
        let sealed = pair.a.seal_message(&message);
        for verdict in [Verdict::ControlReceived, Verdict::Replayed] {
            let (a, b) = (&pair.a, &mut pair.b);
            assert!(b.receive(a, &sealed).is_empty());
            assert_eq!(counted(b, verdict), 1);
            let datapath = &mut b.datapath;
            let frames: Vec<_> = std::iter::from_fn(|| datapath.pool.take()).collect();
            for frame in &frames {
                let holds = datapath.umem.chunk(frame).windows(secret.len()).any(|octets| octets == secret);
                assert!(!holds, "after {verdict:?}");
            }
            frames.into_iter().for_each(|frame| datapath.pool.put(frame));
        }
    }
}

mod flood {
    use super::*;

    /// A datagram of noise under the dynamic flag.
    fn noise(rng: &mut StdRng) -> Datagram {
        let mut octets: Vec<u8> = (0..72).map(|_| rng.random()).collect();
        octets[0] |= 0x80;
        Datagram { octets, tos: 0 }
    }

    #[test]
    fn amid_noise_each_genuine_packet_is_delivered_under_either_key_and_each_datagram_is_counted() {
        let mut pair = pair();
        let mut rng = StdRng::seed_from_u64(14);
        let (mut sent, mut noises) = (0, 0);
        for round in 0..20 {
            pair.a.push(&udp(round + 1), 0);
            let old = pair.a.seal();
            if round % 5 == 4 {
                let [last, next] = [KEYS[(round / 5) % 2], KEYS[(round / 5 + 1) % 2]];
                pair.change_key(&next, Some(&last));
            }
            pair.a.push(&udp(round + 1), 0);
            let mut line: Vec<_> = (0..100).map(|_| noise(&mut rng)).collect();
            noises += line.len() as u64;
            line.insert(30, pair.a.seal().remove(0));
            line.push(old.into_iter().next().unwrap());
            let (a, b) = (&pair.a, &mut pair.b);
            assert_eq!(b.receive(a, &line).len(), 2, "round {round}");
            sent += 2;
            assert_eq!(counted(&pair.b, Verdict::Delivered), sent);
            assert_eq!(counted(&pair.b, Verdict::BadCrc), noises);
            assert_eq!(pair.b.accounted(), sent + noises);
            pair.assert_frames_are_back();
        }
        assert!(pair.b.datapath.suspicion.is_on());
        assert_eq!(pair.b.datapath.take_authentic().by_card, sent, "noise is not authentic");
    }

    #[test]
    fn a_key_in_use_opens_packets_however_many_others_are_announced() {
        let mut pair = pair();
        for announced in 1..20 {
            pair.b.set_key(Slot::Previous, &KEYS[0]);
            pair.b.set_key(Slot::Receive, &[0x60 + announced; KEY]);
            pair.a.push(&udp(announced.into()), 0);
            let sealed = pair.a.seal();
            let (a, b) = (&pair.a, &mut pair.b);
            assert_eq!(b.receive(a, &sealed).len(), 1, "after {announced} announcements");
        }
    }

    #[test]
    fn a_flood_of_messages_in_clear_is_reported_and_a_few_are_not() {
        let mut pair = pair();
        let clear = |pair: &mut Pair, count: usize| {
            let with = |octets| Datagram { octets, ..noise(&mut StdRng::seed_from_u64(16)) };
            let line: Vec<_> = (0..count).map(|_| with(vec![0; 64])).collect();
            let (a, b) = (&pair.a, &mut pair.b);
            b.receive(a, &line);
            let reports: Vec<_> = std::iter::from_fn(|| b.reports.try_recv().ok()).collect();
            reports.iter().any(|(_, report)| matches!(report, WorkerReport::Flooded))
        };
        for _ in 0..100 {
            assert!(!clear(&mut pair, 50));
            pair.b.pass(std::time::Duration::from_secs(1));
        }
        assert!(clear(&mut pair, 100));
        assert_eq!(counted(&pair.b, Verdict::ClearControl), 5_100);
    }

    #[test]
    fn a_key_that_opens_nothing_is_asked_for_during_a_flood_too() {
        let mut pair = pair();
        let mut rng = StdRng::seed_from_u64(15);
        for _ in 0..3 {
            let line: Vec<_> = (0..200).map(|_| noise(&mut rng)).collect();
            let (a, b) = (&pair.a, &mut pair.b);
            b.receive(a, &line);
            b.pass(std::time::Duration::from_secs(1));
        }
        assert!(pair.b.datapath.suspicion.is_on());
        let wanted = |(_, report): &(u16, WorkerReport)| {
            matches!(report, WorkerReport::Event(Event::KeyWanted { reason: Wanted::Undecryptable }))
        };
        let reports: Vec<_> = std::iter::from_fn(|| pair.b.reports.try_recv().ok()).collect();
        assert!(reports.iter().any(|(_, report)| matches!(report, WorkerReport::Flooded)));
        assert_eq!(reports.iter().filter(|report| wanted(report)).count(), 1);
    }
}

mod delivery {
    use super::*;

    fn segments(pair: &mut Pair) -> Vec<Datagram> {
        pair.a.push(&Flow::tcp4().packet(&[7; 10_000]), 1000);
        pair.a.seal()
    }

    #[test]
    fn what_was_a_superframe_is_one_again_and_its_segments_are_octet_for_octet() {
        let mut pair = pair();
        let sealed = segments(&mut pair);
        let (a, b) = (&pair.a, &mut pair.b);
        let packets = b.receive(a, &sealed);
        assert!(packets == Flow::tcp4().segments(&[7; 10_000], 1000));
        assert_eq!((b.device.superframes, counted(b, Verdict::Delivered)), (1, 10));
    }

    #[test]
    fn a_device_that_refuses_superframes_gets_single_packets() {
        let mut pair = pair();
        let sealed = segments(&mut pair);
        pair.b.device.refuses = true;
        let (a, b) = (&pair.a, &mut pair.b);
        assert!(b.receive(a, &sealed) == Flow::tcp4().segments(&[7; 10_000], 1000));
        assert_eq!((b.device.superframes, counted(b, Verdict::Delivered)), (0, 10));
        pair.assert_frames_are_back();
    }

    #[test]
    fn what_a_full_device_or_none_does_not_take_is_counted() {
        let mut pair = pair();
        let mut expected = 0;
        for (gone, refuses) in [(false, false), (false, true), (true, false)] {
            let sealed = segments(&mut pair);
            pair.b.device.room = Some(0);
            (pair.b.device.is_gone, pair.b.device.refuses) = (gone, refuses);
            let (a, b) = (&pair.a, &mut pair.b);
            assert!(b.receive(a, &sealed).is_empty());
            expected += 10;
            assert_eq!(counted(b, Verdict::PrivateFull), expected, "gone {gone}, refuses {refuses}");
            assert_eq!(b.accounted(), expected);
            pair.assert_frames_are_back();
        }
    }
}

mod ethernet;
mod held;
mod moves;
mod sealed;

/// The fate of a datagram on the line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lost,
    Once,
    Twice,
    Late,
}

/// One direction of a line, and the stream over it.
struct Stream {
    random: StdRng,
    flow: Flow,
    /// Datagrams that are delayed.
    late: VecDeque<Datagram>,
    key: u8,
    sent: u64,
    lost: u64,
    doubled: u64,
    delivered: u64,
}

impl Stream {
    fn new(seed: u64) -> Self {
        let flow = Flow { sequence: 0, ..Flow::tcp4() };
        let random = StdRng::seed_from_u64(seed);
        Self { random, flow, late: VecDeque::new(), key: 1, sent: 0, lost: 0, doubled: 0, delivered: 0 }
    }

    /// Sends some superframes and single packets. Asserts that all packets arrive, except those that the line lost.
    fn round(&mut self, from: &mut End, to: &mut End) {
        let mut expected = Vec::new();
        for _ in 0..self.random.random_range(1..8) {
            let segments = self.random.random_range(1..20);
            let payload: Vec<u8> = (0..segments * 1000).map(|_| self.random.random()).collect();
            self.flow.sequence = self.flow.sequence.wrapping_add(payload.len() as u32);
            self.flow.id = self.flow.id.wrapping_add(segments as u16);
            let gso_size = if segments > 1 { 1000 } else { 0 };
            assert!(from.push(&self.flow.packet(&payload), gso_size));
            expected.extend(self.flow.segments(&payload, 1000));
        }
        let sealed = from.seal();
        assert_eq!(sealed.len(), expected.len());
        self.sent += sealed.len() as u64;

        let mut line: Vec<Datagram> = Vec::new();
        let mut due: Vec<&Vec<u8>> = Vec::new();
        let late = std::mem::take(&mut self.late);
        for (datagram, packet) in sealed.into_iter().zip(&expected) {
            let fate = match self.random.random_range(0..20) {
                0 => Fate::Lost,
                1 => Fate::Twice,
                2 => Fate::Late,
                _ => Fate::Once,
            };
            match fate {
                Fate::Lost => self.lost += 1,
                Fate::Late => self.late.push_back(datagram),
                Fate::Once | Fate::Twice => {
                    due.push(packet);
                    if fate == Fate::Twice {
                        self.doubled += 1;
                        line.push(datagram.clone());
                    }
                    line.push(datagram);
                }
            }
        }
        let late_ones = late.len();
        line.extend(late);
        let delivered = to.receive(from, &line);
        assert_eq!(delivered.len(), due.len() + late_ones);
        self.delivered += delivered.len() as u64;
        // Delayed datagrams arrive after the rest; all others of the flow arrive in order.
        assert!(delivered.iter().zip(&due).all(|(delivered, due)| delivered == *due));
    }
}

#[test]
fn streams_both_ways_survive_loss_doubling_reordering_and_changes_of_keys_and_every_packet_is_accounted_for() {
    for algorithm in [Algorithm::Blowfish, Algorithm::Idea] {
        let mut pair = Pair::new(algorithm, Protocol::Ip).unwrap();
        let mut streams = [Stream::new(1), Stream::new(2)];
        for stream in &streams {
            pair.change_key(&[stream.key; KEY], None);
            pair.turn();
        }
        for round in 0..300 {
            for stream in &mut streams {
                if round % 7 == 3 {
                    let before = [stream.key; KEY];
                    stream.key = stream.key.wrapping_add(1);
                    pair.change_key(&[stream.key; KEY], Some(&before));
                }
                let Pair { a, b } = &mut pair;
                stream.round(a, b);
                // The next stream runs in the other direction.
                pair.turn();
            }
            pair.assert_frames_are_back();
        }
        for stream in streams {
            let (sender, receiver) = (pair.a.counters(), pair.b.counters());
            assert_eq!(sender.of(Verdict::Sent), stream.sent);
            assert_eq!(receiver.of(Verdict::Delivered), stream.delivered);
            assert_eq!(receiver.of(Verdict::Replayed), stream.doubled);
            assert_eq!(stream.sent, stream.delivered + stream.lost + stream.late.len() as u64);
            assert!(stream.lost > 100 && stream.doubled > 100 && stream.sent > 10_000);
            pair.turn();
        }
        for end in [&pair.a, &pair.b] {
            let known = [Verdict::Sent, Verdict::Delivered, Verdict::Replayed];
            assert_eq!(end.accounted(), known.iter().map(|verdict| counted(end, *verdict)).sum::<u64>());
        }
    }
}

proptest! {
    #[test]
    fn whatever_comes_is_accounted_for(input in prop::collection::vec(any::<u8>(), 0..3000)) {
        super::pair::run(&input);
    }
}
