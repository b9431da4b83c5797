use super::attach::{free_number, known};
use super::*;
use cipe_common::maps::MAX_TUNNELS;

#[test]
fn a_peer_without_an_address_is_learned() {
    for (text, is_known) in [
        ("0.0.0.0:0", false),
        ("0.0.0.0:6789", false),
        ("[::]:0", false),
        ("127.0.0.1:9", false),
        ("127.0.0.1:6789", true),
        ("192.0.2.1:9", true),
    ] {
        let peer: SocketAddr = text.parse().unwrap();
        assert_eq!(known(peer), is_known.then_some(peer), "{text}");
    }
}

#[test]
fn a_freed_number_is_used_again_as_late_as_possible() {
    let last = MAX_TUNNELS as u16 - 1;
    assert_eq!(free_number(u16::MAX, |_| false), Some(0));
    assert_eq!(free_number(0, |_| false), Some(1));
    assert_eq!(free_number(5, |number| number == 6), Some(7));
    assert_eq!(free_number(last, |number| number == 0), Some(1));
    assert_eq!(free_number(7, |number| number != 7), Some(7));
    assert_eq!(free_number(7, |_| true), None);
}

#[test]
fn a_previous_key_is_kept_until_its_successor_is_used_and_some_time_longer() {
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    let mut previous = Previous { successor: 6, keep: Duration::from_secs(20), until: None };
    // The peer still uses the key itself, or has used none yet.
    for used in [0, 4] {
        assert!(!previous.is_over(used, after(1000)));
    }
    assert!(!previous.is_over(6, after(2000)));
    assert!(!previous.is_over(6, after(2019)));
    assert!(previous.is_over(6, after(2020)));
}
