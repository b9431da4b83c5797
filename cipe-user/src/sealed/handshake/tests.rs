//! Single steps of the state machine, and what it refuses.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::cipher::KeyOctets;
use super::super::gate::{Gate, Passage};
use super::*;

const KEY: [u8; 16] = [0x11; 16];
const IP: Profile = Profile { fast_aes: true, carries: Carries::Ip };

fn end(id: u64, key: [u8; 16], profile: Profile) -> Handshake<StdRng> {
    let kept = Kept { id, newest: 0, was_sealed: false };
    Handshake::new(Secrets::new(&key), profile, kept, StdRng::seed_from_u64(id))
}

fn at(ms: u64) -> Now {
    Now { at: Duration::from_millis(ms), unix_nanos: 1_000_000 * (1_000 + ms) }
}

fn sent(actions: &[Action]) -> Vec<&[u8]> {
    let datagrams =
        actions.iter().map(|action| if let Action::Transmit(datagram, _) = action { Some(&**datagram) } else { None });
    datagrams.flatten().collect()
}

fn only(actions: &[Action]) -> Vec<u8> {
    let sent = sent(actions);
    assert_eq!(sent.len(), 1);
    sent[0].to_vec()
}

fn refused(actions: &[Action]) -> Option<Refused> {
    actions.iter().find_map(|action| if let Action::Refused(refused) = action { Some(*refused) } else { None })
}

fn send_key(actions: &[Action]) -> Option<&DirectionKey> {
    actions.iter().find_map(|action| if let Action::Send(key, _) = action { Some(key) } else { None })
}

fn receive_key(actions: &[Action]) -> Option<&DirectionKey> {
    actions.iter().find_map(|action| if let Action::Receive(key) = action { Some(key) } else { None })
}

fn begin(end: &mut Handshake<StdRng>, ms: u64) -> Vec<u8> {
    only(&end.handle(Input::Wanted(Wanted::Send), at(ms)))
}

#[test]
fn a_handshake_step_by_step() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let first = begin(&mut a, 0);
    let answered = b.handle(Input::Datagram(&first, Source::Peer), at(10));
    let [Action::Keep(kept), Action::Receive(b_receive), Action::Transmit(answer, To::Source)] = &answered[..] else {
        panic!("what is kept and received under comes before the answer")
    };
    assert_eq!(kept.newest, at(0).unix_nanos);
    let done = a.handle(Input::Datagram(answer, Source::Peer), at(20));
    let [Action::Receive(a_receive), Action::Send(a_send, _), Action::Confirm] = &done[..] else {
        panic!("unexpected")
    };
    assert_eq!((&a_send.octets, a_send.epoch), (&b_receive.octets, b_receive.epoch));
    let confirmed = b.handle(Input::Opened(b_receive.serial), at(30));
    let b_send = send_key(&confirmed).unwrap();
    assert_eq!((&b_send.octets, b_send.epoch), (&a_receive.octets, a_receive.epoch));
    assert_ne!(a_send.octets, b_send.octets);
    assert!(matches!(confirmed.last(), Some(Action::Keep(Kept { was_sealed: true, .. }))));
    // Each probe of the initiator is answered, and none of the responder's.
    assert!(matches!(b.handle(Input::Probed(b_receive.serial), at(40))[..], [Action::Confirm]));
    // Until the responder is heard, the confirmation is repeated.
    assert!(matches!(a.handle(Input::Tick, at(400))[..], [Action::Confirm]));
    a.handle(Input::Opened(a_receive.serial), at(500));
    assert!(a.handle(Input::Probed(a_receive.serial), at(500)).is_empty());
    assert!(a.handle(Input::Tick, at(2_000)).is_empty());
}

/// A busy engine may lose an event.
#[test]
fn a_probe_says_also_that_a_packet_has_opened() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answered = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(10));
    let serial = receive_key(&answered).unwrap().serial;
    let confirmed = b.handle(Input::Probed(serial), at(30));
    assert!(send_key(&confirmed).is_some());
    assert_eq!(confirmed.iter().filter(|action| matches!(action, Action::Confirm)).count(), 1);
    assert!(matches!(confirmed.last(), Some(Action::Keep(Kept { was_sealed: true, .. }))));
    assert!(b.handle(Input::Opened(serial), at(30)).is_empty());
    assert!(matches!(b.handle(Input::Probed(serial), at(40))[..], [Action::Confirm]));
}

