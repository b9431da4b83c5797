//! Single steps of the exchange, and any sequence of them.

use std::collections::VecDeque;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::marker::MARKER;
use super::*;
use crate::wire::message::DynamicKey;

const TOKXC: Duration = Duration::from_secs(10);

/// An action in short form, as the tests compare it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    Message(&'static str),
    SetSendKey([u8; 16]),
    DropSendKey,
    SetReceiveKey([u8; 16]),
}

struct Machine {
    exchange: Exchange<StdRng>,
    now: Duration,
    /// The key of the last NK_IND sent.
    announced: Option<DynamicKey>,
    /// The send key in use.
    in_use: Option<[u8; 16]>,
    /// The key of the last message.
    under: Under,
}

impl Machine {
    fn new() -> Self {
        Self {
            exchange: Exchange::new(TOKXC, TakenKeys::new([0; 16]), StdRng::seed_from_u64(1)),
            now: Duration::ZERO,
            announced: None,
            in_use: None,
            under: Under::Live,
        }
    }

    /// Omits markers.
    fn handle(&mut self, input: Input<'_>) -> Vec<Seen> {
        let mut seen = Vec::new();
        for action in self.exchange.handle(input, Now { at: self.now, unix_nanos: 0 }) {
            seen.push(match action {
                Action::SendMessage { payload, under, announces } => match Message::parse(&payload).unwrap() {
                    Message::Dummy(_) => continue,
                    message => {
                        let mut is_new = false;
                        if let Message::Indication { key, .. } = &message {
                            // A key in use that is announced again continues its packet count.
                            is_new =
                                self.announced.replace(key.clone()).as_ref() != Some(key) && self.in_use != Some(key.0);
                        }
                        assert_eq!(announces, is_new);
                        self.under = under;
                        Seen::Message(message.name())
                    }
                },
                Action::SetSendKey(key) => {
                    self.in_use = Some(*key);
                    Seen::SetSendKey(*key)
                }
                Action::DropSendKey => {
                    self.in_use = None;
                    Seen::DropSendKey
                }
                Action::SetReceiveKey { key, keep } => {
                    assert_eq!(keep, 2 * TOKXC);
                    Seen::SetReceiveKey(*key)
                }
                Action::PeerSeals { .. } | Action::Log(_) => continue,
            });
        }
        seen
    }

    fn wanted(&mut self, reason: Wanted) -> Vec<Seen> {
        self.handle(Input::KeyWanted(reason))
    }

    fn message(&mut self, message: Message<'_>) -> Vec<Seen> {
        self.handle(Input::Message { message, under_static: true })
    }

    fn indication(&mut self, key: u8) -> Vec<Seen> {
        self.message(Message::indication(&DynamicKey([key; 16])))
    }

    fn tick(&mut self) -> Vec<Seen> {
        self.now = self.exchange.deadline().unwrap();
        self.handle(Input::Tick)
    }

    /// Acknowledges the last announcement.
    fn acknowledge(&mut self) -> Vec<Seen> {
        let sum = self.announced.as_ref().unwrap().sum();
        self.message(Message::Acknowledgement { sum })
    }
}

const IND: Seen = Seen::Message("NK_IND");
const REQ: Seen = Seen::Message("NK_REQ");
const ACK: Seen = Seen::Message("NK_ACK");

#[test]
fn a_key_is_used_from_its_acknowledgement_on() {
    let mut machine = Machine::new();
    assert_eq!(machine.wanted(Wanted::NoSendKey), [IND]);
    let key = machine.announced.clone().unwrap();
    assert_eq!(machine.message(Message::Acknowledgement { sum: [1; 4] }), []);
    let mut sum = key.sum();
    sum.reverse();
    assert_eq!(machine.message(Message::Acknowledgement { sum }), [Seen::SetSendKey(key.0)]);
    assert_eq!(machine.message(Message::Acknowledgement { sum }), []);
    assert_eq!(machine.exchange.deadline(), None);
}

#[test]
fn the_same_key_is_announced_again_until_it_is_acknowledged() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    let key = machine.announced.clone().unwrap();
    while machine.exchange.deadline().is_some_and(|next| next < TOKXC) {
        assert_eq!(machine.tick(), [IND]);
        assert!(machine.announced.as_ref() == Some(&key));
        assert_eq!(machine.wanted(Wanted::NoSendKey), []);
    }
    assert_eq!(machine.acknowledge(), [Seen::SetSendKey(key.0)]);
}

