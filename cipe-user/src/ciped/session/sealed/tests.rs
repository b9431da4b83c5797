use std::collections::VecDeque;

use rand::rngs::StdRng;

use crate::ciped::session::tests::{asked_in_clear, at, indication, logs, options, past, received, rng, sent};
use crate::ciped::session::*;
use crate::control::protocol::{SealedEvent, SealedRequest, SealedWanted, Wanted};
use crate::sealed::handshake::Kept;
use crate::wire::message::Message;

fn session(seed: u64, extra: &str, was_sealed: bool) -> Session<StdRng> {
    let options = options(extra);
    let kept = was_sealed.then_some(Kept { id: seed, newest: 0, was_sealed });
    let sealing = Sealing::new(&options, kept, None, (rng(seed + 2), rng(seed + 3)), at(0));
    let session = Session::new(&options, past(None), at(0), (rng(seed), rng(seed + 1)));
    let mut session = session.seal_by(sealing.unwrap());
    session.name("cipcb7");
    session
}

fn sealed_requests(steps: &[Step]) -> Vec<&SealedRequest> {
    let request = |step| if let &Step::Send(Request::Sealed(ref request)) = step { Some(request) } else { None };
    steps.iter().filter_map(request).collect()
}

fn in_sealed_packet(message: &Message<'_>) -> Event {
    let Event::Control { payload, from, under_static, .. } = received(&message.bare()) else { panic!("no message") };
    Event::Control { payload, from, under_static, sealed: true }
}

/// Two ends, and engines that deliver at once what they are given.
struct Pair {
    ends: [Session<StdRng>; 2],
    /// Whether an engine has a send key for sealed packets.
    is_sealed: [bool; 2],
    limits: [Vec<(u64, bool)>; 2],
    logs: [Vec<String>; 2],
    dropped_send_key: [bool; 2],
}

impl Pair {
    fn new(ends: [Session<StdRng>; 2]) -> Self {
        Self {
            ends,
            is_sealed: [false; 2],
            limits: Default::default(),
            logs: Default::default(),
            dropped_send_key: [false; 2],
        }
    }

    fn run(&mut self, end: usize, steps: Vec<Step>, now: Now) {
        let mut queue = VecDeque::from([(end, steps)]);
        while let Some((end, steps)) = queue.pop_front() {
            self.logs[end].extend(logs(&steps).into_iter().map(str::to_owned));
            for step in steps {
                let from = "192.0.2.2:6789".parse().unwrap();
                let events = match step {
                    Step::Send(Request::SendControl { payload, .. }) => {
                        vec![Event::Control { payload, from, under_static: true, sealed: self.is_sealed[end] }]
                    }
                    Step::Send(Request::SetSendLimits { packets, paced, .. }) => {
                        self.limits[end].push((packets, paced));
                        Vec::new()
                    }
                    Step::Send(Request::DropSendKey) => {
                        self.dropped_send_key[end] = true;
                        Vec::new()
                    }
                    Step::Send(Request::Sealed(request)) => match request {
                        SealedRequest::Transmit { datagram, .. } => {
                            vec![Event::Sealed(SealedEvent::Handshake { datagram, from, from_peer: true })]
                        }
                        SealedRequest::Confirm => {
                            [SealedEvent::Opened { serial: 1 }, SealedEvent::Probed { serial: 1 }]
                                .map(Event::Sealed)
                                .into()
                        }
                        SealedRequest::Send { .. } => {
                            self.is_sealed[end] = true;
                            Vec::new()
                        }
                        _ => Vec::new(),
                    },
                    _ => Vec::new(),
                };
                for event in events {
                    queue.push_back((1 - end, self.ends[1 - end].event(&event, now)));
                }
            }
        }
    }

    fn event(&mut self, end: usize, event: &Event, now: Now) {
        let steps = self.ends[end].event(event, now);
        self.run(end, steps, now);
    }

    fn tick_until(&mut self, seconds: u32) {
        for second in 1..=seconds {
            for end in [0, 1] {
                let steps = self.ends[end].tick(at(second));
                self.run(end, steps, at(second));
            }
        }
    }
}

