//! Two ends with virtual time, and an adversary between them who loses, repeats, reorders, changes and reflects, and replays
//! everything that was ever sent, also across restarts. The ends check on each packet that no IV is used twice, that a key is
//! used only if the peer has had it, and that each payload is delivered once, to the peer of its sender.

mod end;
mod world;

use proptest::prelude::*;
use rand::RngExt;

use super::*;
use world::{Event, MS, World};

/// Within this time after the network has healed, both ends send sealed packets that the other one opens.
const HEALED: Duration = Duration::from_millis(3 * 6_250);

fn pair(seed: u64) -> World {
    World::new(seed).traffic(0, 50 * MS).traffic(1, 70 * MS)
}

const fn kind(datagram: &[u8]) -> u8 {
    if datagram[4] < 0x40 { datagram[7] } else { 0 }
}

#[test]
fn one_round_trip_seals_and_half_another_confirms() {
    let mut world = World::new(1).traffic(0, 5 * MS);
    world.run(31 * MS);
    assert!(world.ends[0].sending.is_some() && world.ends[1].sending.is_none());
    world.run(15 * MS);
    assert!(world.is_sealed());
    assert!(world.ends[0].kept.newest == 0 && world.ends[1].kept.newest > 0 && world.ends[1].kept.was_sealed);
}

#[test]
fn ends_that_begin_at_once_agree_on_one_session() {
    for seed in 0..20 {
        let mut world = World::new(seed).traffic(0, 5 * MS).traffic(1, 5 * MS);
        world.run(100 * MS);
        assert!(world.is_sealed(), "seed {seed}");
        assert_eq!(world.ends[0].sessions + world.ends[1].sessions, 2);
    }
}

#[test]
fn nothing_is_lost_when_keys_are_renewed() {
    let mut world = World::new(3).traffic(0, 5 * MS).traffic(1, 5 * MS);
    (world.latency, world.jitter) = (100 * MS, 50 * MS);
    world.run(Duration::from_secs(700));
    assert!((5..9).contains(&world.ends[0].sessions), "{}", world.ends[0].sessions);
    world.queue.retain(|_, event| !matches!(event, Event::Data(..)));
    world.run(Duration::from_secs(1));
    assert_eq!(world.book.delivered(0) + world.book.delivered(1), world.book.sent());
}

/// The peer of a server that does not move gets another address while the tunnel is idle, and then both have something to send:
/// the server sends its first messages into the void, and drops those of its peer, if it takes that for crossing.
#[test]
fn ends_that_cross_agree_when_one_was_forgotten_by_its_nat() {
    for seed in 0..10 {
        let mut world = pair(seed).behind_nat(1);
        world.run(Duration::from_secs(5));
        world.queue.clear();
        world.run(Duration::from_secs(300));
        let address = world.ends[1].address;
        assert!(world.ends.iter().all(|end| end.sending.is_none()));
        let mut world = world.traffic(0, 50 * MS);
        world.run(MS);
        let mut world = world.traffic(1, 70 * MS);
        world.run(200 * MS);
        assert!(world.ends[1].address != address && world.is_sealed(), "seed {seed}");
        assert!(world.passes(), "seed {seed}");
    }
}

/// One end does not know where its peer is, and also has something to send.
#[test]
fn an_end_without_a_peer_takes_the_one_that_comes() {
    for seed in 0..10 {
        let mut world = pair(seed);
        world.ends[0].peer = None;
        world.run(200 * MS);
        assert!(world.is_sealed() && world.passes(), "seed {seed}");
    }
}

#[test]
fn an_end_that_moves_is_followed() {
    for seed in 0..10 {
        let mut world = pair(seed);
        for end in [0, 1, 1, 0] {
            world.run(Duration::from_secs(5));
            world.roam(end);
            world.run(Duration::from_secs(1));
            assert!(world.passes(), "seed {seed}");
        }
    }
}

#[test]
fn an_idle_tunnel_wipes_its_keys_and_is_silent() {
    let mut world = pair(5);
    world.run(Duration::from_secs(60));
    world.queue.clear();
    world.run(Duration::from_secs(300));
    assert!(world.ends.iter().all(|end| end.sending.is_none() && end.receiving.is_empty() && end.deadline().is_none()));
}

#[test]
fn a_lost_message_costs_one_interval() {
    for lost in [1, 2] {
        let mut world = pair(4);
        world.loss = 0.0;
        world.lose = if lost == 1 { |_, datagram| kind(datagram) == 1 } else { |_, datagram| kind(datagram) == 2 };
        world.run(100 * MS);
        world.heal();
        world.run(500 * MS);
        assert!(world.is_sealed(), "{lost}");
    }
}

/// A path whose round trip is longer than the interval between repetitions.
#[test]
fn a_far_peer_is_reached() {
    let mut world = pair(6);
    world.latency = Duration::from_secs(2);
    world.run(Duration::from_secs(20));
    assert!(world.is_sealed());
}

