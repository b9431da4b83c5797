use super::*;
use crate::cipher::{Algorithm, Key, Lanes};
use crate::engine::ledger::Ledger;
use crate::engine::tunnel::replay::Journal;
use crate::inner::ethernet;
use crate::inner::headers::Headers;
use crate::inner::payload::PayloadHeaders;
use crate::inner::test_packets::Flow;
use crate::kernel::keys::{KEY, KeyWriter};
use crate::wire::crc;
use crate::wire::packet::{self, KeyKind};

const STATIC: [u8; KEY] = [1; KEY];
const RECEIVE: [u8; KEY] = [2; KEY];
const SEND: [u8; KEY] = [3; KEY];
const OTHER: [u8; KEY] = [4; KEY];

const LIMITS: KeyLimits = KeyLimits {
    send_packets: 4,
    send_octets: 1000,
    send_age: Duration::from_secs(600),
    receive_packets: 3,
    receive_age: Duration::from_secs(200),
    retry: Duration::from_secs(10),
};

struct Bed {
    algorithm: Algorithm,
    lanes: Lanes,
    writer: KeyWriter,
    tunnel: Tunnel,
    now: Instant,
    /// The last IV in use.
    iv: u8,
}

impl Bed {
    fn new(algorithm: Algorithm, keys: &[(Slot, [u8; KEY])]) -> Self {
        let writer = KeyWriter::anonymous(4);
        let tunnel = Tunnel::with_keys(0, Keys::alone(algorithm, writer.reader(), 0), LIMITS);
        let mut bed = Self { algorithm, lanes: Lanes::new(), writer, tunnel, now: Instant::now(), iv: 0 };
        for (slot, key) in keys {
            bed.set(*slot, key);
        }
        bed
    }

    fn set(&mut self, slot: Slot, key: &[u8; KEY]) {
        self.writer.set(0, slot, key);
        self.now += Duration::from_nanos(1);
        self.tunnel.keys.refresh(self.now);
    }

    fn pass(&mut self, seconds: u64) {
        self.now += Duration::from_secs(seconds);
    }

    /// A sealed packet with a new IV; `spoil` may change the plaintext up to P, and the CRC is computed after that.
    fn packet(
        &mut self,
        kind: KeyKind,
        key: &[u8; KEY],
        of: Type,
        payload: &[u8],
        spoil: impl Fn(&mut [u8]),
    ) -> Vec<u8> {
        self.iv += 1;
        let mut packet = vec![0; packet::sealed_len(payload.len())];
        packet[packet::IV..packet::IV + payload.len()].copy_from_slice(payload);
        packet::frame(&mut packet, payload.len(), of, kind.mark([self.iv; packet::IV]), [0x5A; 7]);
        let crc = packet.len() - 4;
        spoil(&mut packet[packet::IV..crc]);
        let sum = crc::crc(&packet[packet::IV..crc]);
        packet[crc..].copy_from_slice(&sum.to_be_bytes());
        let key = Key::new(self.algorithm, key);
        self.lanes.encrypt(&mut [packet::job(&key, &mut packet).unwrap()]);
        packet
    }

    fn data(&mut self, kind: KeyKind, key: &[u8; KEY]) -> Vec<u8> {
        self.packet(kind, key, Type::Data, &ip(), |_| ())
    }

    /// Decrypts like a worker.
    fn open(&mut self, datagram: &[u8]) -> Result<(Slot, Opened), Verdict> {
        let slot = self.tunnel.slot_for(datagram)?;
        self.open_under(datagram, slot)
    }

    fn open_under(&mut self, datagram: &[u8], slot: Slot) -> Result<(Slot, Opened), Verdict> {
        let head: Head = *datagram.first_chunk().unwrap();
        let mut datagram = datagram.to_vec();
        let key = &self.tunnel.keys.get(slot).unwrap().key;
        self.lanes.decrypt(&mut [packet::job(key, &mut datagram).unwrap()]);
        let mut opened = self.tunnel.judge(&datagram, &head, slot);
        if opened.is_ok() {
            self.tunnel.accept(slot, &mut [(&head, &mut opened)].into_iter().collect());
        }
        opened.map(|opened| (slot, opened))
    }
}

