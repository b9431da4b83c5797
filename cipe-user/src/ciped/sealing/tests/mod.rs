mod world;

use std::time::Duration;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use self::world::{Datagram, MS, SECOND, World, at, options};
use super::*;

const NONE: Unsealed = Unsealed { sends: false, accepts: false };
const BOTH: Unsealed = Unsealed { sends: true, accepts: true };

fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}

/// Two ends that have just met and are sealed; the first ones to use protocol 3 have left it.
fn sealed() -> World {
    let mut world = World::new(["auto", "auto"]);
    world.introduce();
    world.talk_for(15 * SECOND);
    assert!(world.is_sealed());
    world
}

fn is_handshake(datagram: &Datagram, _: &mut StdRng) -> bool {
    matches!(datagram, Datagram::Handshake(_))
}

#[test]
fn two_that_meet_leave_protocol_3_one_after_the_other() {
    let mut world = World::new(["auto", "auto"]);
    world.introduce();
    assert_eq!(world.ends.each_ref().map(|end| end.unsealed), [BOTH, BOTH]);
    // First message and answer: the end that has begun sends sealed packets.
    world.run_for(20 * MS);
    assert_eq!(world.ends.each_ref().map(|end| end.unsealed), [Unsealed { sends: false, ..BOTH }, BOTH]);
    // It has confirmed.
    world.run_for(20 * MS);
    assert!(world.is_sealed());
    assert!(world.ends.iter().all(|end| !end.unsealed.sends && end.unsealed.accepts));
    assert!(world.ends.iter().all(|end| end.kept.unwrap().was_sealed));
    world.run_for(PREVIOUS_LIFE);
    assert_eq!(world.ends.each_ref().map(|end| end.unsealed), [NONE, NONE]);
    for end in &world.ends {
        let notes: Vec<bool> = end.notes.iter().map(|note| matches!(note, Note::OnlySealed)).collect();
        assert_eq!(notes, [false, true], "sealed, and then nothing else: {:?}", end.notes);
    }
}

#[test]
fn no_packet_is_lost_when_two_that_talk_begin_to_seal() {
    let mut world = World::new(["auto", "auto"]);
    world.talk_for(SECOND);
    world.introduce();
    world.talk_for(600 * SECOND);
    world.run_for(SECOND);
    for (sealed, plain) in world.delivered() {
        assert_eq!((sealed + plain, plain < 15), (6_010, true), "{plain}");
    }
}

#[test]
fn an_end_that_was_asked_begins_after_a_second_unless_the_other_one_has() {
    for does_begin in [true, false] {
        let mut world = World::new(["auto", "auto"]);
        world.act(1, |sealing, now| sealing.peer_seals(true, now));
        world.run_for(999 * MS);
        assert!(!world.is_sealed() && world.ends[1].kept.is_none());
        if does_begin {
            world.act(0, |sealing, now| sealing.peer_seals(false, now));
        }
        world.run_for(100 * MS);
        assert!(world.is_sealed());
        // The end that has answered has a stamp of the other one's.
        let newest = world.ends.each_ref().map(|end| end.kept.unwrap().newest - at(Duration::ZERO).unix_nanos);
        let answered = newest.map(|newest| newest > 0);
        assert_eq!(answered, if does_begin { [false, true] } else { [true, false] });
    }
}

#[test]
fn what_two_ends_use_follows_from_what_they_are_told() {
    // Whether data comes sealed, and whether it comes in protocol 3. An end with `no` is like an original.
    for (policies, sealed, plain) in [
        (["require", "require"], true, false),
        (["require", "auto"], true, false),
        (["auto", "auto"], true, false),
        (["auto", "no"], false, true),
        (["no", "no"], false, true),
        (["require", "no"], false, false),
    ] {
        let mut world = World::new(policies);
        if policies == ["auto", "auto"] {
            world.introduce();
        }
        world.talk_for(SECOND);
        let before = world.delivered();
        world.talk_for(30 * SECOND);
        let after = world.delivered();
        let (came, came_plain) = (after[0].0 > before[0].0, after[0].1 > before[0].1);
        assert_eq!((came, came_plain), (sealed, plain), "{policies:?}");
        assert_eq!((after[1].0 > before[1].0, after[1].1 > before[1].1), (sealed, plain), "{policies:?}");
        let is_warned = world.ends[0].has_noted(|note| matches!(note, Note::Unsealed));
        assert_eq!(is_warned, policies == ["require", "no"], "{policies:?}");
    }
}

