//! Two ends of a tunnel on a bad path, in virtual time: the key exchange under many random patterns of loss and
//! reordering.

mod end;
mod world;

use std::time::Duration;

use proptest::prelude::*;

use crate::wire::message::{DynamicKey, Message};

use self::end::{Datagram, End, Habit};
use self::world::{Event, World};

const TOKXC: Duration = Duration::from_secs(10);
const MS: Duration = Duration::from_millis(1);

/// The program at an end: ours, or an original.
type Who = Option<Habit>;
const OURS: Who = None;

fn end(who: Who, seed: u64) -> End {
    who.map_or_else(|| End::ours(seed), |habit| End::original(seed, habit))
}

fn pair(first: Who, second: Who, seed: u64) -> World {
    let ends = [end(first, seed), end(second, seed + 1_000_000)];
    World::new(ends, seed).traffic(0, 50 * MS).traffic(1, 50 * MS)
}

const ORIGINALS: [Habit; 3] = [Habit::Forgets, Habit::Chains, Habit::Keeps];
const KINDS: [(Who, Who); 5] = [
    (OURS, OURS),
    (OURS, Some(Habit::Forgets)),
    (OURS, Some(Habit::Chains)),
    (OURS, Some(Habit::Keeps)),
    (Some(Habit::Chains), OURS),
];

#[test]
fn both_sides_at_once_get_their_keys_within_a_round_trip() {
    for (first, second) in KINDS {
        let mut world = pair(first, second, 1);
        world.run_until(31 * MS);
        assert!(world.keyed(0) && world.keyed(1));
        assert_eq!(world.ends[0].counters.changes, 1);
    }
}

#[test]
fn between_our_own_no_packet_is_lost_or_static_at_a_key_change() {
    let ends = [End::ours(1).with_limits(20, u32::MAX), End::ours(2).with_limits(30, u32::MAX)];
    let mut world = World::new(ends, 3).traffic(0, 5 * MS).traffic(1, 5 * MS);
    world.jitter = 10 * MS;
    world.run_until(Duration::from_secs(1));
    let at_start = [0, 1].map(|i| world.ends[i].counters.sent_static);
    world.run_until(Duration::from_secs(20));
    for (end, at_start) in world.ends.iter().zip(at_start) {
        assert!(end.counters.changes > 90, "{}", end.counters.changes);
        assert_eq!((end.counters.lost, end.counters.sent_static), (0, at_start));
    }
}

#[test]
fn an_original_loses_only_what_was_in_flight_at_a_key_change() {
    for habit in ORIGINALS {
        let ends = [End::ours(1).with_limits(200, u32::MAX), End::original(2, habit).with_limits(300, 500)];
        let mut world = World::new(ends, 3).traffic(0, MS).traffic(1, MS);
        world.run_until(Duration::from_secs(20));
        let changes = world.ends[0].counters.changes;
        assert!(changes > 60 && world.ends[1].counters.changes > 50);
        // 15 ms of latency: data stops under the old key before the NK_IND, so none is in flight when the original
        // takes the new key.
        assert_eq!((world.ends[0].counters.lost, world.ends[1].counters.lost), (0, 0), "{habit:?}");
    }
}

/// An original that is asked for a key twice, or whose messages are duplicated, announces two, and uses its old key
/// until its NK_ACK.
#[test]
fn several_keys_announced_at_once_lose_nothing() {
    for habit in ORIGINALS {
        let mut world = pair(OURS, Some(habit), 1).traffic(1, MS);
        world.run_until(Duration::from_secs(1));
        assert!(world.keyed(1));
        for _ in 0..20 {
            for _ in 0..3 {
                world.ends[1].announce(false, world.now);
                world.run_until(world.now + 5 * MS);
            }
            world.run_until(world.now + 500 * MS);
            assert!(world.keyed(1), "{habit:?}");
        }
        assert_eq!(world.ends[0].counters.lost, 0, "{habit:?}");
    }
}

/// If the next key's NK_IND overtakes a repeated NK_IND, an original takes the repeated one last.
#[test]
fn an_original_that_took_an_earlier_key_last_gets_the_one_in_use_again() {
    for habit in ORIGINALS {
        let mut world = World::new([End::ours(1).with_limits(20, u32::MAX), End::original(2, habit)], 3);
        world = world.traffic(0, 5 * MS).traffic(1, 50 * MS);
        world.run_until(50 * MS);
        let earlier = DynamicKey(world.ends[0].send.expect("a round trip takes 30 ms"));
        while world.ends[0].send.is_none_or(|key| key == earlier.0) {
            world.run_until(world.now + 5 * MS);
        }
        world.ends[0].send_limit = u32::MAX;
        world.run_until(world.now + Duration::from_secs(1));
        let payload = Message::indication(&earlier).build(0, &mut world.rng).to_vec();
        world.schedule(world.now, Event::Arrival(1, Datagram { under: None, message: Some(payload) }));
        world.run_until(world.now + 200 * MS);
        assert!(world.keyed(0), "{habit:?}");
        assert!(world.ends[1].counters.lost < 30, "{habit:?}: {}", world.ends[1].counters.lost);
    }
}