fn ip() -> Vec<u8> {
    Flow::udp4().packet(b"hello")
}

fn of_packet(packet: &[u8]) -> PayloadHeaders {
    PayloadHeaders::of_packet(Headers::parse(packet).unwrap())
}

const ALGORITHMS: [Algorithm; 3] = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];
const KINDS: [(KeyKind, Slot, [u8; KEY]); 2] =
    [(KeyKind::Static, Slot::Static, STATIC), (KeyKind::Dynamic, Slot::Receive, RECEIVE)];

#[test]
fn data_and_messages_open_under_either_key_and_every_cipher() {
    for algorithm in ALGORITHMS {
        let mut bed = Bed::new(algorithm, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
        for (kind, slot, key) in KINDS {
            let payload = packet::IV..packet::IV + ip().len();
            let datagram = bed.data(kind, &key);
            assert_eq!(bed.open(&datagram), Ok((slot, Opened::Data(payload.clone(), of_packet(&ip())))));
            let datagram = bed.packet(kind, &key, Type::Control, &ip(), |_| ());
            assert_eq!(bed.open(&datagram), Ok((slot, Opened::Control(payload))));
            let live = bed.tunnel.keys.get(slot).unwrap();
            assert_eq!((live.packets(), live.octets_used()), (2, 2 * ip().len() as u64));
        }
    }
}

#[test]
fn each_fault_has_its_verdict_under_either_key_and_every_cipher() {
    let flip = |at_end: usize, bits: u8| {
        move |plain: &mut [u8]| {
            let at = plain.len() - at_end;
            plain[at] ^= bits;
        }
    };
    for algorithm in ALGORITHMS {
        for (kind, slot, key) in KINDS {
            let mut bed = Bed::new(algorithm, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
            let expect = |bed: &mut Bed, datagram: Vec<u8>, verdict| {
                assert_eq!(bed.open(&datagram), Err(verdict), "{algorithm:?} {kind:?}");
            };
            let whole = bed.data(kind, &key);
            expect(&mut bed, whole[..whole.len() - 1].to_vec(), Verdict::BadLength);
            expect(&mut bed, whole[..8].to_vec(), Verdict::BadLength);
            expect(&mut bed, Vec::new(), Verdict::BadLength);
            let foreign = bed.data(kind, &OTHER);
            expect(&mut bed, foreign, Verdict::BadCrc);
            for (bits, verdict) in [
                (0x80, Verdict::BadPadding),
                (0x08, Verdict::BadPadding),
                (0x01, Verdict::BadPadding),
                (0x04, Verdict::BadType),
                (0x06, Verdict::BadType),
            ] {
                let spoilt = bed.packet(kind, &key, Type::Data, &ip(), flip(1, bits));
                expect(&mut bed, spoilt, verdict);
            }
            let too_much_padding = bed.packet(kind, &key, Type::Data, &[], |plain| plain[3] = 0x70);
            expect(&mut bed, too_much_padding, Verdict::BadPadding);
            let shorter = bed.packet(kind, &key, Type::Data, &ip()[..ip().len() - 1], |_| ());
            expect(&mut bed, shorter, Verdict::BadInner);
            let empty = bed.packet(kind, &key, Type::Data, &[], |_| ());
            expect(&mut bed, empty, Verdict::BadInner);
            assert_eq!(bed.tunnel.keys.get(slot).unwrap().packets(), 0, "no fault counts as use of the key");
            assert!(bed.open(&whole).is_ok());
            expect(&mut bed, whole, Verdict::Replayed);
        }
    }
}

#[test]
fn a_forgery_with_a_known_iv_does_not_make_the_genuine_packet_a_replay() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Receive, RECEIVE)]);
    let genuine = bed.data(KeyKind::Dynamic, &RECEIVE);
    let mut forged = genuine.clone();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(bed.open(&forged), Err(Verdict::BadCrc));
    assert!(bed.open(&genuine).is_ok());
}