#[test]
fn nothing_is_begun_with_a_peer_that_does_not_say_that_it_seals() {
    let mut world = World::new(["auto", "auto"]);
    world.lose = |datagram, _| {
        assert!(!matches!(datagram, Datagram::Handshake(_)));
        false
    };
    world.talk_for(300 * SECOND);
    world.act(0, Sealing::data_goes_on);
    assert_eq!(world.delivered(), [(0, 3_000), (0, 3_000)]);
}

#[test]
fn ends_agree_over_a_path_that_loses_a_third_of_all_datagrams() {
    for seed in 0..20 {
        let mut world = World::of_seed(["auto", "require"], seed);
        world.lose = |_, rng| rng.random_ratio(1, 3);
        world.talk_for(60 * SECOND);
        assert!(world.ends.iter().all(|end| end.send.is_some()), "{seed}");
        let before = world.delivered();
        world.talk_for(300 * SECOND);
        let after = world.delivered();
        assert!((0..2).all(|end| after[end].0 > before[end].0 + 1_000), "{seed}: {before:?}, {after:?}");
    }
}

#[test]
fn a_daemon_that_comes_back_remembers_that_its_peer_was_sealed() {
    let mut world = sealed();
    let (before, kept) = (world.delivered(), world.ends[0].kept.unwrap());
    world.restart(0);
    assert_eq!(world.ends[0].unsealed, NONE);
    world.talk_for(10 * SECOND);
    assert!(world.is_sealed());
    let after = world.delivered();
    assert!((0..2).all(|end| after[end].0 > before[end].0 + 80 && after[end].1 == before[end].1), "{after:?}");
    assert_eq!(world.ends[0].kept.unwrap().id, kept.id);
}

/// The other end has the file, and waits for sealed packets.
#[test]
fn an_end_whose_file_is_lost_is_sealed_again() {
    let mut world = sealed();
    world.ends[0].kept = None;
    world.restart(0);
    assert_eq!(world.ends[0].unsealed, BOTH);
    world.talk_for(10 * SECOND);
    assert!(world.is_sealed() && world.ends[1].refused_plain > 0);
}

#[test]
fn the_next_engine_gets_the_keys_and_new_ones_are_made_if_it_cannot_use_them() {
    let mut world = sealed();
    let now = at(world.now);
    let attach = world.ends[0].sealing.as_ref().unwrap().attach(now);
    let keys = attach.resume.unwrap();
    assert_eq!(attach.unsealed, NONE);
    let (send, _) = keys.send.unwrap();
    assert_eq!((Some(*send.key), keys.receive.len()), (world.ends[0].send_key(), world.ends[0].receive.len()));
    world.act(0, |sealing, now| sealing.event(&SealedEvent::KeysLost, now));
    assert!(world.ends[0].receive.is_empty() && world.ends[0].send.is_none());
    assert!(world.ends[0].sealing.as_ref().unwrap().attach(now).resume.is_none());
    world.talk_for(SECOND);
    assert!(world.is_sealed() && world.ends[0].send_key() != Some(*send.key));
}

#[test]
fn a_peer_that_was_sealed_is_not_followed_to_protocol_3_until_the_operator_says_so() {
    let mut world = sealed();
    // An original takes the place of the other end.
    (world.ends[1].policy, world.ends[1].delivered) = ("no", (0, 0));
    world.restart(1);
    let before = world.delivered()[0];
    world.talk_for(400 * SECOND);
    assert!(world.ends[0].has_noted(|note| matches!(note, Note::Downgraded)));
    assert_eq!((world.delivered()[0], world.delivered()[1]), (before, (0, 0)), "the tunnel carries nothing");
    let id = world.ends[0].kept.unwrap().id;
    world.ends[0].is_forgotten = true;
    world.talk_for(10 * SECOND);
    assert_eq!(world.ends[0].unsealed, BOTH);
    assert!((0..2).all(|end| world.delivered()[end].1 > 80), "{:?}", world.delivered());
    // It seals again, with another id.
    world.ends[1].policy = "auto";
    world.restart(1);
    world.introduce();
    world.talk_for(15 * SECOND);
    assert!(world.is_sealed() && world.ends[0].unsealed == NONE && world.ends[0].kept.unwrap().id != id);
}