/// Some originals refuse a key that they have taken before, and do not acknowledge it again either.
#[test]
fn after_tokxc_without_an_answer_another_key_is_announced() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    let mut keys = vec![machine.announced.clone().unwrap().0];
    while machine.exchange.deadline().is_some_and(|next| next < 3 * TOKXC) {
        assert_eq!(machine.tick(), [IND]);
        keys.push(machine.announced.clone().unwrap().0);
    }
    keys.dedup();
    assert_eq!(keys.len(), 3, "one for each tokxc");
    assert_eq!(machine.acknowledge(), [Seen::SetSendKey(keys[2])]);
}

#[test]
fn after_three_tokxc_without_an_answer_the_next_packet_starts_with_another_key() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    let key = machine.announced.clone().unwrap();
    while machine.exchange.deadline().is_some() {
        machine.tick();
    }
    assert_eq!(machine.now, 3 * TOKXC);
    assert_eq!(machine.acknowledge(), []);
    assert_eq!(machine.wanted(Wanted::NoSendKey), [IND]);
    assert!(machine.announced.as_ref() != Some(&key));
}

#[test]
fn towards_an_original_the_old_key_goes_before_the_new_one_is_announced() {
    for reason in [Wanted::Age, Wanted::Packets, Wanted::Octets] {
        let mut machine = Machine::new();
        machine.wanted(Wanted::NoSendKey);
        let old = machine.announced.clone().unwrap();
        machine.acknowledge();
        assert_eq!(machine.wanted(reason), [Seen::DropSendKey, IND]);
        assert_eq!(machine.under, Under::Retired(KeyOctets::new(&old.0)), "each key is chained to the one before");
        assert_eq!(machine.wanted(reason), []);
        assert_eq!(machine.tick(), [IND]);
        assert_eq!(machine.under, Under::Live, "which is the static key: the original may have taken the new one");
    }
}

#[test]
fn towards_our_own_a_key_is_announced_under_the_one_in_use() {
    let mut machine = Machine::new();
    introduce(&mut machine);
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    assert_eq!(machine.wanted(Wanted::Age), [IND]);
    assert_eq!(machine.under, Under::Live);
}

/// Each end has keys that the other lacks: a gateway comes back after another one has replaced it for a while.
#[test]
fn keys_that_the_peer_may_lack_are_renewed_and_asked_for_under_the_static_key() {
    for (ours, expected) in [(true, &[IND, REQ][..]), (false, &[Seen::DropSendKey, IND, REQ])] {
        for input in [|| Input::KeyWanted(Wanted::Undecryptable), || Input::Unanswered] {
            let mut machine = Machine::new();
            machine.wanted(Wanted::NoSendKey);
            machine.acknowledge();
            machine.indication(1);
            if ours {
                introduce(&mut machine);
            }
            assert_eq!(machine.handle(input()), expected);
            assert_eq!(machine.under, Under::Static);
            assert_eq!(machine.handle(input()), [], "while that is under way");
            while machine.exchange.deadline().is_some_and(|next| next < TOKXC) {
                machine.tick();
                assert_eq!(machine.under, Under::Static);
            }
            machine.acknowledge();
            machine.indication(2);
            assert_eq!(machine.handle(input()), [], "at most once per tokxc");
            machine.now += TOKXC;
            assert_ne!(machine.handle(input()), []);
        }
    }
}

#[test]
fn an_acknowledgement_goes_under_the_static_key_if_the_indication_did() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    for (under_static, expected) in [(true, Under::Static), (false, Under::Live)] {
        let message = Message::indication(&DynamicKey([u8::from(under_static); 16]));
        machine.handle(Input::Message { message, under_static });
        assert_eq!(machine.under, expected);
    }
}

/// A restarted original lacks our send key, so it cannot open an NK_ACK under it and requests another key.
#[test]
fn an_acknowledgement_that_a_request_follows_is_sent_again_under_the_static_key() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    let message = Message::indication(&DynamicKey([7; 16]));
    machine.handle(Input::Message { message, under_static: false });
    machine.now += Duration::from_millis(300);
    assert_eq!(machine.message(Message::Request), [ACK, Seen::DropSendKey, IND]);
    machine.now += Duration::from_millis(300);
    assert_eq!(machine.message(Message::Request), [IND], "once");
    let message = Message::indication(&DynamicKey([8; 16]));
    machine.handle(Input::Message { message, under_static: false });
    machine.now += TOKXC;
    assert!(!machine.message(Message::Request).contains(&ACK), "a request that has nothing to do with it");
}

