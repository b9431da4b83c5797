//! A peer that comes from another address.

use super::*;
use crate::control::protocol::{MessageOctets, Under};
use crate::engine::datapath::ControlMessage;
use crate::wire::clear::{self, Clear};
use crate::wire::message::Message;

const STATIC_KEY: [u8; KEY] = [9; KEY];

fn somewhere(port: u16) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 77], port))
}

/// Two ends with keys of both kinds for `a`'s packets to `b`.
fn with_static_key() -> Pair {
    let mut pair = pair();
    pair.a.set_key(Slot::Static, &STATIC_KEY);
    pair.b.set_key(Slot::Static, &STATIC_KEY);
    pair
}

/// A new data packet of `a` comes to `b` from this address, and is delivered. Returns the questions that it causes.
fn packet_from(pair: &mut Pair, from: SocketAddr) -> Vec<(SocketAddr, Datagram)> {
    assert!(pair.a.push(&udp(100), 0));
    let sealed = pair.a.seal();
    let delivered = counted(&pair.b, Verdict::Delivered);
    sealed.iter().for_each(|datagram| pair.b.push_datagram(from, datagram));
    pair.b.open();
    assert_eq!(counted(&pair.b, Verdict::Delivered) - delivered, 1);
    pair.b.challenges()
}

/// `a` opens a question of `b`, and answers as its daemon does.
fn answer(pair: &mut Pair, question: &Datagram) -> Datagram {
    pair.a.push_datagram(pair.b.me(), question);
    pair.a.open();
    let mut payloads = std::iter::from_fn(|| pair.a.reports.try_recv().ok()).filter_map(|(_, report)| match report {
        WorkerReport::Event(Event::Control { payload, .. }) => Some(payload),
        _ => None,
    });
    let payload = payloads.next().expect("the question comes to the daemon");
    drop(payloads);
    let Ok(Message::Ping(data)) = Message::parse(&payload) else { panic!("no CT_PING") };
    let octets = MessageOctets(Message::Pong(data).build(0, &mut StdRng::seed_from_u64(1)));
    let message = ControlMessage { octets, under: Under::Live, announces: false };
    pair.a.seal_message(&message).remove(0)
}

fn receive(pair: &mut Pair, from: SocketAddr, datagram: &Datagram) {
    pair.b.push_datagram(from, datagram);
    pair.b.open();
}

fn moves(end: &mut End) -> Vec<SocketAddr> {
    let reports = std::iter::from_fn(|| end.reports.try_recv().ok());
    let moves = reports.filter_map(|(_, report)| match report {
        WorkerReport::NewPeer { peer, .. } => Some(peer),
        _ => None,
    });
    moves.collect()
}

#[test]
fn a_peer_moves_when_it_has_answered_from_there_and_not_before() {
    let mut pair = with_static_key();
    let (home, elsewhere) = (pair.a.me(), somewhere(7));
    let questions = packet_from(&mut pair, elsewhere);
    assert_eq!(questions.len(), 1);
    let (to, question) = &questions[0];
    assert_eq!((*to, question.octets[0] & 0x80), (elsewhere, 0), "under the key that every peer has");
    assert_eq!((pair.b.tunnel().peer, moves(&mut pair.b)), (Some(home), vec![]));

    // The answer comes from another place: the question was only passed on.
    let pong = answer(&mut pair, question);
    receive(&mut pair, somewhere(8), &pong);
    assert_eq!(pair.b.tunnel().peer, Some(home));
    assert_eq!(pair.b.challenges()[0].0, somewhere(8));
    receive(&mut pair, elsewhere, &pong);
    assert_eq!((pair.b.tunnel().peer, counted(&pair.b, Verdict::Replayed)), (Some(home), 1), "a recorded answer");

    pair.b.pass(std::time::Duration::from_secs(1));
    let (_, question) = packet_from(&mut pair, elsewhere).remove(0);
    let pong = answer(&mut pair, &question);
    receive(&mut pair, elsewhere, &pong);
    assert_eq!((pair.b.tunnel().peer, moves(&mut pair.b)), (Some(elsewhere), vec![elsewhere]));
    assert!(packet_from(&mut pair, elsewhere).is_empty(), "nothing is left to prove");
    pair.assert_frames_are_back();
}