#[test]
fn a_peer_that_is_away_is_not_called_an_original() {
    let mut world = sealed();
    world.lose = |_, _| true;
    world.talk_for(400 * SECOND);
    assert!(world.ends.iter().all(|end| !end.has_noted(|note| matches!(note, Note::Downgraded))));
    assert!(world.ends[0].has_noted(|note| matches!(note, Note::Handshake(handshake::Note::NoAnswer { .. }))));
    world.lose = |_, _| false;
    world.talk_for(20 * SECOND);
    assert!(world.is_sealed());
}

#[test]
fn handshakes_that_are_dropped_are_logged_and_data_goes_on_in_protocol_3() {
    let mut world = World::new(["auto", "auto"]);
    world.lose = is_handshake;
    world.introduce();
    world.talk_for(59 * SECOND);
    assert!(!world.ends[0].has_noted(|note| matches!(note, Note::Overdue)));
    world.talk_for(2 * SECOND);
    let overdue = |note: &&Note| matches!(note, Note::Overdue);
    assert_eq!(world.ends.each_ref().map(|end| end.notes.iter().filter(overdue).count()), [1, 1]);
    assert_eq!(world.delivered(), [(0, 610), (0, 610)]);
    // A later key of protocol 3 is a reason to try again.
    world.talk_for(60 * SECOND);
    world.lose = |_, _| false;
    world.talk_for(SECOND);
    assert!(!world.is_sealed());
    world.act(0, Sealing::data_goes_on);
    world.talk_for(SECOND);
    assert!(world.is_sealed());
}

#[test]
fn a_peer_that_says_that_it_ends_is_met_again() {
    let mut world = sealed();
    world.act(0, Sealing::peer_leaves);
    assert!(world.ends[0].send.is_none() && world.ends[0].receive.is_empty() && world.ends[0].unsealed == NONE);
    world.restart(1);
    world.talk_for(SECOND);
    assert!(world.is_sealed());
}

#[test]
fn pings_without_an_answer_cause_a_handshake_if_the_peer_has_an_address() {
    for (peer, begins) in [("peer 192.0.2.2:6789", true), ("peer 0.0.0.0:0", false)] {
        let options = options(&format!("{peer}\nsealed require"));
        let mut sealing = Sealing::new(&options, None, None, (rng(1), rng(2)), at(SECOND)).unwrap();
        let sends = |effects: Vec<Effect>| {
            effects.iter().any(|effect| matches!(effect, Effect::Request(SealedRequest::Transmit { to: None, .. })))
        };
        assert_eq!(sends(sealing.unanswered(at(SECOND))), begins, "{peer}");
        sealing.learn_address();
        assert_eq!(sends(sealing.unanswered(at(SECOND))), !begins, "{peer}");
    }
}

#[test]
fn keys_are_renewed_and_that_is_no_news() {
    let mut world = sealed();
    let first = world.ends[0].send_key();
    world.talk_for(130 * SECOND);
    assert!(world.is_sealed() && world.ends[0].send_key() != first);
    let sessions = |end: &world::End| {
        let news = |note: &&Note| matches!(note, Note::Handshake(handshake::Note::Sealed { .. }));
        let renewed = |note: &&Note| matches!(note, Note::Renewed(_));
        (end.notes.iter().filter(news).count(), end.notes.iter().filter(renewed).count())
    };
    assert_eq!(world.ends.each_ref().map(sessions), [(1, 1), (1, 1)]);
    // Nothing is sent, so the keys end; another session is news.
    world.run_for(300 * SECOND);
    assert!(world.ends.iter().all(|end| end.send.is_none() && end.receive.is_empty()));
    world.talk_for(SECOND);
    assert_eq!(world.ends.each_ref().map(sessions), [(2, 1), (2, 1)]);
}