#[test]
fn the_suite_is_aes_only_if_it_is_fast_at_both_ends() {
    for (fast, suite) in [
        ([true, true], Suite::Aes256Gcm),
        ([true, false], Suite::ChaCha20Poly1305),
        ([false, true], Suite::ChaCha20Poly1305),
        ([false, false], Suite::ChaCha20Poly1305),
    ] {
        let [mut a, mut b] =
            [(1, fast[0]), (2, fast[1])].map(|(id, fast_aes)| end(id, KEY, Profile { fast_aes, ..IP }));
        let answer = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
        let done = a.handle(Input::Datagram(&only(&answer), Source::Peer), at(0));
        assert_eq!((receive_key(&answer).unwrap().suite, send_key(&done).unwrap().suite), (suite, suite));
    }
}

#[test]
fn a_repeated_first_message_gets_the_same_answer_and_an_older_one_a_retry() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let first = begin(&mut a, 0);
    let answer = only(&b.handle(Input::Datagram(&first, Source::Peer), at(0)));
    assert_eq!(only(&a.handle(Input::Tick, at(400))), first);
    let again = b.handle(Input::Datagram(&first, Source::Peer), at(400));
    assert!(again.len() == 1 && only(&again) == answer);
    // A second attempt of the peer takes the place of the first.
    let mut restarted = end(1, KEY, IP);
    restarted.rng = StdRng::seed_from_u64(99);
    let second = begin(&mut restarted, 500);
    assert_ne!(only(&b.handle(Input::Datagram(&second, Source::Peer), at(500))), answer);
    let stale = b.handle(Input::Datagram(&first, Source::Peer), at(600));
    assert_eq!((refused(&stale), only(&stale).len()), (Some(Refused::Replayed), RETRY));
    // The retry is for an attempt that this end does not make any more.
    assert_eq!(
        refused(&restarted.handle(Input::Datagram(&only(&stale), Source::Peer), at(600))),
        Some(Refused::BadTag)
    );
}

#[test]
fn an_answer_is_taken_once_and_only_for_its_attempt() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answer = only(&b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0)));
    let mut wrong = answer.clone();
    wrong[50] ^= 1;
    assert_eq!(refused(&a.handle(Input::Datagram(&wrong, Source::Peer), at(0))), Some(Refused::BadTag));
    assert!(send_key(&a.handle(Input::Datagram(&answer, Source::Peer), at(0))).is_some());
    assert_eq!(refused(&a.handle(Input::Datagram(&answer, Source::Peer), at(0))), Some(Refused::Replayed));
    begin(&mut a, 1_000);
    assert_eq!(refused(&a.handle(Input::Datagram(&answer, Source::Peer), at(1_000))), Some(Refused::Replayed));
}

#[test]
fn other_keys_other_kinds_and_our_own_messages_are_refused() {
    let mut a = end(1, KEY, IP);
    let first = begin(&mut a, 0);
    for (mut other, verdict) in [
        (end(2, [0x22; 16], IP), Refused::BadTag),
        (end(2, KEY, Profile { carries: Carries::Ethernet, ..IP }), Refused::BadMessage),
        (end(1, KEY, IP), Refused::Reflected),
    ] {
        let actions = other.handle(Input::Datagram(&first, Source::Peer), at(0));
        assert_eq!(refused(&actions), Some(verdict));
        assert!(sent(&actions).is_empty() && other.kept.newest == 0);
    }
}

#[test]
fn an_end_with_a_clock_far_behind_goes_on_from_the_peers_stamp() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    b.kept.newest = STAMP_END - 10;
    let stale = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
    let again = a.handle(Input::Datagram(&only(&stale), Source::Peer), at(0));
    assert!(receive_key(&b.handle(Input::Datagram(&only(&again), Source::Peer), at(0))).is_some());
    assert_eq!(b.kept.newest, STAMP_END - 9);
}