#[test]
fn a_restarted_end_is_sealed_again_whoever_sends_first() {
    for seed in 0..20 {
        for only in [None, Some(0), Some(1)] {
            let mut world = pair(seed);
            world.run(Duration::from_secs(10));
            world.ends[0].restart(seed + 1000);
            world
                .queue
                .retain(|_, event| !matches!(event, Event::Data(from, _) if only.is_some_and(|only| only != *from)));
            world.run(Duration::from_secs(2));
            assert!(world.is_sealed(), "seed {seed}, {only:?}");
        }
    }
}

#[test]
fn a_clock_that_was_set_back_costs_one_round_trip() {
    for back in [1, 1_000_000_000, 1_600_000_000_000_000_000] {
        let mut world = World::new(7).traffic(0, 50 * MS);
        world.run(Duration::from_secs(10));
        world.ends[0].restart(99);
        world.ends[0].clock = -back;
        world.run(130 * MS);
        assert!(world.is_sealed(), "{back} ns");
    }
}

/// Everything that the ends have ever sent comes back to both of them, after both have restarted.
#[test]
fn replays_to_restarted_ends_make_no_session_and_deliver_nothing() {
    let mut world = pair(8);
    world.run(Duration::from_secs(400));
    world.queue.clear();
    for lost in [false, true] {
        for (end, seed) in [(0, 5), (1, 6)] {
            if lost {
                world.ends[end].kept.newest = 0;
            }
            world.ends[end].restart(seed);
        }
        let delivered = [0, 1].map(|end| world.book.delivered(end));
        for datagram in world.recorded.clone() {
            for to in 0..2 {
                // The end begins no attempt of its own because of packets without a key.
                if datagram[4] < 0x40 {
                    world.deliver(to, &datagram);
                }
            }
        }
        assert_eq!([0, 1].map(|end| world.book.delivered(end)), delivered);
        assert!(world.ends.iter().all(|end| end.sending.is_none()));
    }
}

/// The selfie attack: each end gets its own messages only.
#[test]
fn an_end_makes_no_session_with_itself() {
    let mut world = pair(9);
    world.reflects = true;
    for _ in 0..20 {
        world.run(Duration::from_secs(10));
        assert!(world.ends.iter().all(|end| end.sending.is_none() && end.receiving.is_empty()));
        assert!(world.ends.iter().all(|end| end.kept.newest == 0));
    }
    // Also when its file was lost, so that it does not know its own messages from before.
    world.ends[0].kept.id ^= 1;
    world.ends[0].restart(1);
    for datagram in world.recorded.clone() {
        world.deliver(0, &datagram);
        world.run(MS);
        assert!(world.ends[0].sending.is_none());
    }
    world.reflects = false;
    world.run(HEALED);
    assert!(world.is_sealed());
}

#[test]
fn sessions_follow_each_other_on_a_lossy_path_under_attack() {
    for seed in 0..3 {
        let mut world = pair(seed).attacked(20 * MS);
        (world.loss, world.duplication, world.jitter) = (0.2, 0.1, 100 * MS);
        for _ in 0..5 {
            let before = [0, 1].map(|end| world.ends[end].sessions);
            world.run(Duration::from_secs(150));
            for (end, before) in world.ends.iter().zip(before) {
                assert!(end.sessions > before, "seed {seed}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn whatever_happens_the_tunnel_is_sealed_again_when_the_network_heals(
        seed: u64, loss in 0.0f64..1.0, jitter in 0u32..400, latency in 1u32..500, attack in 5u32..200,
        events in proptest::collection::vec((0u8..10, 1u64..40), 1..12),
    ) {
        let mut world = pair(seed).attacked(attack * MS);
        (world.loss, world.duplication) = (loss, 0.2);
        (world.jitter, world.latency) = (jitter * MS, latency * MS);
        for (event, seconds) in events {
            let end = usize::from(event % 2);
            match event / 2 {
                0 => world.ends[end].replace_engine(),
                1 => {
                    let seed = world.rng.random();
                    world.ends[end].restart(seed);
                    // Up to a year either way.
                    world.ends[end].clock = world.rng.random_range(-31_536_000..31_536_000) * 1_000_000_000;
                }
                2 => {
                    let seeds = [0, 1].map(|_| world.rng.random());
                    world.ends.iter_mut().zip(seeds).for_each(|(end, seed)| end.restart(seed));
                }
                // The file is lost with the process.
                3 => {
                    let seed = world.rng.random();
                    world.ends[end].kept = Kept::without_file(1_700_000_000_000_000_000, &mut world.rng);
                    world.ends[end].restart(seed);
                }
                // One end stays: two that do not know each other's address cannot meet.
                _ => world.roam(1),
            }
            world.run(Duration::from_secs(seconds));
        }
        world.heal();
        world.run(HEALED);
        prop_assert!(world.is_sealed());
        prop_assert!(world.passes());
    }
}