#[test]
fn a_test_can_have_keys_renewed_sooner() {
    let options = options("sealed require");
    let from = "192.0.2.2:6789".parse().unwrap();
    for (most, expected) in [(None, 120_000), (Some(500 * MS), 500), (Some(500 * SECOND), 120_000)] {
        let mut ends = [1, 3]
            .map(|seed| Sealing::new(&options, None, most, (rng(seed), rng(seed + 1)), at(Duration::ZERO)).unwrap());
        let mut effects = ends[0].unanswered(at(SECOND));
        for to in [1, 0] {
            let sent = effects.iter().find_map(|effect| match effect {
                Effect::Request(SealedRequest::Transmit { datagram, .. }) => Some(datagram.clone()),
                _ => None,
            });
            let event = SealedEvent::Handshake { datagram: sent.unwrap(), from, from_peer: true };
            effects = ends[to].event(&event, at(SECOND + MS));
        }
        let renew = effects.iter().find_map(|effect| match effect {
            Effect::Request(SealedRequest::Send { renew_ms, .. }) => Some(*renew_ms),
            _ => None,
        });
        assert_eq!(renew, Some(expected));
    }
}

/// A worker answers a packet before the daemon has seen that it opened.
#[test]
fn an_engine_that_has_asked_before_it_got_a_key_causes_no_second_handshake() {
    let mut world = World::new(["require", "require"]);
    world.act(0, Sealing::unanswered);
    world.run_for(SECOND);
    assert!(world.is_sealed());
    let mut transmits = |after: Duration| {
        let event = SealedEvent::Wanted { reason: SealedWanted::Send };
        let effects = world.ends[1].sealing.as_mut().unwrap().event(&event, at(SECOND + after));
        effects.iter().any(|effect| matches!(effect, Effect::Request(SealedRequest::Transmit { .. })))
    };
    assert!(!transmits(Duration::ZERO) && transmits(135 * SECOND));
}

/// A machine slept for an hour: what comes first must not find the old keys in use.
#[test]
fn keys_that_are_too_old_are_wiped_before_anything_else_happens() {
    let mut world = sealed();
    let hour = at(world.now + 3_600 * SECOND);
    let serial = world.ends[0].receive[0].serial;
    let effects = world.ends[0].sealing.as_mut().unwrap().event(&SealedEvent::Probed { serial }, hour);
    let requests: Vec<_> = effects
        .iter()
        .filter_map(|effect| if let Effect::Request(request) = effect { Some(request) } else { None })
        .collect();
    assert!(requests.contains(&&SealedRequest::StopSending) && requests.contains(&&SealedRequest::Forget { serial }));
    assert!(!requests.contains(&&SealedRequest::Confirm), "{requests:?}");
}

/// Somebody lets handshakes pass, and drops what is sealed.
#[test]
fn a_session_that_nobody_confirms_is_logged() {
    let mut world = World::new(["auto", "auto"]);
    world.lose = |datagram, _| matches!(datagram, Datagram::Sealed(..));
    // The world takes a receive key that comes while there is a send key for that of an answer, which is kept before.
    world.ends[0].kept = Some(Kept { id: 1, newest: 0, was_sealed: false });
    world.introduce();
    world.run_for(59 * SECOND);
    assert!(world.ends[0].send.is_some() && world.ends[0].unsealed.accepts);
    let is_told = |world: &World| world.ends[0].has_noted(|note| *note == Note::Overdue);
    assert!(!is_told(&world));
    world.run_for(2 * SECOND);
    assert!(is_told(&world));
}

/// Keys of protocol 3 that were in use before may have leaked since.
#[test]
fn an_end_that_forgets_accepts_protocol_3_when_it_seals_no_more() {
    let mut world = sealed();
    world.act(0, Sealing::forget);
    assert_eq!(world.ends[0].unsealed, Unsealed { sends: true, accepts: false });
    world.lose = |_, _| true;
    world.run_for(200 * SECOND);
    assert!(world.ends[0].send.is_none());
    assert_eq!(world.ends[0].unsealed, BOTH);
    world.act(0, Sealing::forget);
    assert_eq!(world.ends[0].unsealed, BOTH);
}