/// Only an end with the static key can send such a stamp, and it must not use up those of others.
#[test]
fn stamps_behind_the_last_one_are_refused() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    a.last_stamp = STAMP_END - 1;
    let refusal = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
    assert_eq!((refused(&refusal), b.kept.newest), (Some(Refused::BadMessage), 0));
    assert!(sent(&refusal).is_empty());
    let mut a = end(1, KEY, IP);
    let first = begin(&mut a, 0);
    let retry = Retry { newest: STAMP_END, ..Retry::default() };
    let retry = retry.build(&Secrets::new(&KEY), first[..].try_into().unwrap(), &mut rand::rng());
    assert_eq!(refused(&a.handle(Input::Datagram(&retry, Source::Peer), at(0))), Some(Refused::BadMessage));
    assert_eq!(a.last_stamp, at(0).unix_nanos);
}

#[test]
fn an_absurd_clock_does_not_use_up_the_stamps() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let absurd = Now { unix_nanos: u64::MAX, ..at(0) };
    let first = only(&a.handle(Input::Wanted(Wanted::Send), absurd));
    assert!(receive_key(&b.handle(Input::Datagram(&first, Source::Peer), at(0))).is_some());
    assert_eq!(b.kept.newest, (1 << 63) - 1);
}

#[test]
fn a_cookie_is_used_soon_and_survives_a_newer_stamp() {
    let (mut a, gate, secrets) = (end(1, KEY, IP), Gate::new(&KeyOctets::default()), Secrets::new(&KEY));
    let judge =
        |datagram: &[u8]| gate.judge(&secrets, datagram, b"a", true, Duration::ZERO, &mut StdRng::seed_from_u64(5));
    let Passage::Challenge(retry) = judge(&begin(&mut a, 0)) else { panic!("a cookie is missing") };
    assert!(a.handle(Input::Datagram(&retry, Source::Peer), at(10)).is_empty());
    let repeated = only(&a.handle(Input::Tick, at(250)));
    assert_eq!(judge(&repeated), Passage::Pass);
    // The same retry again makes it send nothing sooner.
    let due = a.deadline();
    a.handle(Input::Datagram(&retry, Source::Peer), at(260));
    assert_eq!(a.deadline(), due);
    let mut b = end(2, KEY, IP);
    b.kept.newest = u64::MAX / 2;
    let stale = only(&b.handle(Input::Datagram(&repeated, Source::Peer), at(300)));
    assert_eq!(judge(&only(&a.handle(Input::Datagram(&stale, Source::Peer), at(310)))), Passage::Pass);
}

/// Somebody on the side has a cookie sent to us that is for his own address.
#[test]
fn a_wrong_cookie_does_not_take_away_the_right_one() {
    let (mut a, gate, secrets) = (end(1, KEY, IP), Gate::new(&KeyOctets::default()), Secrets::new(&KEY));
    let judge = |datagram: &[u8], source: &[u8]| {
        gate.judge(&secrets, datagram, source, true, Duration::ZERO, &mut StdRng::seed_from_u64(5))
    };
    let first = begin(&mut a, 0);
    for source in [b"a", b"x"] {
        let Passage::Challenge(retry) = judge(&first, source) else { panic!("a cookie is missing") };
        a.handle(Input::Datagram(&retry, Source::Other), at(10));
    }
    let repeated = [250, 2_000, 4_000].map(|ms| only(&a.handle(Input::Tick, at(ms))));
    assert_eq!(repeated.each_ref().map(|repeated| judge(repeated, b"a") == Passage::Pass), [false, true, false]);
}

#[test]
fn the_end_with_the_greater_id_goes_on() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let (of_a, of_b) = (begin(&mut a, 0), begin(&mut b, 0));
    assert!(b.handle(Input::Datagram(&of_a, Source::Peer), at(10)).is_empty());
    assert_eq!(b.kept.newest, 0);
    let answer = only(&a.handle(Input::Datagram(&of_b, Source::Peer), at(10)));
    assert!(send_key(&b.handle(Input::Datagram(&answer, Source::Peer), at(20))).is_some());
    assert!(a.attempt.is_none());
}

