//! Sealed packets (docs/SEALED.md), end to end.

use std::time::Duration;

use super::*;
use crate::control::protocol::{MessageOctets, SealedEvent, SealedWanted, Under, Unsealed};
use crate::engine::datapath::ControlMessage;
use crate::engine::datapath::pair::REQUIRED;
use crate::engine::ledger::boottime;
use crate::sealed::cipher::Suite;
use crate::sealed::packet::{OVERHEAD, PREFIX};
use crate::sealed::window::WINDOW;
use crate::wire::message::Message;

const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305];
const BOTH: Unsealed = Unsealed { sends: true, accepts: true };

fn sealed() -> Pair {
    Pair::sealed(Suite::Aes256Gcm, Protocol::Ip)
}

/// The events about sealed packets that an end has told.
fn told(end: &mut End) -> Vec<SealedEvent> {
    let reports = std::iter::from_fn(|| end.reports.try_recv().ok());
    let events = reports.filter_map(|(_, report)| match report {
        WorkerReport::Event(Event::Sealed(event)) => Some(event),
        _ => None,
    });
    events.collect()
}

fn wanted(reason: SealedWanted) -> SealedEvent {
    SealedEvent::Wanted { reason }
}

/// One data packet of `a`, as it leaves.
fn one(pair: &mut Pair) -> Datagram {
    assert!(pair.a.push(&udp(100), 0));
    let mut datagrams = pair.a.seal();
    assert_eq!(datagrams.len(), 1);
    datagrams.remove(0)
}

/// `b` gets a datagram of `a`'s, which is dropped or ends under this verdict.
fn ends(pair: &mut Pair, datagram: &Datagram, verdict: Verdict) {
    let before = (counted(&pair.b, verdict), pair.b.accounted());
    let (a, b) = (&pair.a, &mut pair.b);
    assert!(b.receive(a, std::slice::from_ref(datagram)).is_empty(), "{verdict:?}");
    assert_eq!((counted(b, verdict), b.accounted()), (before.0 + 1, before.1 + 1), "{verdict:?}");
    pair.assert_frames_are_back();
}

fn control(octets: Vec<u8>) -> ControlMessage {
    ControlMessage { octets: MessageOctets(octets.into()), under: Under::Static, announces: false }
}

#[test]
fn packets_of_all_sizes_arrive_octet_for_octet_and_are_25_octets_longer() {
    for suite in SUITES {
        let mut pair = Pair::sealed(suite, Protocol::Ip);
        for octets in 0..=1414 {
            let packet = udp(octets);
            assert!(pair.a.push(&packet, 0));
            let datagrams = pair.a.seal();
            assert_eq!(datagrams[0].octets.len(), packet.len() + OVERHEAD);
            assert!(datagrams[0].octets.starts_with(&PREFIX));
            assert!(!datagrams[0].octets.windows(16).any(|part| packet.windows(16).any(|other| part == other)));
            let (a, b) = (&pair.a, &mut pair.b);
            assert!(b.receive(a, &datagrams) == [packet]);
        }
        assert_eq!(told(&mut pair.b), [SealedEvent::Opened { serial: 1 }], "the first packet only");
        assert!(told(&mut pair.a).is_empty());
        pair.assert_frames_are_back();
    }
}

#[test]
fn superframes_are_cut_and_joined_and_frames_of_ethernet_carried() {
    let mut pair = sealed();
    let segments = Flow { dont_fragment: false, ..Flow::tcp4() }.segments(&[7; 40_000], 1300);
    let whole = Flow { dont_fragment: false, ..Flow::tcp4() }.segments(&[7; 40_000], 40_000).remove(0);
    assert!(pair.a.push(&whole, 1300));
    let datagrams = pair.a.seal();
    assert_eq!(datagrams.len(), segments.len());
    assert!(datagrams[1..30].iter().all(|datagram| datagram.octets.len() == datagrams[0].octets.len()));
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &datagrams).len(), segments.len());
    assert_eq!((b.device.superframes, counted(b, Verdict::Delivered)), (1, segments.len() as u64));
    pair.assert_frames_are_back();

    let mut pair = Pair::sealed(Suite::Aes256Gcm, Protocol::Ethernet);
    let frames =
        [[&[2; 12][..], &[0x08, 0x00], &udp(900)].concat(), [&[0xFF; 12][..], &[0x88, 0xB5], &[9; 60]].concat()];
    frames.iter().for_each(|frame| assert!(pair.a.push_frame(frame)));
    pair.a.seal().iter().for_each(|datagram| pair.b.push_datagram(pair.a.me(), datagram));
    pair.b.open();
    assert!(pair.b.device.frames == frames);
    pair.assert_frames_are_back();
}