#[test]
fn an_answer_is_kept_before_it_is_sent_and_each_message_is_judged() {
    let options = options("sealed require");
    let mut ends =
        [1, 3].map(|seed| Sealing::new(&options, None, None, (rng(seed), rng(seed + 1)), at(Duration::ZERO)).unwrap());
    let first = ends[0].unanswered(at(SECOND));
    let Some(Effect::Request(SealedRequest::Transmit { datagram, to: None })) = first.first() else {
        panic!("nothing")
    };
    let from = "192.0.2.9:1".parse().unwrap();
    let event = SealedEvent::Handshake { datagram: datagram.clone(), from, from_peer: false };
    let effects = ends[1].event(&event, at(SECOND + MS));
    let [
        Effect::Keep(kept),
        Effect::Request(SealedRequest::Receive(_)),
        Effect::Request(SealedRequest::Transmit { to, .. }),
        Effect::Request(SealedRequest::Judged { refused: None }),
    ] = &effects[..]
    else {
        panic!("another order")
    };
    assert_eq!((*to, kept.was_sealed), (Some(from), false));
    // A recorded one, before and after a restart.
    let mut later = Sealing::new(&options, Some(*kept), None, (rng(7), rng(8)), at(9 * SECOND)).unwrap();
    let effects = later.event(&event, at(9 * SECOND));
    let judged = |effect: &Effect| match effect {
        Effect::Request(SealedRequest::Judged { refused }) => Some(*refused),
        _ => None,
    };
    assert_eq!(effects.iter().find_map(judged), Some(Some(Refused::Replayed)));
}

#[test]
fn a_tunnel_that_must_not_seal_does_not() {
    for text in ["sealed no", "sealed auto"] {
        let mut options = options(text);
        if text == "sealed auto" {
            (options.key, options.sealed) = (None, SealedPolicy::No);
        }
        assert!(Sealing::new(&options, None, None, (rng(1), rng(2)), at(SECOND)).is_none());
    }
}

#[derive(Clone, Debug)]
enum Op {
    Talk(u64),
    Silence(u64),
    Restart(usize),
    LoseFile(usize),
    Forget(usize),
    LoseKeys(usize),
    Leave(usize),
    Introduce,
    Cut(bool),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        3 => (100_u64..30_000).prop_map(Op::Talk),
        1 => (100_u64..400_000).prop_map(Op::Silence),
        1 => (0_usize..2).prop_map(Op::Restart),
        1 => (0_usize..2).prop_map(Op::LoseFile),
        1 => (0_usize..2).prop_map(Op::Forget),
        1 => (0_usize..2).prop_map(Op::LoseKeys),
        1 => (0_usize..2).prop_map(Op::Leave),
        1 => Just(Op::Introduce),
        1 => any::<bool>().prop_map(Op::Cut),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    /// Whatever has happened, two ends that both talk understand each other in the end, and an end that was sealed sends and accepts nothing
    /// else unless it was told to forget.
    #[test]
    fn ends_understand_each_other_whatever_has_happened(
        first in prop::sample::select(vec!["auto", "require"]),
        ops in prop::collection::vec(op(), 0..25),
        seed: u64,
    ) {
        let mut world = World::of_seed([first, "auto"], seed);
        for op in ops {
            let had_left = world.ends.each_ref().map(|end| !end.unsealed.sends);
            let mut may_return = None;
            match op {
                Op::Talk(ms) => world.talk_for(Duration::from_millis(ms)),
                Op::Silence(ms) => world.run_for(Duration::from_millis(ms)),
                Op::Restart(end) => {
                    // An end that has a send key, but has opened nothing yet, has nothing on disk.
                    may_return = world.ends[end].kept.is_none_or(|kept| !kept.was_sealed).then_some(end);
                    world.restart(end);
                }
                Op::LoseFile(end) => {
                    (world.ends[end].kept, may_return) = (None, Some(end));
                    world.restart(end);
                }
                Op::Forget(end) => {
                    world.ends[end].is_forgotten = true;
                    may_return = Some(end);
                    world.talk_for(SECOND);
                    world.ends[end].is_forgotten = false;
                }
                Op::LoseKeys(end) => world.act(end, |sealing, now| sealing.event(&SealedEvent::KeysLost, now)),
                Op::Leave(end) => world.act(end, Sealing::peer_leaves),
                Op::Introduce => world.introduce(),
                Op::Cut(is_cut) => world.lose = if is_cut { |_, _| true } else { |_, _| false },
            }
            for end in [0, 1] {
                prop_assert!(!had_left[end] || !world.ends[end].unsealed.sends || may_return == Some(end));
            }
        }
        world.lose = |_, _| false;
        // The longest pause between handshakes that anybody's packets can cause.
        world.talk_for(330 * SECOND);
        let before = world.delivered();
        world.talk_for(5 * SECOND);
        let after = world.delivered();
        for (before, after) in before.into_iter().zip(after) {
            prop_assert!(after.0 + after.1 >= before.0 + before.1 + 40, "{:?} {:?}", before, after);
        }
    }
}