fn introduce(machine: &mut Machine) {
    let data = [&MARKER[..], &[0]].concat();
    machine.message(Message::Dummy(&data));
}

#[test]
fn towards_our_own_the_old_key_stays_until_the_acknowledgement_or_for_one_tokxc() {
    let mut machine = Machine::new();
    introduce(&mut machine);
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    assert_eq!(machine.wanted(Wanted::Packets), [IND]);
    assert!(matches!(machine.acknowledge()[..], [Seen::SetSendKey(_)]));
    machine.wanted(Wanted::Packets);
    let start = machine.now;
    let dropped = loop {
        let seen = machine.tick();
        if seen != [IND] {
            break seen;
        }
        assert!(machine.now < start + TOKXC);
    };
    assert_eq!(dropped, [Seen::DropSendKey, IND]);
}

#[test]
fn one_of_our_own_that_goes_away_takes_its_keys_along() {
    for is_ours in [true, false] {
        let mut machine = Machine::new();
        machine.wanted(Wanted::NoSendKey);
        machine.acknowledge();
        if is_ours {
            introduce(&mut machine);
        }
        let dropped: &[Seen] = if is_ours { &[Seen::DropSendKey] } else { &[] };
        assert_eq!(machine.message(Message::Kill(b"asked to stop")), dropped);
        assert_eq!(machine.message(Message::Kill(b"asked to stop")), [], "there is none any more");
        assert_eq!(machine.exchange.deadline(), None, "nothing is asked of who is away");
        let next: &[Seen] = if is_ours { &[IND] } else { &[] };
        assert_eq!(machine.wanted(Wanted::NoSendKey), next);
    }
}

#[test]
fn a_request_drops_the_send_key_and_repeats_what_is_pending() {
    let mut machine = Machine::new();
    introduce(&mut machine);
    assert_eq!(machine.message(Message::Request), [IND]);
    let key = machine.announced.clone();
    assert_eq!(machine.message(Message::Request), []);
    machine.now += Duration::from_millis(100);
    assert_eq!(machine.message(Message::Request), [IND]);
    assert!(machine.announced == key);
    machine.acknowledge();
    assert_eq!(machine.message(Message::Request), [Seen::DropSendKey, IND]);
    assert!(machine.announced != key);
}

#[test]
fn a_receive_key_is_taken_once_and_acknowledged_each_time() {
    let mut machine = Machine::new();
    assert_eq!(machine.indication(1), [Seen::SetReceiveKey([1; 16]), ACK]);
    assert_eq!(machine.indication(1), [ACK]);
    assert_eq!(machine.indication(2), [Seen::SetReceiveKey([2; 16]), ACK]);
}

#[test]
fn a_receive_key_never_comes_back() {
    let mut machine = Machine::new();
    for key in 1..100 {
        machine.indication(key);
    }
    for key in 1..99 {
        assert_eq!(machine.indication(key), []);
    }
}

#[test]
fn after_the_engine_has_lost_all_keys_both_directions_begin_again() {
    let mut machine = Machine::new();
    introduce(&mut machine);
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    assert_eq!(machine.indication(1), [Seen::SetReceiveKey([1; 16]), ACK]);
    assert_eq!(machine.wanted(Wanted::NoReceiveKey), [REQ]);
    let before = machine.announced.clone().unwrap();
    machine.exchange.start_over();
    assert_eq!((machine.exchange.deadline(), machine.exchange.peer_keeps_keys()), (None, false));
    assert_eq!(machine.wanted(Wanted::NoSendKey), [IND]);
    assert!(machine.announced.clone().unwrap().0 != before.0);
    assert!(matches!(machine.acknowledge()[..], [Seen::SetSendKey(_)]));
    assert_eq!(machine.wanted(Wanted::NoReceiveKey), [REQ], "without waiting for tokxc");
    assert_eq!(machine.indication(1), [], "a key whose replay filter is lost stays refused");
    assert_eq!(machine.indication(2), [Seen::SetReceiveKey([2; 16]), ACK]);
}

