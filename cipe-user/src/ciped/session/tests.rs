use std::net::SocketAddr;
use std::path::Path;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::ciped::options::{self, Draft, Program};
use crate::control::protocol::Wanted;
use crate::wire::message::DynamicKey;

pub(super) fn options(extra: &str) -> Options {
    options_as(Program::Cb, extra)
}

fn options_as(program: Program, extra: &str) -> Options {
    let text = format!(
        "ipaddr 10.9.0.1\nptpaddr 10.9.0.2\npeer 192.0.2.2:6789\nkey 000102030405060708090a0b0c0d0e0f\n{extra}\n"
    );
    let (mut draft, mut problems) = (Draft::new(program), Vec::new());
    options::read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
    options::settle(&draft, problems).0.unwrap()
}

pub(super) fn at(seconds: u32) -> Now {
    Now { at: Duration::from_secs(seconds.into()), unix_nanos: 1_000_000_000 * u64::from(1_000_000 + seconds) }
}

pub(super) fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

fn session(seed: u64, extra: &str) -> Session<StdRng> {
    Session::new(&options(extra), past(None), at(0), (rng(seed), rng(seed + 1)))
}

pub(super) fn past(newest_stamp: Option<u32>) -> Past {
    Past { newest_stamp, taken: TakenKeys::new([0; 16]), is_ours: false, sealed: None }
}

pub(super) fn received(payload: &[u8]) -> Event {
    Event::Control {
        payload: payload.into(),
        from: "192.0.2.2:6789".parse().unwrap(),
        under_static: false,
        sealed: false,
    }
}

pub(super) fn logs(steps: &[Step]) -> Vec<&str> {
    steps.iter().filter_map(|step| if let Step::Log(_, text) = step { Some(text.as_str()) } else { None }).collect()
}