/// Our first message goes to an address where the peer is not any more.
#[test]
fn a_first_message_from_elsewhere_is_answered_and_our_attempt_goes_on() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let (of_a, of_b) = (begin(&mut a, 0), begin(&mut b, 0));
    let answered = b.handle(Input::Datagram(&of_a, Source::Other), at(10));
    let receive = receive_key(&answered).unwrap();
    assert_ne!(receive.epoch, b.attempt.as_ref().unwrap().epoch);
    assert_eq!(only(&b.handle(Input::Tick, at(400))), of_b);
    assert!(send_key(&a.handle(Input::Datagram(&only(&answered), Source::Peer), at(20))).is_some());
    assert_eq!(send_key(&b.handle(Input::Opened(receive.serial), at(500))).unwrap().serial, receive.serial);
    assert!(b.attempt.is_none());
}

/// With all epochs in use: neither the session in use nor the attempt loses its own.
#[test]
fn the_epoch_of_an_attempt_and_of_the_session_in_use_are_not_taken() {
    let mut b = end(9, KEY, IP);
    let mut in_use = None;
    for n in 0..2 {
        let answered = b.handle(Input::Datagram(&begin(&mut end(1, KEY, IP), n), Source::Peer), at(n));
        let serial = receive_key(&answered).unwrap().serial;
        in_use = send_key(&b.handle(Input::Opened(serial), at(n))).map(|key| key.serial);
    }
    begin(&mut b, 10);
    let attempt = b.attempt.as_ref().unwrap().epoch;
    for n in 20..30 {
        let answered = b.handle(Input::Datagram(&begin(&mut end(1, KEY, IP), n), Source::Other), at(n));
        assert_ne!(receive_key(&answered).unwrap().epoch, attempt);
        assert!(!answered.iter().any(|action| matches!(action, Action::Forget(serial) if Some(*serial) == in_use)));
    }
}

/// Somebody delivers a first message that he has kept back, between our answer and its confirmation.
#[test]
fn an_answer_is_confirmed_after_a_later_one_was_given() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answered = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
    let serial = receive_key(&answered).unwrap().serial;
    b.handle(Input::Datagram(&begin(&mut end(1, KEY, IP), 5), Source::Peer), at(5));
    assert_eq!(send_key(&b.handle(Input::Opened(serial), at(10))).unwrap().serial, serial);
}

#[test]
fn an_initiator_that_is_not_confirmed_keeps_its_key_and_begins_again() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answer = only(&b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0)));
    a.handle(Input::Datagram(&answer, Source::Peer), at(0));
    let mut attempts = std::collections::HashSet::new();
    let mut forgotten = None;
    while let Some(due) = a.deadline() {
        for action in a.handle(Input::Tick, Now { at: due, unix_nanos: 0 }) {
            match action {
                Action::Transmit(datagram, _) => {
                    attempts.insert(datagram);
                }
                Action::Forget(_) => forgotten = Some(due),
                _ => {}
            }
        }
    }
    assert_eq!((attempts.len(), forgotten), (1, Some(Duration::from_secs(240))));
}

#[test]
fn an_end_without_a_file_refuses_what_was_recorded_before() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let recorded = begin(&mut a, 0);
    b.kept = Kept::without_file(at(1).unix_nanos, &mut b.rng);
    assert_eq!(refused(&b.handle(Input::Datagram(&recorded, Source::Peer), at(1))), Some(Refused::Replayed));
    assert_eq!(Kept::without_file(u64::MAX, &mut b.rng).newest, CLOCK_END);
}

/// The peer has begun, and is then never heard again.
#[test]
fn a_responder_begins_itself_if_it_is_not_confirmed() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
    assert!(b.handle(Input::Wanted(Wanted::Send), at(1_000)).is_empty());
    assert_eq!(b.deadline(), Some(ANSWER_WAIT));
    assert_eq!(only(&b.handle(Input::Tick, at(5_000)))[7], Kind::First as u8);
}