#[test]
fn what_we_sent_under_the_static_key_is_not_taken_back() {
    let mut bed = Bed::new(Algorithm::Idea, &[(Slot::Static, STATIC), (Slot::Receive, STATIC)]);
    for (kind, opens) in [(KeyKind::Static, false), (KeyKind::Dynamic, true)] {
        let datagram = bed.data(kind, &STATIC);
        bed.tunnel.common.note_iv(datagram.first_chunk().unwrap());
        // A dynamic key is used in one direction only.
        assert_eq!(bed.open(&datagram).is_ok(), opens);
        assert_eq!(bed.open(&datagram), Err(if opens { Verdict::Replayed } else { Verdict::Reflected }));
    }
}

#[test]
fn the_next_engine_learns_what_was_accepted_and_sent_under_the_static_key() {
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("a.static");
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
    bed.tunnel.common =
        Arc::new(Common::with(Ledger::new().unwrap().0, Some((Journal::open(&path).unwrap().0, Vec::new()))));
    let (one, two) = (bed.data(KeyKind::Static, &STATIC), bed.data(KeyKind::Static, &STATIC));
    assert!(bed.open(&one).is_ok());
    assert_eq!(bed.open(&one), Err(Verdict::Replayed));
    let dynamic = bed.data(KeyKind::Dynamic, &RECEIVE);
    assert!(bed.open(&dynamic).is_ok());
    bed.tunnel.common.note_iv(two.first_chunk().unwrap());
    bed.tunnel.common.save();

    let (journal, past) = Journal::open(&path).unwrap();
    assert_eq!(past.accepted, [*one.first_chunk().unwrap()]);
    let mut next = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    next.tunnel.common = Arc::new(Common::with(Ledger::new().unwrap().0, Some((journal, past.sent))));
    assert_eq!(next.open(&two), Err(Verdict::Reflected));
}

#[test]
fn a_late_packet_opens_under_the_previous_key_once() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Receive, RECEIVE)]);
    let (early, late) = (bed.data(KeyKind::Dynamic, &RECEIVE), bed.data(KeyKind::Dynamic, &RECEIVE));
    assert!(bed.open(&early).is_ok());
    bed.writer.set(0, Slot::Previous, &RECEIVE);
    bed.set(Slot::Receive, &OTHER);
    assert_eq!(bed.open(&late), Err(Verdict::BadCrc));
    assert!(bed.open_under(&late, Slot::Previous).is_ok());
    for replay in [early, late] {
        assert_eq!(bed.open_under(&replay, Slot::Previous), Err(Verdict::Replayed));
    }
}

#[test]
fn the_control_thread_learns_when_the_peer_begins_with_a_new_key() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
    let generation = |bed: &Bed| bed.tunnel.keys.generation(Slot::Receive);
    let (first, late) = (bed.data(KeyKind::Dynamic, &RECEIVE), bed.data(KeyKind::Dynamic, &RECEIVE));
    let before = generation(&bed);
    let under_static = bed.data(KeyKind::Static, &STATIC);
    assert!(bed.open(&under_static).is_ok());
    assert_eq!(bed.tunnel.counters.receive_key_used(), 0);
    assert!(bed.open(&first).is_ok());
    assert_eq!(bed.tunnel.counters.receive_key_used(), before);
    bed.writer.set(0, Slot::Previous, &RECEIVE);
    bed.set(Slot::Receive, &OTHER);
    assert!(bed.open_under(&late, Slot::Previous).is_ok());
    assert_eq!(bed.tunnel.counters.receive_key_used(), before, "the peer still uses the key before");
    let next = bed.data(KeyKind::Dynamic, &OTHER);
    assert!(bed.open(&next).is_ok());
    assert_eq!(bed.tunnel.counters.receive_key_used(), generation(&bed));
    assert_ne!(generation(&bed), before);
}

