//! Tests of the peer with itself, with the known answers, and with `cipe-user`.

mod ours;

use std::os::unix::net::UnixDatagram;

use cipe_user::cipher::{Algorithm, Key, Lanes};
use cipe_user::wire::message::{Message, is_fresh};
use cipe_user::wire::packet::{self as theirs, KeyKind, Type};
use proptest::prelude::*;

use self::ours::Ours;
use super::*;

const SECRET: [u8; KEY] = *b"a static key  16";
const CIPHERS: [(Cipher, Algorithm); 3] = [
    (Cipher::Blowfish, Algorithm::Blowfish),
    (Cipher::Idea, Algorithm::Idea),
    (Cipher::IdeaLittle, Algorithm::IdeaLittle),
];

/// A ping of `n` octets, 28 or more, with right checksums.
fn ping(n: u16) -> Vec<u8> {
    let mut packet = vec![0; n.into()];
    packet[..20].copy_from_slice(&[0x45, 0, 0, 0, 0, 1, 0, 0, 64, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet[2..4].copy_from_slice(&n.to_be_bytes());
    packet[20] = 8;
    let sum = |packet: &[u8]| {
        let sum: u32 = packet.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
        !((sum & 0xFFFF) + (sum >> 16)) as u16
    };
    let (header, icmp) = packet.split_at_mut(20);
    let sums = [sum(header), sum(icmp)].map(u16::to_be_bytes);
    header[10..12].copy_from_slice(&sums[0]);
    icmp[2..4].copy_from_slice(&sums[1]);
    packet
}

fn socket() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").unwrap()
}

/// Waits for an event that `wanted` picks.
fn wait<T>(events: &Receiver<Event>, wanted: impl Fn(Event) -> Option<T>) -> T {
    loop {
        let event = events.recv_timeout(Duration::from_secs(20)).expect("the event comes");
        if let Some(found) = wanted(event) {
            return found;
        }
    }
}

fn wait_for(events: &Receiver<Event>, wanted: &Event) {
    wait(events, |event| (event == *wanted).then_some(()));
}

fn delivered(event: Event) -> Option<Vec<u8>> {
    match event {
        Event::Delivered(packet) => Some(packet),
        _ => None,
    }
}

/// One end that reports every packet and echoes none, and one that also echoes. `change` sets up both.
fn pair(change: impl Fn(&mut Config)) -> (Peer, Receiver<Event>, Peer, Receiver<Event>) {
    let (a, b) = (socket(), socket());
    let mut config = Config { tell_packets: true, echo: false, ..Config::original(Cipher::Blowfish, SECRET) };
    config.peer = Some(b.local_addr().unwrap());
    let mut other = Config { echo: true, peer: None, ..config.clone() };
    change(&mut config);
    change(&mut other);
    let (a, a_events) = Peer::start(a, config).unwrap();
    let (b, b_events) = Peer::start(b, other).unwrap();
    (a, a_events, b, b_events)
}

#[test]
fn the_known_answers_are_opened() {
    let file: serde_json::Value = serde_json::from_str(include_str!("../../../vectors/cipe-v3.json")).unwrap();
    for case in file["cases"].as_array().unwrap() {
        let octets = |field: &str| hex::decode(case[field].as_str().unwrap()).unwrap();
        let cipher = match case["cipher_variant"].as_str().unwrap() {
            "le32-words" => Cipher::Blowfish,
            "standard-be16" => Cipher::Idea,
            _ => Cipher::IdeaLittle,
        };
        let opened = open(cipher, &octets("key_hex").try_into().unwrap(), &octets("wire_hex"));
        let expected = Opened { control: case["type"] == "keyxchg", payload: octets("plaintext_hex") };
        assert_eq!(opened, Ok(expected), "{}", case["name"]);
    }
}

#[test]
fn two_peers_exchange_keys_and_ping_each_other() {
    for (cipher, _) in CIPHERS {
        let (a, a_events, b, b_events) = pair(|config| config.cipher = cipher);
        a.send(ping(84));
        let reply = wait(&a_events, delivered);
        assert_eq!((&reply[..12], &reply[12..16], reply[20]), (&ping(84)[..12], &[10, 0, 0, 2][..], 0));
        wait_for(&b_events, &Event::SendKey);
        a.send(ping(85));
        assert_eq!(wait(&a_events, delivered).len(), 85);
        let (a, b) = (a.stop().unwrap(), b.stop().unwrap());
        assert_eq!((a.sent_static, a.sent_dynamic, a.delivered_static, a.delivered_dynamic), (1, 1, 1, 1));
        assert_eq!((b.echoed, b.moves, b.send_keys, b.receive_keys), (2, 1, 1, 1));
    }
}

#[test]
fn packets_go_from_device_to_device() {
    let (a, b) = (socket(), socket());
    let device = || UnixDatagram::pair().unwrap();
    let ((left, a_device), (right, b_device)) = (device(), device());
    let config = Config { echo: false, ..Config::original(Cipher::Idea, SECRET) };
    let a_config = Config { peer: Some(b.local_addr().unwrap()), ..config.clone() };
    let (a, _) = Peer::start_with_device(a, a_config, a_device.into()).unwrap();
    let (b, _) = Peer::start_with_device(b, config, b_device.into()).unwrap();
    for n in [31, 1400] {
        for (from, to) in [(&left, &right), (&right, &left)] {
            from.send(&ping(n)).unwrap();
            let mut buffer = [0; 2000];
            to.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let len = to.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..len], ping(n));
        }
    }
    assert_eq!((a.stop().unwrap().echoed, b.stop().unwrap().echoed), (0, 0));
}

