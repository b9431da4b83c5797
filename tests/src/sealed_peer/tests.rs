//! The two implementations speak with each other.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use cipe_user::sealed::cipher::{Key, KeyOctets, Suite as OurSuite};
use cipe_user::sealed::counter;
use cipe_user::sealed::direction::{ReceiveKey, SendKey};
use cipe_user::sealed::gate::{Gate, Passage};
use cipe_user::sealed::handshake::{
    Action, DirectionKey, Handshake, Input, Kept, Now, Profile, STAMP_END, Source, Wanted,
};
use cipe_user::sealed::message::{Carries, FIRST, Retry};
use cipe_user::sealed::packet::{self, Content, HEADROOM, Header, OVERHEAD};
use cipe_user::sealed::secrets::Secrets;
use cipe_user::sealed::window::Window;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;

const KEY: [u8; 16] = [0xA7; 16];

fn theirs(fast_aes: bool) -> SealedPeer {
    SealedPeer { static_key: KEY, id: [9; 8], fast_aes, carries: 3 }
}

fn ours(id: u64, fast_aes: bool) -> Handshake<StdRng> {
    let profile = Profile { fast_aes, carries: Carries::Ip };
    Handshake::new(Secrets::new(&KEY), profile, Kept { id, newest: 0, was_sealed: false }, StdRng::seed_from_u64(id))
}

fn now(unix_nanos: u64) -> Now {
    Now { at: Duration::from_secs(1), unix_nanos }
}

fn datagram(actions: &[Action]) -> Vec<u8> {
    let sent = actions.iter().find_map(|action| if let Action::Transmit(sent, _) = action { Some(sent) } else { None });
    sent.expect("a datagram").clone()
}

fn key(actions: &[Action], sends: bool) -> &DirectionKey {
    let key = actions.iter().find_map(|action| match action {
        Action::Send(key, _) if sends => Some(key),
        Action::Receive(key) if !sends => Some(key),
        _ => None,
    });
    key.expect("a key")
}

fn same(ours: &DirectionKey, theirs: &Direction) {
    let suite = if theirs.suite == Suite::Aes256Gcm { OurSuite::Aes256Gcm } else { OurSuite::ChaCha20Poly1305 };
    assert_eq!((ours.suite, ours.epoch.number(), *ours.octets), (suite, theirs.epoch, theirs.key));
}

/// Packets of either implementation are opened by the other one.
fn packets_pass(ours: &DirectionKey, theirs: &Direction, counter: u64, payload: &[u8]) {
    let key = || Key::new(ours.suite, &ours.octets);
    let send = SendKey::new(key(), ours.epoch, Box::new(AtomicU64::new(counter)));
    let mut buffer = vec![0; payload.len() + OVERHEAD];
    buffer[HEADROOM..HEADROOM + payload.len()].copy_from_slice(payload);
    send.batch(1).seal(Content::Control, &mut buffer, payload.len()).expect("a counter is left");
    assert_eq!(theirs.open(counter, &buffer), Some((counter, 1, payload.to_vec())));

    let window = Window::default();
    let near = counter.saturating_sub(1_000);
    window.accept(near).expect("the first one");
    let receive = ReceiveKey::new(key(), window);
    let mut sealed = theirs.seal(counter, 0, payload);
    if near != counter {
        let Ok(Header::Packet(epoch, low)) = packet::parse(&sealed) else { panic!("not a packet") };
        assert_eq!(epoch, ours.epoch);
        let (content, place) = receive.open(low, &mut sealed).expect("it is genuine");
        assert_eq!((content, &sealed[place]), (Content::Data, payload));
    }
}

proptest! {
    #[test]
    fn either_begins_and_both_have_the_same_keys(
        private: [u8; 32], stamp in 1..STAMP_END, epoch in 1u8..4, fast: [bool; 2], id: u64,
        counter in 0..counter::END, payload: Vec<u8>,
    ) {
        let (peer, mut end) = (theirs(fast[0]), ours(id, fast[1]));
        prop_assume!(id != u64::from_be_bytes(peer.id));
        let (first, begun) = peer.begin(private, stamp, epoch);
        let answered = end.handle(Input::Datagram(&first, Source::Peer), now(0));
        let session = peer.finish(begun, &datagram(&answered)).expect("our answer");
        same(key(&answered, false), &session.of_initiator);
        packets_pass(key(&answered, false), &session.of_initiator, counter, &payload);
        let confirmed = end.handle(Input::Opened(key(&answered, false).serial), now(0));
        same(key(&confirmed, true), &session.of_responder);

        let mut end = ours(id, fast[1]);
        let began = end.handle(Input::Wanted(Wanted::Send), now(stamp));
        let (said, answer, session) = peer.answer(&datagram(&began), private, epoch).expect("our first message");
        // A clock beyond 2262 counts as that year.
        prop_assert_eq!(said, First { stamp: stamp.min((1 << 63) - 1), id: id.to_be_bytes() });
        let done = end.handle(Input::Datagram(&answer, Source::Peer), now(stamp));
        same(key(&done, false), &session.of_responder);
        same(key(&done, true), &session.of_initiator);
        packets_pass(key(&done, true), &session.of_initiator, counter, &payload);
    }

    #[test]
    fn retries_are_understood_both_ways(private: [u8; 32], iv: [u8; 12], newest in 1..STAMP_END, cookie: [u8; 16]) {
        let peer = theirs(true);
        let (first, _) = peer.begin(private, 1, 1);
        let whole: &[u8; FIRST] = first[..].try_into().unwrap();
        let retry = Retry { newest, cookie }.build(&Secrets::new(&KEY), whole, &mut rand::rng());
        prop_assert_eq!(peer.read_retry(&first, &retry), Some((newest, cookie)));

        // An older stamp of ours than the peer knows: the next first message has a newer one.
        let mut end = ours(1, true);
        let first = datagram(&end.handle(Input::Wanted(Wanted::Send), now(0)));
        let again = end.handle(Input::Datagram(&peer.retry(&first, iv, newest, &[0; 16]), Source::Peer), now(0));
        let (said, ..) = peer.answer(&datagram(&again), private, 1).expect("another first message");
        prop_assert_eq!(said.stamp, newest + 1);
    }
}

#[test]
fn a_cookie_of_our_gate_is_used_by_the_peer() {
    let (peer, gate, secrets) = (theirs(true), Gate::new(&KeyOctets::default()), Secrets::new(&KEY));
    let judge = |datagram: &[u8]| {
        gate.judge(&secrets, datagram, b"192.0.2.1:6789", true, Duration::ZERO, &mut StdRng::seed_from_u64(1))
    };
    let (first, _) = peer.begin([3; 32], 1, 1);
    let Passage::Challenge(retry) = judge(&first) else { panic!("no cookie is asked for") };
    let (newest, cookie) = peer.read_retry(&first, &retry).expect("our retry");
    assert_eq!((newest, judge(&peer.with_cookie(&first, &cookie))), (0, Passage::Pass));
}