#[test]
fn the_sum_is_echoed_as_it_came() {
    let mut machine = Machine::new();
    let key = DynamicKey([9; 16]);
    let mut sum = key.sum();
    sum.reverse();
    let input = Input::Message { message: Message::Indication { key, sum }, under_static: true };
    let actions = machine.exchange.handle(input, Now::default());
    let sent = actions.iter().find_map(|action| match action {
        Action::SendMessage { payload, .. } => Some(payload),
        _ => None,
    });
    assert!(Message::parse(sent.unwrap()).is_ok_and(|message| message == Message::Acknowledgement { sum }));
}

#[test]
fn asking_begins_at_most_once_per_tokxc() {
    let mut machine = Machine::new();
    assert_eq!(machine.wanted(Wanted::NoReceiveKey), [REQ]);
    assert_eq!(machine.wanted(Wanted::NoReceiveKey), []);
    machine.now += Duration::from_millis(100);
    machine.indication(1);
    assert_eq!(machine.exchange.deadline(), None);
    assert_eq!(machine.wanted(Wanted::ReceiveKeySpent), []);
    assert_eq!(machine.exchange.deadline(), Some(TOKXC));
    assert_eq!(machine.tick(), [REQ]);
}

/// The keys of the markers among these actions.
fn markers(actions: &[Action]) -> Vec<Under> {
    let marker = |action: &Action| match action {
        Action::SendMessage { payload, under, .. } => match Message::parse(payload) {
            Ok(Message::Dummy(data)) if data.starts_with(MARKER) => Some(under.clone()),
            _ => None,
        },
        _ => None,
    };
    actions.iter().filter_map(marker).collect()
}

#[test]
fn an_original_can_open_the_marker_behind_an_indication() {
    let mut machine = Machine::new();
    machine.wanted(Wanted::NoSendKey);
    machine.acknowledge();
    let now = Now { at: machine.now, unix_nanos: 0 };
    let actions = machine.exchange.handle(Input::KeyWanted(Wanted::Packets), now);
    assert_eq!(markers(&actions), [Under::Static], "the key before is gone at the NK_IND");
}

/// The second end that announces a key has already received the first one's marker.
#[test]
fn each_of_two_that_announce_one_after_the_other_knows_the_other() {
    let mut ends = [1, 2].map(|seed| Exchange::new(TOKXC, TakenKeys::new([0; 16]), StdRng::seed_from_u64(seed)));
    let now = Now::default();
    for first in [0, 1] {
        let mut on_the_way: VecDeque<_> = ends[first]
            .handle(Input::KeyWanted(Wanted::NoSendKey), now)
            .into_iter()
            .map(|action| (1 - first, action))
            .collect();
        let mut messages = 0;
        while let Some((to, action)) = on_the_way.pop_front() {
            let Action::SendMessage { payload, .. } = action else { continue };
            messages += 1;
            assert!(messages < 20, "no end of messages");
            let message = Message::parse(&payload).unwrap();
            let answers = ends[to].handle(Input::Message { message, under_static: true }, now);
            on_the_way.extend(answers.into_iter().map(|answer| (1 - to, answer)));
        }
    }
    assert_eq!(ends.map(|end| end.peer_keeps_keys()), [true, true]);
}

#[test]
fn markers_are_answered_once_and_stop_when_the_peer_is_known() {
    let mut exchange = Exchange::new(TOKXC, TakenKeys::new([0; 16]), StdRng::seed_from_u64(1));
    let mut now = Now::default();
    let mut input = |input| {
        now.at += Duration::from_millis(100);
        markers(&exchange.handle(input, now)).len()
    };
    let [asking, answering] = [1, 0].map(|ask| [&MARKER[..], &[ask]].concat());
    assert_eq!(input(Input::KeyWanted(Wanted::NoSendKey)), 1);
    assert_eq!(input(Input::Message { message: Message::Dummy(&asking), under_static: true }), 1);
    assert_eq!(input(Input::Message { message: Message::Dummy(&answering), under_static: true }), 0);
    assert_eq!(input(Input::KeyWanted(Wanted::NoReceiveKey)), 0);
    assert_eq!(input(Input::Message { message: Message::Request, under_static: true }), 1);
    assert_eq!(input(Input::Message { message: Message::Dummy(b"something else"), under_static: true }), 0);
}