#[test]
fn what_was_changed_or_accepted_before_is_dropped_and_changes_nothing() {
    let mut pair = sealed();
    let datagram = one(&mut pair);
    for at in 4..datagram.octets.len() {
        let mut forged = datagram.clone();
        forged.octets[at] ^= 1;
        ends(&mut pair, &forged, Verdict::BadTag);
    }
    for (octet, verdict) in [(0x00, Verdict::BadMessage), (0xC0, Verdict::NoReceiveKey)] {
        let mut other = datagram.clone();
        other.octets[4] = other.octets[4] & 0x3F | octet;
        ends(&mut pair, &other, verdict);
    }
    for length in 4..OVERHEAD {
        let short = Datagram { octets: datagram.octets[..length].to_vec(), tos: 0 };
        ends(&mut pair, &short, Verdict::BadLength);
    }
    assert!(told(&mut pair.b).is_empty());
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, std::slice::from_ref(&datagram)).len(), 1);
    ends(&mut pair, &datagram, Verdict::Replayed);
    for _ in 0..WINDOW {
        let datagram = one(&mut pair);
        let (a, b) = (&pair.a, &mut pair.b);
        assert_eq!(b.receive(a, &[datagram]).len(), 1);
    }
    ends(&mut pair, &datagram, Verdict::TooOld);
}

#[test]
fn both_sessions_open_at_a_change_until_their_epoch_is_given_away() {
    let mut pair = sealed();
    let old: Vec<Datagram> = (0..3).map(|_| one(&mut pair)).collect();
    pair.new_session(2, Suite::ChaCha20Poly1305);
    let new = one(&mut pair);
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &[new, old[0].clone()]).len(), 2);
    assert_eq!(told(&mut pair.b), [2, 1].map(|serial| SealedEvent::Opened { serial }));
    pair.b.sealed().forget(1);
    ends(&mut pair, &old[1], Verdict::NoReceiveKey);
    pair.new_session(4, Suite::Aes256Gcm);
    ends(&mut pair, &old[2], Verdict::BadTag);
    assert!(told(&mut pair.b).is_empty(), "packets under way at a change are no reason for a handshake");
}

#[test]
fn a_handshake_is_wanted_when_packets_do_not_open_for_a_second() {
    let mut pair = sealed();
    let mut forged = one(&mut pair);
    forged.octets[30] ^= 1;
    ends(&mut pair, &forged, Verdict::BadTag);
    pair.b.pass(Duration::from_secs(1));
    (0..9).for_each(|_| ends(&mut pair, &forged, Verdict::BadTag));
    assert_eq!(told(&mut pair.b), [wanted(SealedWanted::Receive)]);
    // Without any key at once.
    pair.b.sealed().clear();
    pair.b.pass(Duration::from_millis(250));
    ends(&mut pair, &forged, Verdict::NoReceiveKey);
    assert_eq!(told(&mut pair.b), [wanted(SealedWanted::Receive)]);
    // The peer begins where its address is not known.
    pair.b.tunnel().peer = None;
    pair.b.pass(Duration::from_millis(250));
    ends(&mut pair, &forged, Verdict::NoReceiveKey);
    assert!(told(&mut pair.b).is_empty());
}

#[test]
fn where_only_sealed_packets_are_accepted_others_are_dropped() {
    let mut pair = pair();
    pair.b.use_sealed(REQUIRED);
    let datagram = one(&mut pair);
    let clear = Datagram { octets: vec![0; 60], tos: 0 };
    for datagram in [&datagram, &clear, &datagram] {
        ends(&mut pair, datagram, Verdict::Unsealed);
    }
    assert_eq!(told(&mut pair.b), [wanted(SealedWanted::Unsealed)]);
    let unsealed = Unsealed { accepts: true, ..REQUIRED };
    pair.b.sealed().set_unsealed(unsealed);
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &[datagram]).len(), 1);
}

