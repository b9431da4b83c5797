//! The filters are exact, bounded, and never slow.

use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn packet(number: u64) -> [u8; 16] {
    let mut packet = [0; 16];
    packet[..8].copy_from_slice(&number.to_le_bytes());
    packet
}

fn insert(filter: &mut ReplayFilter, packet: &[u8; 16]) -> bool {
    let packet = filter.fingerprint(packet);
    filter.insert(packet)
}

#[test]
fn every_packet_of_a_long_key_is_taken_once() {
    let mut filter = ReplayFilter::default();
    for number in 0..1 << 18 {
        assert!(insert(&mut filter, &packet(number)), "{number}");
    }
    for number in 0..1 << 18 {
        assert!(!insert(&mut filter, &packet(number)), "{number}");
    }
}

#[test]
fn memory_follows_the_number_of_packets() {
    let mut filter = ReplayFilter::default();
    let mut after = |packets: std::ops::Range<u64>| {
        packets.for_each(|number| assert!(insert(&mut filter, &packet(number))));
        filter.memory()
    };
    assert_eq!(after(0..0), 0);
    assert!(after(0..1) <= 192);
    assert!(after(1..1000) <= 22 << 10);
    assert!(after(1000..1 << 16) <= (1 << 20) + (8 << 10));
    assert!(after(1 << 16..1 << 18) <= (4 << 20) + (8 << 10));
}

#[test]
fn a_difference_in_any_bit_is_another_packet() {
    let mut filter = ReplayFilter::default();
    assert!(insert(&mut filter, &[0; 16]));
    for bit in 0..128 {
        let mut packet = [0; 16];
        packet[bit / 8] = 1 << (bit % 8);
        assert!(insert(&mut filter, &packet), "{bit}");
    }
}

#[test]
fn the_work_of_one_insertion_stays_small() {
    let mut set = Set::default();
    let key = RandomState::new();
    for number in 0..GENERATION_ENTRIES as u64 {
        set.insert(fingerprint(&key, fold(&packet(number))));
    }
    // A growing table moves its contents.
    assert!(set.tables.iter().all(|table| table.used < 2 * SPLIT_ENTRIES));
}

#[test]
fn generations_remember_the_limit_and_forget_twice_the_limit() {
    let mut set = Generations::new(1000);
    for number in 0..10_000u64 {
        assert!(set.insert(number + 1));
        let last = number.saturating_sub(999) + 1;
        assert!(set.contains(last) && !set.insert(last), "{number}");
        assert!(number < 2000 || !set.contains(number - 1999));
    }
    assert!(set.memory() <= 3 * 22 * 1000 + 4096, "{}", set.memory());
}

#[test]
fn our_own_ivs_are_known_again() {
    let mut sent = SentIvs::default();
    assert_eq!(sent.memory(), 0);
    sent.insert(b"ours....");
    assert!(sent.contains(b"ours...."));
    assert!(!sent.contains(b"theirs.."));
}

#[test]
fn the_static_filter_takes_a_packet_once() {
    let mut filter = StaticReplayFilter::default();
    assert_eq!(filter.memory(), 0);
    let packet = filter.fingerprint(&packet(1));
    assert!(filter.insert(packet));
    assert!(!filter.insert(packet));
}

proptest! {
    #[test]
    fn the_filter_agrees_with_a_plain_set(numbers in prop::collection::vec(0u64..6000, 0..9000)) {
        let (mut filter, mut model) = (ReplayFilter::default(), HashSet::new());
        for number in numbers {
            let packet = filter.fingerprint(&packet(number));
            filter.prefetch(packet);
            prop_assert_eq!(filter.insert(packet), model.insert(number));
        }
    }
}