#[test]
fn a_receive_key_opens_its_share_and_no_more() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
    for _ in 0..LIMITS.receive_packets {
        assert_eq!(bed.tunnel.receiving(bed.now), None);
        let datagram = bed.data(KeyKind::Dynamic, &RECEIVE);
        assert!(bed.open(&datagram).is_ok());
    }
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::ReceiveKeySpent));
    assert_eq!(bed.tunnel.receiving(bed.now), None, "asked for once");
    let datagram = bed.data(KeyKind::Dynamic, &RECEIVE);
    assert_eq!(bed.open(&datagram), Err(Verdict::NoReceiveKey));
    // A packet that was being decrypted meanwhile.
    assert_eq!(bed.open_under(&datagram, Slot::Receive), Err(Verdict::NoReceiveKey));
    for _ in 0..10 {
        let datagram = bed.data(KeyKind::Static, &STATIC);
        assert!(bed.open(&datagram).is_ok(), "the static key has no end");
    }
}

#[test]
fn of_a_batch_each_packet_is_taken_once_and_no_more_than_the_share() {
    let bed = Bed::new(Algorithm::Blowfish, &[(Slot::Receive, RECEIVE)]);
    let share = LIMITS.receive_packets;
    let heads: Vec<Head> = (0..=share as u8).flat_map(|packet| [[packet; 16]; 2]).collect();
    let mut opened: Vec<_> = heads.iter().map(|_| Ok(Opened::Data(8..28, of_packet(&ip())))).collect();
    bed.tunnel.accept(Slot::Receive, &mut heads.iter().zip(&mut opened).collect());
    for (number, opened) in opened.into_iter().enumerate() {
        let expected = match number as u64 {
            beyond if beyond > 2 * (share - 1) => Err(Verdict::NoReceiveKey),
            first if first.is_multiple_of(2) => Ok(Opened::Data(8..28, of_packet(&ip()))),
            _ => Err(Verdict::Replayed),
        };
        assert_eq!(opened, expected, "{number}");
    }
    let live = bed.tunnel.keys.get(Slot::Receive).unwrap();
    assert_eq!((live.packets(), live.octets_used()), (share, 20 * share));
}

#[test]
fn a_peer_that_goes_on_with_an_old_key_is_asked_for_another_and_still_heard() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Receive, RECEIVE)]);
    bed.pass(LIMITS.receive_age.as_secs() - 1);
    assert_eq!(bed.tunnel.receiving(bed.now), None);
    bed.pass(1000);
    assert_eq!(bed.tunnel.receiving(bed.now), None, "after a pause it is about to make one of its own accord");
    bed.pass(LIMITS.retry.as_secs());
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::ReceiveKeySpent));
    assert_eq!(bed.tunnel.receiving(bed.now), None, "asked for once");
    let datagram = bed.data(KeyKind::Dynamic, &RECEIVE);
    assert!(bed.open(&datagram).is_ok());
    bed.set(Slot::Receive, &[9; KEY]);
    assert_eq!(bed.tunnel.receiving(bed.now), None);
}

#[test]
fn a_bare_payload_must_be_one_ip_packet() {
    let bed = Bed::new(Algorithm::Blowfish, &[]);
    assert_eq!(bed.tunnel.judge_bare(&ip()), Ok(Opened::Data(0..ip().len(), of_packet(&ip()))));
    assert_eq!(bed.tunnel.judge_bare(&ip()[1..]), Err(Verdict::BadInner));
    assert_eq!(bed.tunnel.judge_bare(&[]), Err(Verdict::BadInner));
}

#[test]
fn data_goes_under_the_dynamic_key_and_under_the_static_one_only_if_that_is_allowed() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[]);
    assert_eq!(bed.tunnel.data_slot(), Err(Verdict::NoSendKey));
    bed.set(Slot::Static, &STATIC);
    assert_eq!(bed.tunnel.data_slot(), Ok(Slot::Static));
    bed.tunnel.static_data = false;
    assert_eq!(bed.tunnel.data_slot(), Err(Verdict::NoSendKey));
    bed.set(Slot::Send, &SEND);
    assert_eq!(bed.tunnel.data_slot(), Ok(Slot::Send));
}