#[test]
fn a_first_contact_is_unsealed_until_there_is_a_session() {
    let mut pair = pair();
    pair.a.use_sealed(BOTH);
    pair.b.use_sealed(BOTH);
    let before = one(&mut pair);
    assert!(!before.octets.starts_with(&PREFIX));
    pair.new_session(1, Suite::Aes256Gcm);
    let after = one(&mut pair);
    assert!(after.octets.starts_with(&PREFIX));
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &[after, before]).len(), 2);
    pair.a.sealed().stop_sending();
    pair.a.sealed().set_unsealed(REQUIRED);
    assert!(pair.a.push(&udp(100), 0));
    assert!(pair.a.seal().is_empty(), "it has keys of protocol 3, and must not use them");
}

#[test]
fn without_a_key_packets_wait_for_the_handshake_that_they_ask_for() {
    let mut pair = pair();
    pair.a.set_key(Slot::Static, &KEYS[1]);
    pair.a.use_sealed(REQUIRED);
    pair.b.use_sealed(REQUIRED);
    for _ in 0..3 {
        assert!(pair.a.push(&udp(100), 0));
        assert!(pair.a.seal().is_empty());
    }
    let ping = control(Message::Ping(b"1").bare());
    assert!(pair.a.seal_message(&ping).is_empty());
    assert_eq!((told(&mut pair.a), counted(&pair.a, Verdict::ControlUnsent)), (vec![wanted(SealedWanted::Send)], 1));
    pair.new_session(1, Suite::Aes256Gcm);
    let released = pair.a.release();
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &released).len(), 3);
    pair.assert_frames_are_back();
}

#[test]
fn a_key_that_is_due_is_replaced_when_data_is_sent_and_not_before() {
    let mut pair = sealed();
    pair.a.sealed().poll(boottime() + Duration::from_secs(121));
    let mut outgoing = Vec::new();
    pair.a.datapath.seal_confirmation(0, &mut outgoing);
    outgoing.into_iter().for_each(|out| pair.a.datapath.pool.put(out.frame));
    assert!(told(&mut pair.a).is_empty());
    one(&mut pair);
    assert_eq!(told(&mut pair.a), [wanted(SealedWanted::Send)]);
}

#[test]
fn messages_are_sealed_whatever_key_they_are_meant_for() {
    let mut pair = sealed();
    pair.a.set_key(Slot::Static, &KEYS[1]);
    let messages = [
        Message::Ping(b"").bare(),
        Message::Pong(b"some data").bare(),
        Message::Debug(b"hello").bare(),
        Message::Kill(b"").bare(),
        Message::Dummy(&[7; 200]).bare(),
    ];
    for message in messages {
        let sent = pair.a.seal_message(&control(message.clone()));
        assert_eq!(sent[0].octets.len(), message.len() + OVERHEAD);
        ends(&mut pair, &sent[0], Verdict::ControlReceived);
        let events: Vec<_> = std::iter::from_fn(|| pair.b.reports.try_recv().ok()).collect();
        let came = events.into_iter().any(|(_, report)| match report {
            WorkerReport::Event(Event::Control { payload, sealed, under_static, .. }) => {
                payload[..] == message[..] && sealed && !under_static
            }
            _ => false,
        });
        assert!(came, "{message:?}");
    }
    // Nothing but the handshake makes keys.
    let random = &mut StdRng::seed_from_u64(1);
    for message in [Message::Request.build(0, random).to_vec(), vec![0xFF; 9]] {
        let sent = pair.a.seal_message(&control(message));
        ends(&mut pair, &sent[0], Verdict::BadMessage);
    }
}

#[test]
fn a_packet_without_content_confirms() {
    let mut pair = sealed();
    for _ in 0..2 {
        let mut outgoing = Vec::new();
        pair.a.datapath.seal_confirmation(0, &mut outgoing);
        let out = outgoing.remove(0);
        let octets = pair.a.datapath.umem.chunk(&out.frame)[out.datagram.clone()].to_vec();
        assert!(out.ready && octets.len() == OVERHEAD);
        pair.a.datapath.pool.put(out.frame);
        ends(&mut pair, &Datagram { octets, tos: 0 }, Verdict::ControlReceived);
    }
    let probed = SealedEvent::Probed { serial: 1 };
    assert_eq!(told(&mut pair.b), [SealedEvent::Opened { serial: 1 }, probed.clone(), probed]);
}