#[test]
fn two_that_exchange_keys_find_that_they_can_seal_and_exchange_no_more() {
    let mut pair = Pair::new([session(1, "", false), session(11, "", false)]);
    pair.event(0, &Event::KeyWanted { reason: Wanted::NoSendKey }, at(0));
    pair.tick_until(30);
    assert_eq!((pair.is_sealed, pair.dropped_send_key), ([true; 2], [true; 2]));
    assert!(pair.ends.iter().all(|end| end.is_ours() && !end.static_data() && end.send_packets() == OWN_PACKETS));
    assert!(pair.limits.iter().all(|limits| limits == &[(OWN_PACKETS, false)]), "{:?}", pair.limits);
    for logs in &pair.logs {
        let sealed = logs.iter().filter(|line| line.starts_with("sealed by ")).count();
        assert_eq!(sealed, 1, "{logs:?}");
        assert!(logs.iter().any(|line| line.contains("not accepted any more")), "{logs:?}");
    }
    // Late, or recorded.
    let end = &mut pair.ends[0];
    for event in [indication(7, 1_000_040), Event::KeyWanted { reason: Wanted::Undecryptable }] {
        assert!(end.event(&event, at(40)).is_empty());
    }
    let kill = received(&Message::Kill(b"").build(1_000_000, &mut rng(9)));
    assert!(end.event(&kill, at(40)).is_empty());
    assert_eq!(end.exchange.deadline(), None);
    assert!(end.attach_sealed(at(40)).unwrap().resume.is_some());
    // The next engine may not go on under these keys.
    end.start_over();
    assert_eq!((end.send_packets(), end.is_ours()), (OWN_PACKETS, true));
}

#[test]
fn an_end_that_does_not_seal_makes_nobody_begin() {
    let other = Session::new(&options(""), past(None), at(0), (rng(11), rng(12)));
    let mut pair = Pair::new([session(1, "", false), other]);
    pair.event(0, &Event::KeyWanted { reason: Wanted::NoSendKey }, at(0));
    pair.tick_until(100);
    assert_eq!(pair.is_sealed, [false; 2]);
    assert_eq!(pair.ends.each_ref().map(|end| end.exchange.peer_keeps_keys()), [true; 2]);
    assert!(pair.logs.iter().flatten().all(|line| !line.contains("handshake")), "{:?}", pair.logs);
}

/// An end that has sealed packets in use.
fn in_use() -> Session<StdRng> {
    let mut pair =
        Pair::new([session(1, "sealed require\nping 5\ntoping 1", false), session(11, "sealed require", false)]);
    pair.event(0, &Event::Sealed(SealedEvent::Wanted { reason: SealedWanted::Send }), at(1));
    assert_eq!((pair.is_sealed, pair.ends.each_ref().map(Session::is_ours)), ([true; 2], [true; 2]));
    let [end, _] = pair.ends;
    end
}

#[test]
fn what_comes_in_sealed_packets_is_answered_without_filler_and_makes_no_keys() {
    let mut end = in_use();
    let steps = end.event(&in_sealed_packet(&Message::Ping(b"echo me")), at(2));
    assert_eq!(sent(&steps), [b"\x73echo me"]);
    assert!(end.event(&asked_in_clear(b""), at(2)).is_empty(), "nothing leaves in clear");
    let Event::Control { payload, from, .. } = indication(7, 1_000_002) else { panic!("no message") };
    let steps = end.event(&Event::Control { payload, from, under_static: false, sealed: true }, at(2));
    assert!(sent(&steps).is_empty() && logs(&steps)[0].contains("NK_IND"), "{:?}", logs(&steps));
    assert_eq!(logs(&end.event(&in_sealed_packet(&Message::Debug(b"hello")), at(2))), ["the peer says: hello"]);
    let Some(Request::SendControl { payload, .. }) = end.farewell("asked to stop", at(2)) else { panic!("none") };
    assert_eq!(&payload[..], b"\x74asked to stop");
    let steps = end.event(&in_sealed_packet(&Message::Kill(b"good bye")), at(2));
    assert!(sealed_requests(&steps).contains(&&SealedRequest::StopSending));
    assert_eq!(logs(&steps), ["the peer goes away (CT_KILL): good bye"]);
    assert!(end.farewell("asked to stop", at(2)).is_none(), "there is no key for it");
}

