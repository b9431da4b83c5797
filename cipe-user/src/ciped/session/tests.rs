use std::path::Path;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::ciped::options::{self, Draft, Program};
use crate::control::protocol::Wanted;

fn options(extra: &str) -> Options {
    let text = format!(
        "ipaddr 10.9.0.1\nptpaddr 10.9.0.2\npeer 192.0.2.2:6789\nkey 000102030405060708090a0b0c0d0e0f\n{extra}\n"
    );
    let (mut draft, mut problems) = (Draft::new(Program::Cb), Vec::new());
    options::read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
    options::settle(&draft, problems).0.unwrap()
}

fn at(seconds: u32) -> Now {
    Now { at: Duration::from_secs(seconds.into()), unix: 1_000_000 + seconds }
}

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

fn session(seed: u64, extra: &str) -> Session<StdRng> {
    Session::new(&options(extra), at(0), (rng(seed), rng(seed + 1)))
}

fn received(payload: &[u8]) -> Event {
    Event::Control { payload: hex::encode(payload), from: "192.0.2.2:6789".parse().unwrap(), under_static: false }
}

fn logs(steps: &[Step]) -> Vec<&str> {
    steps.iter().filter_map(|step| if let Step::Log(_, text) = step { Some(text.as_str()) } else { None }).collect()
}

fn sent(steps: &[Step]) -> Vec<Vec<u8>> {
    let payload = |step: &Step| match step {
        Step::Send(Request::SendControl { payload }) => Some(hex::decode(payload).unwrap()),
        _ => None,
    };
    steps.iter().filter_map(payload).collect()
}

#[test]
fn a_ping_is_echoed_verbatim() {
    let ping = Message::Ping(b"echo me").build(1_000_000, &mut rng(9));
    let answers = sent(&session(1, "").event(&received(&ping), at(0)));
    assert_eq!(answers.len(), 1);
    assert_eq!((answers[0][0], &answers[0][1..8]), (0x73, &b"echo me"[..]));
}

#[test]
fn pings_go_out_in_time_and_a_missing_pong_is_an_error() {
    let mut session = session(1, "ping 10\ntoping 3\nmaxerr 1");
    assert_eq!(session.deadline(), Some(Duration::from_secs(10)));
    assert_eq!(sent(&session.tick(at(10)))[0][0], 0x72);
    let pong = Message::Pong(b"").build(1_000_000, &mut rng(9));
    session.event(&received(&pong), at(11));
    assert!(logs(&session.tick(at(13))).is_empty());
    session.tick(at(20));
    assert_eq!(logs(&session.tick(at(23))), ["no answer to a ping; network error 1 since the last key exchange"]);
    session.tick(at(30));
    assert!(session.tick(at(33)).iter().any(|step| matches!(step, Step::End(End::Failed(_)))));
}

#[test]
fn a_dead_peer_does_not_fill_the_log() {
    let mut session = session(1, "maxerr -1");
    let error = Event::NetworkError { message: "port unreachable".to_owned() };
    let lines: usize = (0..10_000).map(|_| logs(&session.event(&error, at(1))).len()).sum();
    assert_eq!(lines, 14);
}

#[test]
fn messages_outside_the_time_window_do_nothing_but_a_log_line() {
    let mut session = session(1, "tokxts 30");
    let old = Message::Ping(b"").build(1_000_000 - 31, &mut rng(9));
    let steps = session.event(&received(&old), at(0));
    assert!(sent(&steps).is_empty() && logs(&steps)[0].contains("tokxts=30"));
    let new = Message::Ping(b"").build(1_000_000 - 30, &mut rng(9));
    assert_eq!(sent(&session.event(&received(&new), at(0))).len(), 1);
}

#[test]
fn the_peer_s_text_is_one_line_in_the_log() {
    let text = Message::Debug(b"hello\nroot: all is well\x1b[2J").build(1_000_000, &mut rng(9));
    let steps = session(1, "").event(&received(&text), at(0));
    assert_eq!(logs(&steps), ["the peer says: hello\\nroot: all is well\\x1b[2J"]);
}

#[test]
fn what_is_no_message_is_said_and_dropped() {
    let mut session = session(1, "");
    for payload in [&[][..], &[0x99; 60], &[2; 60]] {
        let steps = session.event(&received(payload), at(0));
        assert!(sent(&steps).is_empty() && logs(&steps).len() == 1);
    }
    let odd = Event::Control { payload: "xyz".into(), from: "192.0.2.2:1".parse().unwrap(), under_static: true };
    assert_eq!(logs(&session.event(&odd, at(0))).len(), 1);
}