#[test]
fn an_event_that_found_no_room_is_told_with_the_next_packet() {
    let mut pair = sealed();
    pair.b.fill_reports();
    let first = one(&mut pair);
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &[first]).len(), 1);
    assert!(told(&mut pair.b).is_empty());
    let next = one(&mut pair);
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &[next]).len(), 1);
    assert_eq!(told(&mut pair.b), [SealedEvent::Opened { serial: 1 }]);
}

#[test]
fn the_congestion_mark_of_the_carrier_reaches_the_inner_packet() {
    let mut pair = sealed();
    let marked = Datagram { tos: 3, ..one(&mut pair) };
    ends(&mut pair, &marked, Verdict::CongestionDrop);
}

#[test]
fn a_peer_that_moves_is_asked_and_answers_sealed() {
    let mut pair = sealed();
    let (home, elsewhere) = (pair.a.me(), SocketAddr::from(([192, 0, 2, 77], 7)));
    let moved = one(&mut pair);
    pair.b.push_datagram(elsewhere, &moved);
    // A replay makes nobody a candidate.
    pair.b.push_datagram(SocketAddr::from(([192, 0, 2, 78], 7)), &moved);
    pair.b.open();
    let questions = pair.b.challenges();
    assert_eq!((questions.len(), questions[0].0, pair.b.tunnel().peer), (1, elsewhere, Some(home)));
    assert!(questions[0].1.octets.starts_with(&PREFIX));
    pair.a.push_datagram(pair.b.me(), &questions[0].1);
    pair.a.open();
    let payload = std::iter::from_fn(|| pair.a.reports.try_recv().ok()).find_map(|(_, report)| match report {
        WorkerReport::Event(Event::Control { payload, .. }) => Some(payload),
        _ => None,
    });
    let Some(Ok(Message::Ping(mark))) = payload.as_deref().map(Message::parse) else { panic!("no CT_PING") };
    let pong = pair.a.seal_message(&control(Message::Pong(mark).bare())).remove(0);
    pair.b.push_datagram(elsewhere, &pong);
    pair.b.open();
    assert_eq!((pair.b.tunnel().peer, counted(&pair.b, Verdict::ControlReceived)), (Some(elsewhere), 1));
    pair.b.tunnel().pinned = true;
    pair.b.device.frames.clear();
    let datagram = one(&mut pair);
    ends(&mut pair, &datagram, Verdict::WrongPeer);
}

#[test]
fn the_source_of_a_session_s_first_packet_is_asked_when_there_is_a_key_to_ask_with() {
    let mut pair = sealed();
    let elsewhere = SocketAddr::from(([192, 0, 2, 77], 7));
    pair.b.tunnel().peer = None;
    pair.b.sealed().stop_sending();
    let first = one(&mut pair);
    pair.b.push_datagram(elsewhere, &first);
    pair.b.open();
    assert!(pair.b.challenges().is_empty() && pair.b.datapath.has_challenges());
    pair.new_session(2, Suite::Aes256Gcm);
    assert_eq!(pair.b.challenges().iter().map(|(to, _)| *to).collect::<Vec<_>>(), [elsewhere]);
    // The key does not come.
    pair.b.sealed().stop_sending();
    pair.b.pass(Duration::from_secs(1));
    let next = one(&mut pair);
    pair.b.push_datagram(elsewhere, &next);
    pair.b.open();
    pair.b.pass(Duration::from_secs(2));
    assert!(pair.b.challenges().is_empty() && !pair.b.datapath.has_challenges());
}

#[test]
fn an_orphan_and_a_tunnel_without_sealed_packets_drop_them() {
    let mut pair = sealed();
    let datagram = one(&mut pair);
    pair.b.tunnel().is_orphaned = true;
    ends(&mut pair, &datagram, Verdict::TunnelDead);
    pair.b.tunnel().is_orphaned = false;
    pair.b.tunnel().sealed = None;
    ends(&mut pair, &datagram, Verdict::BadLength);
}

mod handshakes {
    use rand::rngs::ThreadRng;