/// From the NK_IND on, an original counts every valid packet towards the key's limit; on a long path many of them are
/// under the static key.
#[test]
fn an_original_far_away_is_never_deafened() {
    let ends = [End::ours(1).with_limits(100, u32::MAX), End::original(2, Habit::Chains).with_limits(u32::MAX, 200)];
    let mut world = World::new(ends, 3).traffic(0, MS);
    world.latency = 60 * MS;
    world.run_until(Duration::from_secs(20));
    assert!(world.ends[0].counters.changes > 50);
    assert_eq!(world.ends[1].counters.lost, 0);
    assert_eq!(world.messages.get(&(1, 1)), None, "it had to ask for a key");
}

#[test]
fn an_original_that_takes_no_key_twice_gets_another_after_tokxc() {
    let mut world = World::new([End::ours(1), End::particular(2)], 3).traffic(0, 50 * MS);
    world.lose = |from, number, before| from == 1 && number == 3 && before == 0;
    world.run_until(TOKXC + 100 * MS);
    assert!(world.keyed(0));
}

#[test]
fn a_restarted_original_has_both_keys_after_two_round_trips() {
    for habit in ORIGINALS {
        for first in [0, 1] {
            let mut world = pair(OURS, Some(habit), 1);
            world.run_until(Duration::from_secs(30));
            world.ends[1] = End::original(77, habit);
            // End `first` sends its data first; the data of the other end is held back.
            let data = |event: &Event| matches!(event, Event::Data(from, _) if *from != first);
            let held: Vec<_> = world.queue.extract_if(.., |_, event| data(event)).collect();
            world.run_until(world.now + 150 * MS);
            for (_, event) in held {
                world.schedule(world.now, event);
            }
            world.run_until(world.now + 150 * MS);
            assert!(world.keyed(0) && world.keyed(1), "{habit:?}, {first} first");
        }
    }
}

/// A gateway comes back with its old keys after another one has replaced it for a while.
#[test]
fn ends_with_keys_that_the_other_lacks_find_each_other() {
    for (second, patience) in [
        (OURS, Duration::from_secs(2)),
        (Some(Habit::Forgets), Duration::from_secs(2)),
        (Some(Habit::Chains), Duration::from_secs(2)),
        (Some(Habit::Keeps), Duration::from_secs(2)),
        // All packets under the unknown key are lost until their sender detects that.
        (Some(Habit::Stubborn), 2 * TOKXC),
    ] {
        let mut world = pair(OURS, second, 1);
        world.run_until(Duration::from_secs(60));
        let mut away = std::mem::replace(&mut world.ends[0], End::ours(99));
        for _ in 0..5 {
            world.run_until(world.now + Duration::from_secs(60));
            assert!(world.keyed(0) && world.keyed(1), "{second:?}");
            std::mem::swap(&mut world.ends[0], &mut away);
            world.run_until(world.now + patience);
            assert!(world.passes(0) && world.passes(1), "{second:?}");
        }
    }
}

/// Forged packets that look like packets under a dynamic key.
#[test]
fn forgeries_on_an_idle_tunnel_do_not_make_it_exchange_keys_for_ever() {
    let mut world = pair(OURS, OURS, 1);
    world.run_until(Duration::from_secs(1));
    world.queue.clear();
    for second in 0..6_000 {
        let when = world.now + second * 1_000 * MS;
        world.schedule(when, Event::Arrival(0, Datagram { under: Some([0x99; 16]), message: None }));
    }
    world.run_until(world.now + Duration::from_secs(6_000));
    assert!((3..20).contains(&world.messages[&(0, 1)]), "{}", world.messages[&(0, 1)]);
    assert!(world.keyed(0) && world.keyed(1));
}

#[test]
fn an_original_that_went_deaf_gets_a_key() {
    // Our end does not renew its key, so that the original reaches its limit, 1,000 packets here.
    let original = End::original(2, Habit::Chains).with_limits(u32::MAX, 1_000);
    let mut world = World::new([End::ours(1), original], 3).traffic(0, MS);
    world.run_until(Duration::from_secs(20));
    assert!(world.ends[0].counters.changes > 15);
    assert!(world.ends[1].counters.lost < 50 * world.ends[0].counters.changes);
}

#[test]
fn any_one_lost_message_is_made_good_within_half_a_second() {
    for (first, second) in KINDS.into_iter().filter(|(first, _)| *first == OURS) {
        for lose in [
            |from, number, before| from == 0 && number == 2 && before == 0,
            |from, number, before| from == 1 && number == 3 && before == 0,
            |from, number, before| from == 0 && number == 0x70 && before == 0,
            |from, number, before| from == 1 && number == 0x70 && before == 0,
        ] {
            let mut world = pair(first, second, 1);
            world.lose = lose;
            world.run_until(500 * MS);
            assert!(world.keyed(0));
        }
    }
}