#[test]
fn each_of_two_that_seal_learns_it_of_the_other_and_an_end_that_does_not_is_not_told() {
    for seals in [[true, true], [true, false], [false, true]] {
        let mut ends = [1, 2].map(|seed| Exchange::new(TOKXC, TakenKeys::new([0; 16]), StdRng::seed_from_u64(seed)));
        for (end, seals) in ends.iter_mut().zip(seals) {
            if seals {
                end.announce_seals();
            }
        }
        let mut learned = Vec::new();
        let first = ends[0].handle(Input::KeyWanted(Wanted::NoSendKey), Now::default());
        let mut on_the_way: VecDeque<_> = first.into_iter().map(|action| (1, action)).collect();
        while let Some((to, action)) = on_the_way.pop_front() {
            match action {
                Action::SendMessage { payload, .. } => {
                    let message = Message::parse(&payload).unwrap();
                    let answers = ends[to].handle(Input::Message { message, under_static: true }, Now::default());
                    on_the_way.extend(answers.into_iter().map(|answer| (1 - to, answer)));
                }
                // The end that has been told is the one that makes the action.
                Action::PeerSeals { asks } => learned.push((1 - to, asks)),
                _ => {}
            }
        }
        let expected = if seals == [true, true] { vec![(1, true), (0, false)] } else { Vec::new() };
        assert_eq!(learned, expected, "{seals:?}");
        assert_eq!(ends.map(|end| end.peer_keeps_keys()), [true, true]);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Wanted(Wanted),
    Request(bool),
    Indication(u8, bool),
    Acknowledgement(Option<[u8; 4]>),
    Marker(u8),
    Wait(u64),
    Tick,
}

fn op() -> impl Strategy<Value = Op> {
    use Wanted::*;
    let wanted = [NoSendKey, Age, Packets, Octets, NoReceiveKey, ReceiveKeySpent, Undecryptable];
    let wanted = prop::sample::select(wanted.to_vec());
    prop_oneof![
        wanted.prop_map(Op::Wanted),
        any::<bool>().prop_map(Op::Request),
        (0u8..6, any::<bool>()).prop_map(|(key, under_static)| Op::Indication(key, under_static)),
        prop::option::weighted(0.2, any::<[u8; 4]>()).prop_map(Op::Acknowledgement),
        (0u8..2).prop_map(Op::Marker),
        (0u64..40_000).prop_map(Op::Wait),
        Just(Op::Tick),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_events_breaks_the_rules(ops in prop::collection::vec(op(), 0..200)) {
        let mut machine = Machine::new();
        let mut sending = false;
        let mut taken = std::collections::HashSet::new();
        for op in ops {
            let message = |message, under_static| Input::Message { message, under_static };
            let marker;
            let (input, acknowledges) = match op {
                Op::Wanted(reason) => (Input::KeyWanted(reason), false),
                Op::Request(under_static) => (message(Message::Request, under_static), false),
                Op::Indication(key, under_static) =>
                    (message(Message::indication(&DynamicKey([key; 16])), under_static), false),
                Op::Acknowledgement(sum) => {
                    let sum = sum.or(machine.announced.as_ref().map(DynamicKey::sum)).unwrap_or_default();
                    (message(Message::Acknowledgement { sum }, true), true)
                }
                Op::Marker(ask) => {
                    marker = [&MARKER[..], &[ask]].concat();
                    (message(Message::Dummy(&marker), true), false)
                }
                Op::Wait(ms) => {
                    machine.now += Duration::from_millis(ms);
                    (Input::Tick, false)
                }
                Op::Tick => {
                    machine.now = machine.now.max(machine.exchange.deadline().unwrap_or_default());
                    (Input::Tick, false)
                }
            };
            let ticked = matches!(input, Input::Tick);
            for seen in machine.handle(input) {
                match seen {
                    Seen::SetSendKey(key) => {
                        prop_assert!(acknowledges && machine.announced.as_ref().is_some_and(|last| last.0 == key));
                        sending = true;
                    }
                    Seen::DropSendKey => prop_assert!(std::mem::take(&mut sending)),
                    Seen::SetReceiveKey(key) => prop_assert!(taken.insert(key)),
                    Seen::Message(_) => {}
                }
            }
            if ticked {
                prop_assert!(machine.exchange.deadline().is_none_or(|next| next > machine.now));
            }
        }
    }
}