    use super::*;
    use crate::engine::datapath::pair::STATIC_KEY;
    use crate::sealed::handshake::{Action, Handshake, Input, Kept, Now, Profile, Wanted};
    use crate::sealed::message::{Carries, RETRY};
    use crate::sealed::secrets::Secrets;

    /// A first message, made with this static key.
    fn first(static_key: &[u8; 16]) -> Datagram {
        let kept = Kept::without_file(0, &mut rand::rng());
        let profile = Profile { fast_aes: true, carries: Carries::Ip };
        let mut handshake: Handshake<ThreadRng> = Handshake::new(Secrets::new(static_key), profile, kept, rand::rng());
        let actions = handshake.handle(Input::Wanted(Wanted::Send), Now { at: Duration::ZERO, unix_nanos: 1 });
        let [Action::Transmit(octets, _)] = &actions[..] else { panic!("no first message") };
        Datagram { octets: octets.clone(), tos: 0 }
    }

    #[test]
    fn messages_with_a_right_mac_go_to_the_daemon_which_judges_them() {
        let mut pair = sealed();
        let message = first(&STATIC_KEY);
        let accounted = pair.b.accounted();
        pair.b.push_datagram(pair.a.me(), &message);
        pair.b.push_datagram(SocketAddr::from(([192, 0, 2, 77], 7)), &message);
        pair.b.open();
        let events: Vec<_> = told(&mut pair.b)
            .into_iter()
            .map(|event| match event {
                SealedEvent::Handshake { datagram, from_peer, .. } => (datagram.to_vec(), from_peer),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(events, [(message.octets.clone(), true), (message.octets.clone(), false)]);
        assert_eq!(pair.b.accounted(), accounted, "it has no verdict yet");
        ends(&mut pair, &first(&[1; 16]), Verdict::BadTag);
        let mut short = message;
        short.octets.pop();
        ends(&mut pair, &short, Verdict::BadLength);
    }

    #[test]
    fn under_load_a_first_message_is_answered_with_a_cookie() {
        let mut pair = sealed();
        let elsewhere = SocketAddr::from(([192, 0, 2, 77], 7));
        pair.b.fill_reports();
        pair.b.push_datagram(elsewhere, &first(&STATIC_KEY));
        pair.b.open();
        assert_eq!(counted(&pair.b, Verdict::ControlFull), 1);
        let answers = pair.b.challenges();
        assert_eq!((answers.len(), answers[0].0, answers[0].1.octets.len()), (1, elsewhere, RETRY));
        assert!(told(&mut pair.b).is_empty());
        pair.assert_frames_are_back();
    }

    #[test]
    fn recorded_messages_do_not_fill_the_queue_that_others_need() {
        let mut pair = sealed();
        let message = first(&STATIC_KEY);
        let (mut passed, mut cookies) = (0, 0);
        for _ in 0..20 {
            (0..20).for_each(|_| pair.b.push_datagram(SocketAddr::from(([192, 0, 2, 77], 7)), &message));
            pair.b.open();
            passed += told(&mut pair.b).len();
            cookies += pair.b.challenges().len();
        }
        // The one that found no room got no cookie; those after it must show one.
        assert_eq!((passed, cookies, counted(&pair.b, Verdict::ControlFull)), (64, 400 - 65, 400 - 64));
        pair.assert_frames_are_back();
    }

    #[test]
    fn messages_of_the_daemon_leave_as_they_are() {
        let mut pair = sealed();
        let message = first(&STATIC_KEY);
        for (to, expected) in [(None, None), (Some(pair.b.me()), None), (Some(pair.a.me()), Some(pair.a.me()))] {
            let mut outgoing = Vec::new();
            pair.a.datapath.queue_handshake(0, &message.octets, to, &mut outgoing);
            let out = outgoing.remove(0);
            assert!(out.ready && pair.a.datapath.umem.chunk(&out.frame)[out.datagram.clone()] == message.octets);
            assert_eq!(out.to.as_deref().copied(), expected);
            pair.a.datapath.pool.put(out.frame);
        }
        pair.a.datapath.queue_handshake(0, &[0; 4096], None, &mut Vec::new());
        assert_eq!(counted(&pair.a, Verdict::ControlUnsent), 1);
        pair.assert_frames_are_back();
    }
}