#[test]
fn a_packet_after_a_move_leaves_from_the_new_address() {
    let receiver = socket();
    receiver.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (inside, device) = UnixDatagram::pair().unwrap();
    let config = Config { peer: Some(receiver.local_addr().unwrap()), ..Config::original(Cipher::Idea, SECRET) };
    let (peer, _) = Peer::start_with_device(socket(), config, device.into()).unwrap();
    for _ in 0..1_000 {
        let to = socket();
        let address = to.local_addr().unwrap();
        peer.move_to(to).unwrap();
        inside.send(&ping(40)).unwrap();
        let mut buffer = [0; 2000];
        // Its exchange, whose datagrams are longer, may come between.
        let from = loop {
            let (length, from) = receiver.recv_from(&mut buffer).unwrap();
            if length < 64 {
                break from;
            }
        };
        assert_eq!(from, address);
    }
}

#[test]
fn short_inner_packets_never_arrive() {
    let (a, a_events, b, _) = pair(|_| ());
    for n in [28, 30, 31] {
        a.send(ping(n));
    }
    assert_eq!(wait(&a_events, delivered).len(), 31);
    assert_eq!(b.stop().unwrap().short_inner, 2);
}

#[test]
fn a_key_is_renewed_after_its_packets_with_data_under_the_static_key_meanwhile() {
    let (a, a_events, b, _) = pair(|config| (config.send_packets, config.echo) = (3, false));
    for _ in 0..5 {
        a.send(ping(40));
        wait_for(&a_events, &Event::SendKey);
        for _ in 0..4 {
            a.send(ping(40));
        }
    }
    a.send(ping(40));
    wait_for(&a_events, &Event::SendKey);
    let counters = a.stop().unwrap();
    assert_eq!((counters.send_keys, counters.sent_static, counters.sent_dynamic), (6, 6, 20));
    drop(b);
}

#[test]
fn a_worn_out_receive_key_is_forgotten_and_asked_for() {
    let (a, a_events, b, b_events) = pair(|config| config.receive_packets = if config.echo { 10 } else { 1_000 });
    a.send(ping(40));
    wait_for(&a_events, &Event::SendKey);
    wait(&a_events, delivered);
    for _ in 0..11 {
        a.send(ping(40));
    }
    wait_for(&b_events, &Event::Deaf);
    wait_for(&a_events, &Event::SendKey);
    let b = b.stop().unwrap();
    assert!(b.no_receive_key >= 1 && b.requests_sent == 1);
}

#[test]
fn the_other_end_is_found_where_it_moved_to() {
    let b_socket = socket();
    let b_address = b_socket.local_addr().unwrap();
    let (b, events) = Peer::start(b_socket, Config::original(Cipher::Blowfish, SECRET)).unwrap();
    for _ in 0..2 {
        let from = socket();
        from.send_to(&seal(Cipher::Blowfish, &SECRET, false, false, &ping(40)), b_address).unwrap();
        wait_for(&events, &Event::Moved(from.local_addr().unwrap()));
    }
    let wrong = socket();
    wrong.send_to(&seal(Cipher::Blowfish, &[0; KEY], false, false, &ping(40)), b_address).unwrap();
    let from = socket();
    from.send_to(&seal(Cipher::Blowfish, &SECRET, false, false, &ping(40)), b_address).unwrap();
    wait_for(&events, &Event::Moved(from.local_addr().unwrap()));
    assert_eq!(b.counters().bad_crc, 1);
}

#[test]
fn a_silent_peer_sends_nothing() {
    let (a, _, b, b_events) = pair(|config| config.echo = false);
    a.silence(true);
    a.send(ping(40));
    a.silence(false);
    a.send(ping(41));
    assert_eq!(wait(&b_events, delivered).len(), 41);
    drop((a, b));
}

#[test]
fn stamps_are_looked_for_at_their_place() {
    let (a, _, _b, b_events) = pair(|config| (config.tokxts, config.stamp) = (30, Stamp::Second));
    a.send_message(0x71, b"hello");
    wait_for(&b_events, &Event::Message(0x71));
    let frame = message::frame(0x71, b"hello", Stamp::First);
    assert!(Stamp::First.is_near(&frame, 1) && !Stamp::First.is_near(&[0; 60], 1));
    assert!(!Stamp::Second.is_near(&[0; 59], 1));
}