#[test]
fn pings_without_an_answer_cause_a_handshake_and_no_exchange() {
    let mut end = in_use();
    let steps: Vec<Step> = (2..40).flat_map(|second| end.tick(at(second))).collect();
    assert!(sent(&steps).iter().all(|payload| payload == &[0x72]), "nothing but pings");
    let transmits = |request: &&SealedRequest| matches!(request, SealedRequest::Transmit { .. });
    assert!(sealed_requests(&steps).into_iter().any(|request| transmits(&request)));
}

#[test]
fn an_end_that_only_seals_exchanges_no_keys() {
    for (extra, was_sealed) in [("sealed require", false), ("", true)] {
        let mut end = session(1, extra, was_sealed);
        assert_eq!((end.send_packets(), end.farewell("", at(1)).is_none()), (OWN_PACKETS, true));
        let unsealed = end.attach_sealed(at(1)).unwrap().unsealed;
        assert!(!unsealed.sends && !unsealed.accepts);
        for event in [Event::KeyWanted { reason: Wanted::NoSendKey }, indication(7, 1_000_001)] {
            assert!(end.event(&event, at(1)).is_empty());
        }
    }
}

#[test]
fn a_peer_that_was_sealed_and_is_not_any_more_is_told_of_with_the_way_out() {
    let mut end = session(1, "", true);
    let unsealed = Event::Sealed(SealedEvent::Wanted { reason: SealedWanted::Unsealed });
    assert_eq!(sealed_requests(&end.event(&unsealed, at(1))).len(), 1);
    let steps: Vec<Step> = (2..60).flat_map(|second| end.event(&unsealed, at(second))).collect();
    let lines = logs(&steps);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("the peer was sealed") && lines[0].ends_with("say `cipe forget cipcb7`"), "{lines:?}");
    assert!(steps.iter().any(|step| matches!(step, Step::Forget)));
    let steps = end.forget(at(60));
    assert_eq!(end.send_packets(), ORIGINAL_PACKETS);
    let limits = |step: &Step| matches!(step, Step::Send(Request::SetSendLimits { paced: true, .. }));
    assert!(steps.iter().any(limits));
    let steps = end.event(&Event::KeyWanted { reason: Wanted::NoSendKey }, at(61));
    assert_eq!(sent(&steps)[0][0], 2, "keys are exchanged again");
}

/// For a day, data is sent to a peer that is away, or speaks protocol 3.
#[test]
fn a_peer_that_does_not_seal_does_not_fill_the_log() {
    for (reason, policy, what) in [
        (SealedWanted::Send, "auto", "no answer to a handshake"),
        (SealedWanted::Unsealed, "auto", "the peer was sealed"),
        (SealedWanted::Unsealed, "require", "`sealed require` does not allow that"),
    ] {
        let mut end = session(1, &format!("sealed {policy}"), true);
        let mut lines: Vec<String> = Vec::new();
        for second in 1..86_400 {
            let mut steps = end.tick(at(second));
            steps.extend(end.event(&Event::Sealed(SealedEvent::Wanted { reason }), at(second)));
            lines.extend(logs(&steps).into_iter().map(str::to_owned));
        }
        let those = lines.iter().filter(|line| line.contains(what)).count();
        assert!((5..12).contains(&those) && lines.len() < 24, "{what}: {lines:?}");
    }
}

#[test]
fn a_handshake_without_an_answer_falls_back_to_the_configured_peer() {
    let mut end = session(1, "sealed require", false);
    end.event(&Event::Sealed(SealedEvent::Wanted { reason: SealedWanted::Send }), at(1));
    let falls_back = (1..200).flat_map(|second| end.tick(at(second))).any(|step| matches!(step, Step::FallBack));
    assert!(falls_back);
}