#[test]
fn a_restarted_peer_is_heard_again_although_its_request_was_lost() {
    for (_, other) in KINDS.into_iter().filter(|(first, _)| *first == OURS) {
        let mut world = pair(OURS, other, 1);
        world.run_until(Duration::from_secs(30));
        // Our end restarts and only listens: it must request a key, and the first NK_REQ is lost.
        world.ends[0] = End::ours(77);
        world.queue.retain(|_, event| !matches!(event, Event::Data(0, _)));
        world.messages.clear();
        world.lose = |from, number, before| from == 0 && number == 1 && before == 0;
        world.run_until(world.now + 500 * MS);
        assert!(world.keyed(1) && world.passes(1));
    }
}

#[test]
fn one_of_our_own_replaced_by_an_original_is_treated_as_one() {
    let mut world = pair(OURS, OURS, 1);
    world.ends[0].send_limit = 100;
    world.run_until(Duration::from_secs(30));
    world.ends[1] = End::original(99, Habit::Chains);
    world.run_until(world.now + TOKXC);
    let lost = world.ends[1].counters.lost;
    world.run_until(world.now + 3 * TOKXC);
    assert!(world.ends[0].counters.changes > 10 && world.keyed(0));
    assert_eq!(world.ends[1].counters.lost, lost);
}

#[test]
fn a_dead_peer_is_left_alone_when_there_is_no_traffic() {
    let mut world = World::new([End::ours(1), End::ours(2)], 3);
    world.loss = 1.0;
    world.ends[0].send_data(Duration::ZERO);
    world.run_until(4 * TOKXC);
    assert_eq!(world.ends[0].deadline(), None);
    assert!(world.messages[&(0, 2)] < 20);
}

/// Every exchange that an end of ours starts, on a path that loses one datagram in five.
fn recovers(first: Who, second: Who, seed: u64) {
    let mut world = pair(first, second, seed);
    (world.loss, world.duplication, world.jitter) = (0.2, 0.1, 100 * MS);
    world.run_until(3 * TOKXC);
    let check = |world: &mut World, what| {
        for (i, _) in [first, second].into_iter().enumerate().filter(|(_, who)| *who == OURS) {
            assert!(world.keyed(i), "{what}: end {i} of {first:?} {second:?}, seed {seed}");
        }
        assert!(world.passes(0) && world.passes(1), "{what}: {first:?} {second:?}, seed {seed}");
    };
    check(&mut world, "start");
    for i in 0..2 {
        let who = [first, second][i];
        world.ends[i] = end(who, seed + 5);
        // An original that lost our key requests one once per tokxc, and the other end cannot know that it should
        // announce one.
        world.run_until(world.now + if who == OURS { 3 } else { 8 } * TOKXC);
        check(&mut world, "restart");
    }
}

#[test]
fn one_datagram_in_five_lost_delays_it_by_less_than_three_tokxc() {
    for seed in 0..25 {
        for (first, second) in KINDS {
            recovers(first, second, seed);
        }
    }
}

#[test]
fn renewal_goes_on_for_ever_on_a_lossy_path() {
    for seed in 0..5 {
        let ends = [End::ours(seed).with_limits(100, u32::MAX), End::ours(seed + 50).with_limits(100, 200)];
        let mut world = World::new(ends, seed).traffic(0, 5 * MS).traffic(1, 5 * MS);
        (world.loss, world.duplication, world.jitter) = (0.2, 0.1, 30 * MS);
        for _ in 0..5 {
            let before = [0, 1].map(|i| world.ends[i].counters.changes);
            world.run_until(world.now + 3 * TOKXC);
            for (end, before) in world.ends.iter().zip(before) {
                assert!(end.counters.changes > before, "seed {seed}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_lost_the_tunnel_comes_back_when_the_path_does(
        seed: u64, kinds in 0..KINDS.len(), loss in 0.0f64..1.0, jitter in 0u32..400, latency in 1u32..700,
        bad_seconds in 1u64..60, limit in 20u32..400,
    ) {
        let (first, second) = KINDS[kinds];
        let mut world = pair(first, second, seed % 1_000_000);
        for end in &mut world.ends {
            end.send_limit = limit;
        }
        (world.loss, world.jitter, world.latency) = (loss, jitter * MS, latency * MS);
        world.run_until(Duration::from_secs(bad_seconds));
        (world.loss, world.jitter) = (0.0, Duration::ZERO);
        for end in &mut world.ends {
            end.send_limit = u32::MAX;
        }
        world.run_until(world.now + 3 * TOKXC);
        prop_assert!(world.keyed(0) && world.keyed(1));
        prop_assert!(world.passes(0) && world.passes(1));
    }
}