#[test]
fn a_late_confirmation_of_an_older_session_does_not_take_the_send_key_back() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answered = b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0));
    let older = receive_key(&answered).unwrap().serial;
    let answer = only(&a.handle(Input::Datagram(&begin(&mut b, 6_000), Source::Peer), at(6_000)));
    assert!(send_key(&b.handle(Input::Datagram(&answer, Source::Peer), at(6_000))).is_some());
    let late = b.handle(Input::Opened(older), at(6_100));
    assert!(send_key(&late).is_none() && !late.iter().any(|action| matches!(action, Action::Confirm)));
    // The newer session is still to be confirmed.
    assert!(matches!(b.handle(Input::Tick, at(7_000))[..], [Action::Confirm]));
}

#[test]
fn an_attempt_ends_when_nothing_waits_for_it() {
    let mut a = end(1, KEY, IP);
    let first = begin(&mut a, 0);
    let mut repetitions = 0;
    while let Some(due) = a.deadline() {
        let now = Now { at: due, unix_nanos: 0 };
        let actions = a.handle(Input::Tick, now);
        repetitions += sent(&actions).len();
        assert!(sent(&actions).iter().all(|datagram| **datagram == first));
    }
    assert!((15..25).contains(&repetitions), "{repetitions}");
    // Something waits: another attempt, with another key.
    begin(&mut a, 100_000);
    a.handle(Input::Wanted(Wanted::Send), at(110_000));
    let actions = a.handle(Input::Tick, at(190_000));
    assert!(matches!(actions[0], Action::Log(Note::NoAnswer { .. })));
    assert_ne!(only(&actions), first);
}

#[test]
fn packets_without_a_key_cause_few_attempts() {
    let mut a = end(1, KEY, IP);
    assert_eq!(sent(&a.handle(Input::Wanted(Wanted::Receive), at(0))).len(), 1);
    let mut b = end(2, KEY, IP);
    let mut attempts = 0;
    for second in 1..60 {
        for action in a.handle(Input::Wanted(Wanted::Receive), at(second * 1_000)) {
            if let Action::Transmit(datagram, _) = action {
                attempts += 1;
                let answer = only(&b.handle(Input::Datagram(&datagram, Source::Peer), at(second * 1_000)));
                a.handle(Input::Datagram(&answer, Source::Peer), at(second * 1_000));
            }
        }
        if let Some(attempt) = &a.attempt {
            let message = attempt.message;
            let answer = only(&b.handle(Input::Datagram(&message, Source::Peer), at(second * 1_000)));
            a.handle(Input::Datagram(&answer, Source::Peer), at(second * 1_000));
        }
    }
    assert!(attempts <= 4, "{attempts}");
}

#[test]
fn an_engine_never_has_more_than_three_receive_keys_with_different_epochs() {
    let mut b = end(2, KEY, IP);
    let mut held: Vec<(u64, Epoch)> = Vec::new();
    for n in 0..30 {
        let mut a = end(1, KEY, IP);
        let first = begin(&mut a, n * 10);
        for action in b.handle(Input::Datagram(&first, Source::Peer), at(n * 10)) {
            match action {
                Action::Forget(serial) => held.retain(|key| key.0 != serial),
                Action::Receive(key) => {
                    assert!(held.iter().all(|(_, epoch)| *epoch != key.epoch));
                    held.push((key.serial, key.epoch));
                }
                _ => {}
            }
        }
        if n == 5 {
            // This one is in use, and is still there when others have come that were not.
            b.handle(Input::Opened(held.last().unwrap().0), at(n * 10));
        }
        assert!(held.len() <= 3 && (n < 5 || held.iter().any(|key| key.0 == 6)));
    }
}

#[test]
fn the_engine_is_told_to_wipe_all_keys_when_they_are_lost() {
    let (mut a, mut b) = (end(1, KEY, IP), end(2, KEY, IP));
    let answer = only(&b.handle(Input::Datagram(&begin(&mut a, 0), Source::Peer), at(0)));
    a.handle(Input::Datagram(&answer, Source::Peer), at(0));
    assert!(matches!(a.handle(Input::KeysLost, at(0))[..], [Action::Forget(1), Action::StopSending]));
    assert!(matches!(b.handle(Input::KeysLost, at(0))[..], [Action::Forget(1)]));
    assert!(a.deadline().is_none() && b.deadline().is_none());
    assert!(b.handle(Input::Opened(1), at(0)).is_empty());
}