#[test]
fn a_peer_of_our_own_kind_gets_longer_keys_and_an_original_does_not() {
    let mut ends = [session(1, ""), session(5, "")];
    let mut queue = vec![(0, Event::KeyWanted { reason: Wanted::NoSendKey })];
    let mut limits = Vec::new();
    while let Some((end, event)) = queue.pop() {
        let steps = ends[end].event(&event, at(1));
        queue.extend(sent(&steps).iter().map(|payload| (1 - end, received(payload))));
        for step in steps {
            if let Step::Send(Request::SetSendLimits { packets, .. }) = step {
                limits.push((end, packets));
            }
        }
    }
    limits.sort_unstable();
    assert_eq!(limits, [(0, OWN_PACKETS), (1, OWN_PACKETS)]);
    assert_eq!(ends[0].send_packets(), OWN_PACKETS);
    assert_eq!(session(1, "").send_packets(), ORIGINAL_PACKETS);
}

#[test]
fn a_reload_changes_pings_at_once() {
    let mut session = session(1, "");
    assert_eq!(session.deadline(), None);
    session.reload(&options("ping 5"), at(100));
    assert_eq!(session.deadline(), Some(Duration::from_secs(105)));
}

#[test]
fn a_send_key_that_an_original_has_forgotten_is_dropped_and_one_of_our_own_kind_is_kept() {
    let mut alice = session(1, "tokey 10");
    let wanted = Event::KeyWanted { reason: Wanted::NoSendKey };
    let indication = sent(&alice.event(&wanted, at(1))).remove(0);
    let sum = indication[17..21].try_into().unwrap();
    let answer = received(&Message::Acknowledgement { sum }.build(1_000_000, &mut rng(9)));
    let is_drop = |step: &Step| matches!(step, Step::Send(Request::DropSendKey));
    assert!(!alice.event(&answer, at(2)).iter().any(is_drop));
    assert_eq!(alice.deadline(), Some(Duration::from_secs(17)));
    assert!(!alice.tick(at(16)).iter().any(is_drop));
    assert!(alice.tick(at(17)).iter().any(is_drop));
    assert_eq!(alice.deadline(), None);
    // The next packet asks for a key again.
    assert_eq!(sent(&alice.event(&wanted, at(99)))[0][0], 2);

    let mut bob = session(3, "tokey 10");
    let indication = sent(&bob.event(&wanted, at(1))).remove(0);
    let sum = indication[17..21].try_into().unwrap();
    let marker = received(&Message::Dummy(b"CIPEkeep\0").build(1_000_000, &mut rng(9)));
    bob.event(&marker, at(2));
    bob.event(&received(&Message::Acknowledgement { sum }.build(1_000_000, &mut rng(9))), at(2));
    assert!(!bob.tick(at(17)).iter().any(is_drop));
}

#[test]
fn a_new_address_of_ours_is_told_and_made_known_to_the_peer() {
    let mut session = session(1, "");
    let [none, first, second] = ["0.0.0.0:6789", "192.0.2.1:6789", "192.0.2.9:6789"].map(|text| text.parse().unwrap());
    let steps = session.event(&Event::NewMe { me: first, before: none }, at(1));
    assert_eq!(logs(&steps), ["my address is 192.0.2.1:6789"]);
    assert!(sent(&steps).is_empty());
    let steps = session.event(&Event::NewMe { me: second, before: first }, at(2));
    assert_eq!(logs(&steps), ["changing my address: 192.0.2.9:6789"]);
    assert_eq!(sent(&steps)[0][0], 0x72);
    assert!(steps.iter().any(|step| matches!(step, Step::Me(me) if *me == second)));
}

#[test]
fn a_peer_that_does_not_answer_is_looked_up() {
    let looks_up = |steps: &[Step]| steps.iter().any(|step| matches!(step, Step::LookUpPeer));
    let mut session = session(1, "ping 10\ntoping 3\nmaxerr -1");
    session.tick(at(10));
    assert!(looks_up(&session.tick(at(13))), "an unanswered ping");
    assert!(looks_up(&session.network_error("port unreachable")), "a network error");
    session.event(&Event::KeyWanted { reason: Wanted::NoSendKey }, at(20));
    assert!((21..60).any(|second| looks_up(&session.tick(at(second)))), "an unanswered NK_IND");
}

#[test]
fn what_is_as_it_should_be_is_no_warning() {
    for (well, expected) in [(true, Level::Info), (false, Level::Warning)] {
        let event = Event::Notice { message: "wire0: native XDP".to_owned(), well };
        let steps = session(1, "").event(&event, at(0));
        assert!(matches!(&steps[..], [Step::Log(level, _)] if *level == expected), "{well}");
    }
}