pub(super) fn sent(steps: &[Step]) -> Vec<Vec<u8>> {
    let payload = |step: &Step| match step {
        Step::Send(Request::SendControl { payload, .. }) => Some(payload.to_vec()),
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
    assert_eq!(logs(&session.tick(at(23))), ["no answer to a ping; network error 1 since the peer was heard"]);
    session.tick(at(30));
    assert!(session.tick(at(33)).iter().any(|step| matches!(step, Step::End(End::Failed(_)))));
}

#[test]
fn a_dead_peer_does_not_fill_the_log() {
    let mut session = session(1, "maxerr -1");
    let error = Event::NetworkError { message: "port unreachable".to_owned(), heard: false };
    let lines: usize = (0..10_000).map(|_| logs(&session.event(&error, at(1))).len()).sum();
    assert_eq!(lines, 14);
}

/// One of two pings is lost, for hours: the daemon must not give such a peer up.
#[test]
fn lost_pings_between_answered_ones_do_not_add_up() {
    let mut session = session(1, "ping 10\ntoping 3\nmaxerr 1");
    let pong = received(&Message::Pong(b"").build(1_000_000, &mut rng(9)));
    for round in 1..1000 {
        session.tick(at(20 * round - 10));
        session.event(&pong, at(20 * round - 9));
        session.tick(at(20 * round));
        let steps = session.tick(at(20 * round + 3));
        assert!(!steps.iter().any(|step| matches!(step, Step::End(_))), "{round}");
    }
}

#[test]
fn what_packets_bring_about_again_and_again_does_not_fill_the_log() {
    let message = |message: Message<'_>| received(&message.build(0, &mut rng(9)));
    let fresh = |message: Message<'_>| received(&message.build(1_000_001, &mut rng(9)));
    let clear = |kind: u8| Event::Clear {
        datagram: [&[0; 8][..], &[kind; 60]].concat()[..].into(),
        from: "192.0.2.66:1".parse().unwrap(),
    };
    let peers = [1, 2].map(|port| Event::NewPeer { peer: SocketAddr::from(([192, 0, 2, 2], port)) });
    let events = [
        [message(Message::Debug(b"hello")), message(Message::Debug(b"hello"))],
        [message(Message::Kill(b"")), message(Message::Kill(b""))],
        [message(Message::Request), message(Message::Request)],
        [received(&[0x75; 60]), received(&[0; 60])],
        [fresh(Message::Acknowledgement { sum: [1; 4] }), fresh(Message::Acknowledgement { sum: [2; 4] })],
        [clear(0x74), clear(2)],
        [clear(0x75), clear(0x76)],
        peers,
    ];
    for pair in events {
        let mut session = session(1, "tokxts 30");
        let lines: usize = (0..4_000).map(|n| logs(&session.event(&pair[n % 2], at(1))).len()).sum();
        assert_eq!(lines, 12, "at 1, 2, 4 ... 2048: {:?}", pair[0]);
    }
}

/// The log lines about keys during 4,000 exchanges within a minute; `exchange` makes the peer's messages of each.
fn key_lines(exchange: impl Fn(&mut Session<StdRng>, u32) -> Vec<Step>) -> Vec<String> {
    let mut session = session(1, "");
    let steps = (0..4_000).flat_map(|n| exchange(&mut session, n));
    steps.filter_map(|step| if let Step::Log(_, line) = step { Some(line) } else { None }).collect()
}

#[test]
fn keys_that_change_all_the_time_do_not_fill_the_log() {
    let fresh = |message: Message<'_>| received(&message.build(1_000_001, &mut rng(9)));
    let announced = key_lines(|session, n| {
        let key = DynamicKey(std::array::from_fn(|i| n.to_be_bytes()[i % 4] ^ i as u8));
        session.event(&fresh(Message::indication(&key)), at(1))
    });
    assert_eq!(announced.len(), 12, "at 1, 2, 4 ... 2048: {announced:?}");
    assert_eq!((announced[0].as_str(), announced[2].as_str()), ("new receive key", "new receive key; 4 so far"));
    // Each NK_REQ gets an NK_IND, which is acknowledged.
    let asked = key_lines(|session, _| {
        let mut steps = session.event(&fresh(Message::Request), at(1));
        let acknowledged: Vec<Event> = sent(&steps)
            .iter()
            .filter_map(|payload| match Message::parse(payload) {
                Ok(Message::Indication { sum, .. }) => Some(fresh(Message::Acknowledgement { sum })),
                _ => None,
            })
            .collect();
        assert_eq!(acknowledged.len(), 1);
        steps.extend(session.event(&acknowledged[0], at(1)));
        steps
    });
    for what in ["the peer asks for a new key", "new send key"] {
        let lines = asked.iter().filter(|line| line.contains(what)).count();
        assert_eq!(lines, 12, "{what}: {asked:?}");
    }
    assert_eq!(asked.len(), 24);
}

#[test]
fn a_peer_that_moves_now_and_then_is_told_each_time() {
    let mut session = session(1, "");
    for hour in 1..20 {
        let peer = SocketAddr::from(([192, 0, 2, 2], hour));
        let steps = session.event(&Event::NewPeer { peer }, at(3600 * u32::from(hour)));
        assert_eq!(logs(&steps), [format!("new peer {peer}")]);
    }
}

#[test]
fn a_farewell_says_why_and_what_the_peer_s_says_is_logged() {
    let mut session = session(1, "");
    assert!(session.farewell("asked to stop", at(0)).is_none(), "an original would exit for good");
    session.event(&received(&Message::Dummy(b"CIPEkeep\0").build(0, &mut rng(9))), at(0));
    let Some(Request::SendControl { payload, .. }) = session.farewell("asked to stop", at(0)) else { panic!("none") };
    let steps = session.event(&received(&payload), at(0));
    assert_eq!(logs(&steps), ["the peer goes away (CT_KILL): asked to stop"]);
    assert!(!steps.iter().any(|step| matches!(step, Step::End(_))), "the tunnel waits for it");
}

pub(super) fn asked_in_clear(body: &[u8]) -> Event {
    let datagram = [&[0; 8][..], &[0x75, 1, 2, 3], body, &[9; 40]].concat();
    Event::Clear { datagram: datagram[..].into(), from: "192.0.2.66:1".parse().unwrap() }
}

#[test]
fn a_question_about_the_configuration_is_answered_once_a_second() {
    for (extra, body) in [("", b"CIPE\x03b\x01\x06\x01"), ("cipher idea\nkeybug", b"CIPE\x03i\x01\x06\x00")] {
        let mut session = session(1, extra);
        let asked = asked_in_clear(body);
        let steps = session.event(&asked, at(1));
        assert!(logs(&steps).is_empty(), "all is well: {:?}", logs(&steps));
        let [Step::Send(Request::SendClear { datagram, to })] = &steps[..] else { panic!("no answer") };
        assert_eq!(*to, "192.0.2.66:1".parse().unwrap());
        assert_eq!((&datagram[..9], &datagram[12..21]), (&b"\0\0\0\0\0\0\0\0\x76"[..], &body[..]));
        assert!((0..100).all(|_| session.event(&asked, at(1)).is_empty()));
        assert_eq!(session.event(&asked, at(2)).len(), 1);
    }
}

#[test]
fn a_peer_that_is_set_up_in_another_way_is_told_of() {
    let mut session = session(1, "");
    let steps = session.event(&asked_in_clear(b"CIPE4i150"), at(1));
    let [line] = logs(&steps)[..] else { panic!("one line") };
    for part in ["192.0.2.66:1", "protocol 4 there, 3 here", "cipher IDEA there, Blowfish here", "keybug"] {
        assert!(line.contains(part), "{line}");
    }
    assert_eq!(logs(&session.event(&asked_in_clear(b"nothing"), at(1))).len(), 1);
}

#[test]
fn a_configuration_tells_the_protocol_of_its_daemon() {
    for program in Program::ALL {
        let configuration = clear::configuration(&options_as(program, ""));
        assert_eq!(configuration.protocol, program.protocol().number(), "{}", program.name());
    }
}

#[test]
fn nothing_in_clear_changes_keys_or_ends_the_tunnel() {
    let mut session = session(1, "");
    let key = DynamicKey([7; 16]);
    for message in [Message::Request, Message::indication(&key), Message::Kill(b"")] {
        let datagram = [&[0; 8][..], &message.build(0, &mut rng(9))].concat()[..].into();
        let steps = session.event(&Event::Clear { datagram, from: "192.0.2.2:6789".parse().unwrap() }, at(1));
        assert!(steps.iter().all(|step| matches!(step, Step::Log(Level::Warning, _))));
    }
}

#[test]
fn a_ping_in_clear_is_answered_without_a_key_only_and_not_too_often() {
    let datagram = [&[0; 8][..], &Message::Ping(b"0123456789abcdef").build(0, &mut rng(9))].concat()[..].into();
    let ping = Event::Clear { datagram, from: "192.0.2.66:1".parse().unwrap() };
    let steps = session(1, "").event(&ping, at(1));
    assert!(steps.iter().all(|step| matches!(step, Step::Log(Level::Debug, _))));

    let mut options = options("");
    options.key = None;
    let mut session = Session::new(&options, past(None), at(0), (rng(1), rng(2)));
    let steps = session.event(&ping, at(1));
    let [Step::Send(Request::SendClear { datagram, to })] = &steps[..] else { panic!("no answer") };
    assert_eq!(*to, "192.0.2.66:1".parse().unwrap());
    assert!(datagram.starts_with(b"\0\0\0\0\0\0\0\0\x730123456789abcdef"));
    assert!((0..100).all(|_| session.event(&ping, at(1)).is_empty()));
    assert_eq!(session.event(&ping, at(2)).len(), 1);
}

#[test]
fn messages_outside_the_time_window_do_nothing_but_a_log_line() {
    let mut session = session(1, "tokxts 30");
    let old = Message::Request.build(1_000_000 - 31, &mut rng(9));
    let steps = session.event(&received(&old), at(0));
    assert!(sent(&steps).is_empty() && logs(&steps)[0].contains("tokxts=30"));
    let new = Message::Request.build(1_000_000 - 30, &mut rng(9));
    assert!(!sent(&session.event(&received(&new), at(0))).is_empty());
    // Control messages need no stamp, and those of later versions have none.
    let ping = [&[0x72][..], &[0; 100]].concat();
    assert_eq!(sent(&session.event(&received(&ping), at(0))).len(), 1);
}

#[test]
fn the_peer_s_text_is_one_line_in_the_log() {
    let text = Message::Debug(b"hello\nroot: all is well\x1b[2J").build(1_000_000, &mut rng(9));
    let steps = session(1, "").event(&received(&text), at(0));
    assert_eq!(logs(&steps), ["the peer says: hello\\nroot: all is well\\x1b[2J"]);
}

#[test]
fn what_is_no_message_is_said_and_dropped() {
    for payload in [&[][..], &[0x99; 60], &[2; 60]] {
        let steps = session(1, "").event(&received(payload), at(0));
        assert!(sent(&steps).is_empty() && logs(&steps).len() == 1);
    }
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

/// One exchange for `ends[0]`'s send key; `marked`: the messages by which ours identify themselves arrive.
fn exchange(ends: &mut [Session<StdRng>; 2], wanted: Wanted, marked: bool, seconds: u32) {
    let mut queue = vec![(0, Event::KeyWanted { reason: wanted })];
    while let Some((end, event)) = queue.pop() {
        let sent = sent(&ends[end].event(&event, at(seconds)));
        let arrives = |payload: &&Vec<u8>| marked || payload[0] != 0x70;
        queue.extend(sent.iter().filter(arrives).map(|payload| (1 - end, received(payload))));
    }
}

#[test]
fn data_goes_under_the_static_key_until_the_peer_is_known_to_be_ours_and_never_after_that() {
    let mut ends = [session(1, ""), session(5, "")];
    assert!(ends[0].static_data() && !ends[0].is_ours(), "the peer may be an original");
    exchange(&mut ends, Wanted::NoSendKey, true, 1);
    assert!(!ends[0].static_data() && ends[0].is_ours());
    // An exchange under the static key may be with another program, and the engine starts over.
    ends[0].start_over();
    assert!(!ends[0].static_data());
    let mut next = Session::new(&options(""), kept(&ends[0]), at(0), (rng(9), rng(10)));
    assert!(!next.static_data(), "the next daemon knows it, too");

    // An original has taken the place of the peer: the first key may be one whose messages got lost.
    next.tick(at(1));
    let mut ends = [next, session(7, "")];
    exchange(&mut ends, Wanted::NoSendKey, false, 1);
    assert!(!ends[0].static_data());
    exchange(&mut ends, Wanted::Age, false, 20);
    assert!(ends[0].static_data() && !ends[0].is_ours());
    for (extra, may) in [("staticdata yes", true), ("staticdata no", false)] {
        let mut ends = [session(1, extra), session(5, "")];
        assert_eq!(ends[0].static_data(), may);
        exchange(&mut ends, Wanted::NoSendKey, true, 1);
        assert_eq!(ends[0].static_data(), may);
    }
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
    // The next packet requests a key again.
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
    assert!(looks_up(&session.network_error("port unreachable", false, at(14))), "a network error");
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

fn takes_a_key(steps: &[Step]) -> bool {
    steps.iter().any(|step| matches!(step, Step::Send(Request::SetReceiveKey { .. })))
}

pub(super) fn indication(number: u8, unix: u32) -> Event {
    received(&Message::indication(&DynamicKey([number; 16])).build(unix, &mut rng(number.into())))
}

/// What the next daemon of a tunnel gets from this one.
fn kept(session: &Session<StdRng>) -> Past {
    let taken = session.taken_keys();
    let taken = TakenKeys::restored(taken.salt(), taken.newest(usize::MAX));
    Past { newest_stamp: session.newest_stamp(), taken, is_ours: session.is_ours(), sealed: None }
}

#[test]
fn the_next_daemon_takes_no_recorded_key() {
    let mut first = session(1, "");
    let recorded = [indication(1, 1_000_000), indication(2, 1_000_060)];
    for event in &recorded {
        assert!(takes_a_key(&first.event(event, at(60))));
    }
    let mut next = Session::new(&options(""), kept(&first), at(100), (rng(3), rng(4)));
    for event in &recorded {
        assert!(!takes_a_key(&next.event(event, at(100))));
    }
    assert!(takes_a_key(&next.event(&indication(3, 1_000_100), at(100))));
    // Without what the first one knew, both would be taken.
    let mut forgetful = session(5, "");
    assert!(recorded.iter().all(|event| takes_a_key(&forgetful.event(event, at(100)))));
}

#[test]
fn a_clock_that_goes_back_is_reported_until_it_is_forgotten() {
    let mut session = session(1, "");
    assert!(takes_a_key(&session.event(&indication(1, 1_000_000), at(0))));
    // Datagrams overtake each other.
    assert!(takes_a_key(&session.event(&indication(2, 999_998), at(0))));
    let steps = session.event(&indication(3, 999_997), at(0));
    assert!(!takes_a_key(&steps) && steps.iter().any(|step| matches!(step, Step::Forget)));
    assert!(logs(&steps)[0].contains("3 s older") && logs(&steps)[0].contains("cipe forget"), "{:?}", logs(&steps));
    session.forget(at(0));
    assert!(takes_a_key(&session.event(&indication(4, 999_997), at(0))));
}

#[test]
fn a_stamp_far_ahead_of_our_clock_is_not_remembered() {
    let mut session = session(1, "");
    assert!(takes_a_key(&session.event(&indication(1, 1_000_601), at(0))));
    assert_eq!(session.newest_stamp(), None);
    assert!(takes_a_key(&session.event(&indication(2, 1_000_600), at(0))));
    assert!(takes_a_key(&session.event(&indication(3, 1_000_599), at(0))));
}

/// An original writes its time at one of two places, and random octets at the other.
#[test]
fn stamps_of_originals_tell_no_order() {
    let mut session = session(1, "");
    for (number, unix) in [(1, 1_000_000), (2, 999_000)] {
        let mut payload = Message::indication(&DynamicKey([number; 16])).build(unix, &mut rng(9));
        payload[56] ^= 1;
        assert!(takes_a_key(&session.event(&received(&payload), at(0))));
    }
    assert_eq!(session.newest_stamp(), None);
}

#[test]
fn an_exchange_without_an_answer_falls_back_to_the_configured_peer() {
    let mut session = session(1, "");
    session.event(&Event::KeyWanted { reason: Wanted::NoSendKey }, at(0));
    let falls_back = (1..200).flat_map(|second| session.tick(at(second))).any(|step| matches!(step, Step::FallBack));
    assert!(falls_back);
}