#[test]
fn a_send_key_is_asked_for_at_each_limit() {
    let octets = LIMITS.send_octets as usize;
    let mut sealed = Vec::new();
    for (octets, wait, reason, packets) in
        [(1, 0, Wanted::Packets, LIMITS.send_packets), (octets, 0, Wanted::Octets, 1), (1, 600, Wanted::Age, 1)]
    {
        let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Send, SEND)]);
        bed.pass(wait);
        let wanted =
            (1..).find_map(|packet| Some((packet, bed.tunnel.account(Slot::Send, octets, Type::Data, bed.now)?)));
        assert_eq!(wanted, Some((packets, reason)));
        sealed.push(bed.tunnel.keys.get(Slot::Send).unwrap().octets_used());
    }
    assert_eq!(sealed, [4, 1000, 1]);
}

#[test]
fn data_under_the_static_key_asks_for_a_key_and_messages_never_do() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    assert_eq!(bed.tunnel.account(Slot::Static, 60, Type::Control, bed.now), None);
    assert_eq!(bed.tunnel.account(Slot::Static, 60, Type::Data, bed.now), Some(Wanted::NoSendKey));
    bed.set(Slot::Send, &SEND);
    for _ in 0..2 * LIMITS.send_packets {
        assert_eq!(bed.tunnel.account(Slot::Send, 60, Type::Control, bed.now), None);
    }
    let packets = |slot| bed.tunnel.keys.get(slot).unwrap().packets();
    assert_eq!((packets(Slot::Static), packets(Slot::Send)), (2, 2 * LIMITS.send_packets));
}

#[test]
fn one_direction_is_asked_for_once_in_the_retry_time() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    assert_eq!(bed.tunnel.want_send_key(bed.now), Some(Wanted::NoSendKey));
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::NoReceiveKey), "the other direction has a time of its own");
    bed.pass(9);
    assert_eq!((bed.tunnel.want_send_key(bed.now), bed.tunnel.receiving(bed.now)), (None, None));
    bed.pass(1);
    assert_eq!(bed.tunnel.want_send_key(bed.now), Some(Wanted::NoSendKey));
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::NoReceiveKey));
}

#[test]
fn a_key_that_came_since_answers_the_request() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    assert_eq!(bed.tunnel.want_send_key(bed.now), Some(Wanted::NoSendKey));
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::NoReceiveKey));
    bed.pass(1);
    bed.set(Slot::Send, &SEND);
    bed.set(Slot::Receive, &RECEIVE);
    // At a million packets a second, a key reaches its limit long before the retry time is over.
    let wanted = (0..).find_map(|_| bed.tunnel.account(Slot::Send, 1, Type::Data, bed.now));
    assert_eq!(wanted, Some(Wanted::Packets));
    assert_eq!(bed.tunnel.account(Slot::Send, 1, Type::Data, bed.now), None);
    for _ in 0..LIMITS.receive_packets {
        let datagram = bed.data(KeyKind::Dynamic, &RECEIVE);
        assert!(bed.open(&datagram).is_ok());
    }
    assert_eq!(bed.tunnel.receiving(bed.now), Some(Wanted::ReceiveKeySpent));
}

#[test]
fn packets_that_fail_for_a_while_under_a_live_key_ask_for_another_ever_more_seldom() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
    let mut asked = Vec::new();
    for second in 0..=100 {
        if bed.tunnel.undecryptable(bed.now).is_some() {
            asked.push(second);
        }
        bed.pass(1);
    }
    assert_eq!(asked, [1, 11, 31, 71]);
    // A packet that is decrypted ends it; the next failure starts a new count.
    bed.tunnel.common.opened();
    assert_eq!(bed.tunnel.undecryptable(bed.now), None);
    bed.pass(1);
    assert_eq!(bed.tunnel.undecryptable(bed.now), Some(Wanted::Undecryptable));
}