#[test]
fn an_unknown_peer_gets_no_data_before_it_has_answered() {
    let mut pair = with_static_key();
    pair.b.tunnel().peer = None;
    let home = pair.a.me();
    let (_, question) = packet_from(&mut pair, home).remove(0);
    assert_eq!((pair.b.tunnel().peer, pair.b.tunnel().common.asker()), (None, Some(home)));
    // Answers to its questions would help who passes them on.
    let pong = MessageOctets(Message::Pong(b"x").build(0, &mut StdRng::seed_from_u64(1)));
    let pong = ControlMessage { octets: pong, under: Under::Live, announces: false };
    assert!(pair.b.seal_message(&pong).is_empty());
    assert_eq!(counted(&pair.b, Verdict::ControlUnsent), 1);

    let answered = answer(&mut pair, &question);
    receive(&mut pair, home, &answered);
    assert_eq!((pair.b.tunnel().peer, moves(&mut pair.b)), (Some(home), vec![home]));
    pair.assert_frames_are_back();
}

#[test]
fn key_exchange_under_the_static_key_goes_to_a_candidate_too_and_answers_to_pings_do_not() {
    let mut pair = with_static_key();
    pair.b.set_key(Slot::Send, &KEYS[1]);
    packet_from(&mut pair, somewhere(7));
    let random = &mut StdRng::seed_from_u64(1);
    for (message, under, copies) in [
        (Message::Request, Under::Static, 2),
        (Message::Request, Under::Live, 1),
        (Message::Pong(b"x"), Under::Static, 1),
    ] {
        let octets = MessageOctets(message.build(0, random));
        let message = ControlMessage { octets, under, announces: false };
        let sealed = pair.b.seal_message(&message);
        assert_eq!(sealed.len(), copies);
        assert!(sealed.iter().all(|copy| *copy == sealed[0]));
    }
    pair.assert_frames_are_back();
}

#[test]
fn a_move_is_told_of_until_that_is_heard() {
    let mut pair = with_static_key();
    let elsewhere = somewhere(7);
    let (_, question) = packet_from(&mut pair, elsewhere).remove(0);
    let pong = answer(&mut pair, &question);
    pair.b.fill_reports();
    receive(&mut pair, elsewhere, &pong);
    assert_eq!((pair.b.tunnel().peer, moves(&mut pair.b)), (Some(elsewhere), vec![]));
    packet_from(&mut pair, elsewhere);
    assert_eq!(moves(&mut pair.b), [elsewhere]);
    packet_from(&mut pair, elsewhere);
    assert_eq!(moves(&mut pair.b), [], "told twice");
}

#[test]
fn without_encryption_the_first_source_is_the_peer_and_moves_by_an_answer_in_clear() {
    let mut pair = pair();
    for end in [&mut pair.a, &mut pair.b] {
        end.tunnel().nokey = true;
    }
    pair.b.tunnel().peer = None;
    let home = pair.a.me();
    assert!(packet_from(&mut pair, home).is_empty());
    assert_eq!((pair.b.tunnel().peer, moves(&mut pair.b)), (Some(home), vec![home]));

    let elsewhere = somewhere(7);
    let (to, question) = packet_from(&mut pair, elsewhere).remove(0);
    assert_eq!((to, pair.b.tunnel().peer), (elsewhere, Some(home)));
    let Clear::Ping(data) = Clear::parse(&question.octets) else { panic!("no CT_PING in clear") };
    let pong = clear::datagram(&Message::Pong(data), 0, &mut StdRng::seed_from_u64(1));
    let pong = Datagram { octets: pong, tos: 0 };
    receive(&mut pair, somewhere(8), &pong);
    assert_eq!(pair.b.tunnel().peer, Some(home));
    receive(&mut pair, elsewhere, &pong);
    assert_eq!((pair.b.tunnel().peer, counted(&pair.b, Verdict::ClearControl)), (Some(elsewhere), 2));
    pair.assert_frames_are_back();
}

#[test]
fn an_answer_in_clear_moves_no_peer_that_has_a_key() {
    let mut pair = with_static_key();
    let elsewhere = somewhere(7);
    let mark = pair.b.tunnel().common.challenge.ask(elsewhere, false, std::time::Instant::now()).unwrap();
    let octets = clear::datagram(&Message::Pong(&mark), 0, &mut StdRng::seed_from_u64(1));
    let home = pair.a.me();
    receive(&mut pair, elsewhere, &Datagram { octets, tos: 0 });
    assert_eq!(pair.b.tunnel().peer, Some(home));
}