#[test]
fn its_messages_are_understood_in_every_variant() {
    let key: [u8; KEY] = rand::random();
    let now = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs() as u32;
    for stamp in [Stamp::First, Stamp::Second] {
        for order in [Order::Big, Order::Little] {
            let sum = message::key_sum(&key, order);
            let frame = message::frame(message::NK_IND, &[&key[..], &sum].concat(), stamp);
            assert!(is_fresh(&frame, now, 5));
            let parsed = Message::parse(&frame);
            assert!(matches!(parsed, Ok(Message::Indication { key: k, sum: s }) if k.0 == key && s == sum));
        }
        let frame = message::frame(message::NK_REQ, &[], stamp);
        assert!(matches!(Message::parse(&frame), Ok(Message::Request)));
        let frame = message::frame(0x71, b"text", stamp);
        assert!(matches!(Message::parse(&frame), Ok(Message::Debug(text)) if text.starts_with(b"text")));
    }
}

/// Ours and a peer that behaves as the original in every detail: no ping is lost in 20 changes of each key.
#[test]
fn ours_and_an_original_change_keys_twenty_times_without_loss() {
    for (cipher, algorithm) in CIPHERS {
        for (stamp, order) in [(Stamp::First, Order::Big), (Stamp::Second, Order::Little)] {
            let config = Config { stamp, order, tokxts: 30, send_packets: 11, ..Config::original(cipher, SECRET) };
            let socket_of_peer = socket();
            let mut ours = Ours::new(socket(), socket_of_peer.local_addr().unwrap(), algorithm, &SECRET);
            ours.send_packets = 9;
            let (peer, _) = Peer::start(socket_of_peer, config).unwrap();
            while ours.send_keys < 20 || ours.receive_keys < 20 {
                assert_eq!(ours.ping(&ping(60)).len(), 60);
            }
            let counters = peer.stop().unwrap();
            assert_eq!((counters.bad_crc, counters.bad_p, counters.bad_message, counters.no_receive_key), (0, 0, 0, 0));
            assert!(counters.delivered_dynamic > 100);
        }
    }
}

#[test]
fn ours_goes_on_when_an_original_has_gone_deaf_or_started_again() {
    let config = Config { receive_packets: 20, ..Config::original(Cipher::Blowfish, SECRET) };
    let config = Config { tokxc: Duration::from_millis(200), ..config };
    let (first, second) = (socket(), socket());
    let socket = socket();
    let config = Config { peer: Some(socket.local_addr().unwrap()), ..config };
    let mut ours = Ours::new(socket, first.local_addr().unwrap(), Algorithm::Blowfish, &SECRET);
    let (peer, _) = Peer::start(first, config.clone()).unwrap();
    while ours.send_keys < 5 {
        ours.ping_until_answered(&ping(60));
    }
    drop(peer);
    ours.peer = second.local_addr().unwrap();
    let (peer, _) = Peer::start(second, config).unwrap();
    while ours.send_keys < 10 {
        ours.ping_until_answered(&ping(60));
    }
    assert!(peer.stop().unwrap().requests_sent > 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn what_one_seals_the_other_opens(payload in prop::collection::vec(any::<u8>(), 0..400), key: [u8; KEY],
                                      iv: [u8; 8], which in 0usize..3, dynamic: bool, control: bool) {
        let (cipher, algorithm) = CIPHERS[which];
        let expanded = Key::new(algorithm, &key);
        let kind = if control { Type::Control } else { Type::Data };

        let mut packet = seal(cipher, &key, dynamic, control, &payload);
        let flag = if dynamic { KeyKind::Dynamic } else { KeyKind::Static };
        prop_assert_eq!(KeyKind::of(packet[0]), flag);
        prop_assert_eq!(theirs::open(&mut Lanes::new(), &expanded, &mut packet), Ok((kind, &*payload)));

        let mut packet = vec![0; theirs::sealed_len(payload.len())];
        packet[8..8 + payload.len()].copy_from_slice(&payload);
        theirs::seal(&mut Lanes::new(), &expanded, &mut packet, payload.len(), kind, flag.mark(iv), [0x5A; 7]);
        prop_assert_eq!(packet::is_dynamic(&packet), dynamic);
        prop_assert_eq!(open(cipher, &key, &packet), Ok(Opened { control, payload }));
    }

    #[test]
    fn any_datagram_is_survived(octets in prop::collection::vec(any::<u8>(), 0..200), dynamic: bool) {
        let mut session = Session::new(Config::original(Cipher::Idea, SECRET));
        let from = SocketAddr::from(([127, 0, 0, 1], 9));
        session.datagram(&octets, from, std::time::Instant::now());
        for control in [true, false] {
            session.datagram(&seal(Cipher::Idea, &SECRET, dynamic, control, &octets), from, std::time::Instant::now());
        }
        prop_assert_eq!(session.counters.datagrams, 3);
    }
}