#[test]
fn packets_under_the_static_key_since_the_announcement_count_for_a_key() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    bed.tunnel.limits = KeyLimits { send_packets: 32, send_octets: u64::MAX, ..LIMITS };
    let seal = |bed: &Bed, slot| bed.tunnel.account(slot, 1, Type::Data, bed.now);
    for _ in 0..1000 {
        seal(&bed, Slot::Static);
    }
    for (under_static, left) in [(0, 32), (10, 32), (50, 12), (1000, 1)] {
        bed.tunnel.common.count_from_here();
        for _ in 0..under_static {
            seal(&bed, Slot::Static);
        }
        bed.pass(1);
        bed.set(Slot::Send, &[under_static as u8; KEY]);
        let wanted = (1..).find(|_| seal(&bed, Slot::Send).is_some());
        assert_eq!(wanted, Some(left), "{under_static}");
        bed.writer.clear(0, Slot::Send);
    }
}

/// Only if the lifetime of a key is below the retry time.
#[test]
fn a_send_key_that_was_dropped_is_asked_for_again_at_once() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
    let seal = |bed: &Bed, slot| bed.tunnel.account(slot, 1, Type::Data, bed.now);
    assert_eq!(seal(&bed, Slot::Static), Some(Wanted::NoSendKey));
    bed.set(Slot::Send, &SEND);
    bed.pass(2);
    bed.writer.clear(0, Slot::Send);
    bed.tunnel.common.send_key_dropped();
    bed.pass(1);
    bed.tunnel.keys.refresh(bed.now);
    assert_eq!(seal(&bed, Slot::Static), Some(Wanted::NoSendKey));
    assert_eq!(seal(&bed, Slot::Static), None);
}

fn in_frame(packet: &[u8]) -> Vec<u8> {
    [&[2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00], packet].concat()
}

#[test]
fn an_ethernet_tunnel_takes_frames_of_any_kind_and_no_bare_packets() {
    let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC), (Slot::Receive, RECEIVE)]);
    bed.tunnel.protocol = Protocol::Ethernet;
    let open = |bed: &mut Bed, payload: &[u8]| {
        let datagram = bed.packet(KeyKind::Static, &STATIC, Type::Data, payload, |_| ());
        bed.open(&datagram).map(|(_, opened)| opened)
    };
    let data = |payload: &[u8]| {
        let place = packet::IV..packet::IV + payload.len();
        Ok(Opened::Data(place, ethernet::read(payload).unwrap()))
    };
    for short in [&[][..], &[7; 13]] {
        assert_eq!(open(&mut bed, short), Err(Verdict::BadInner));
    }
    // Until a frame has come that is not an IP packet, a payload that looks like an IP packet counts as protocol 3.
    assert_eq!(open(&mut bed, &ip()), Err(Verdict::BadInner));
    for frame in [vec![0xFF; 14], in_frame(&ip()), in_frame(b"anything")] {
        assert_eq!(open(&mut bed, &frame), data(&frame));
    }
    assert_eq!(open(&mut bed, &ip()), data(&ip()));
    // Another key means another peer.
    let datagram = bed.data(KeyKind::Dynamic, &RECEIVE);
    assert_eq!(bed.open(&datagram), Err(Verdict::BadInner));
}

#[test]
fn a_peer_of_the_other_protocol_is_told_of_once() {
    for (protocol, payload, word) in
        [(Protocol::Ip, in_frame(&ip()), "Ethernet frames"), (Protocol::Ethernet, ip(), "IP packets")]
    {
        let mut bed = Bed::new(Algorithm::Blowfish, &[(Slot::Static, STATIC)]);
        bed.tunnel.protocol = protocol;
        let mut datagram = vec![0; packet::sealed_len(payload.len())];
        datagram[packet::IV..packet::IV + payload.len()].copy_from_slice(&payload);
        packet::frame(&mut datagram, payload.len(), Type::Data, [1; packet::IV], [0; 7]);
        let text = bed.tunnel.explain(&datagram).unwrap();
        assert!(text.starts_with(&format!("the peer sends {word}")), "{text}");
        assert_eq!(bed.tunnel.explain(&datagram), None);
        bed.tunnel.nokey = true;
        assert_eq!(bed.tunnel.explain(&payload), None, "told already");
        assert_eq!(bed.tunnel.explain(&[]), None);
    }
}
