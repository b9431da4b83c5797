//! Private frames that wait for a key or for the proof of an address.

use std::time::Duration;

use super::*;

const STATIC_KEY: [u8; KEY] = [9; KEY];

/// Two ends whose `a` may not send data under the static key, and has no other.
fn waiting(protocol: Protocol) -> Pair {
    let mut pair = Pair::new(Algorithm::Blowfish, protocol).unwrap();
    pair.a.set_key(Slot::Static, &STATIC_KEY);
    pair.b.set_key(Slot::Static, &STATIC_KEY);
    pair.a.tunnel().static_data = false;
    pair
}

fn is_wanted(pair: &mut Pair) -> bool {
    matches!(pair.a.reports.try_recv(), Ok((0, WorkerReport::Event(Event::KeyWanted { .. }))))
}

#[test]
fn packets_wait_for_the_key_and_leave_in_order_before_later_ones() {
    let mut pair = waiting(Protocol::Ip);
    let packets: Vec<Vec<u8>> = (100..110).map(udp).collect();
    for packet in &packets[..9] {
        assert!(pair.a.push(packet, 0));
        assert!(pair.a.seal().is_empty());
    }
    assert!(is_wanted(&mut pair));
    assert_eq!(pair.a.accounted(), 0, "their outcome is still to come");
    pair.change_key(&KEYS[0], None);
    assert!(pair.a.push(&packets[9], 0));
    let sealed = pair.a.seal();
    let (a, b) = (&pair.a, &mut pair.b);
    assert_eq!(b.receive(a, &sealed), packets);
    assert_eq!((counted(&pair.a, Verdict::Sent), pair.a.accounted()), (10, 10));
    pair.assert_frames_are_back();
}

#[test]
fn a_key_alone_releases_them_superframes_too() {
    let mut pair = waiting(Protocol::Ip);
    assert!(pair.a.push(&Flow::tcp4().packet(&[7; 10_000]), 1000));
    assert!(pair.a.seal().is_empty());
    pair.change_key(&KEYS[0], None);
    assert_eq!(pair.a.release().len(), 10);
    assert!(!pair.a.datapath.has_held());
    pair.assert_frames_are_back();
}

#[test]
fn what_waits_for_too_long_or_finds_no_room_is_counted_and_freed() {
    let mut pair = waiting(Protocol::Ip);
    let total = pair.a.datapath.pool.total();
    for number in 1..=300 {
        assert!(pair.a.push(&udp(100), 0));
        assert!(pair.a.seal().is_empty());
        let held = total - pair.a.datapath.pool.free();
        assert_eq!((held, pair.a.accounted()), (number.min(total / 8), (number - held) as u64));
    }
    pair.a.pass(Duration::from_millis(999));
    assert!(pair.a.release().is_empty() && pair.a.datapath.has_held());
    pair.a.pass(Duration::from_millis(1));
    assert!(pair.a.release().is_empty() && !pair.a.datapath.has_held());
    assert_eq!((counted(&pair.a, Verdict::NoSendKey), pair.a.accounted()), (300, 300));
    pair.assert_frames_are_back();
    // A superframe counts once for each segment.
    assert!(pair.a.push(&Flow::tcp4().packet(&[7; 10_000]), 1000));
    assert!(pair.a.seal().is_empty());
    pair.a.pass(Duration::from_secs(1));
    assert!(pair.a.release().is_empty());
    assert_eq!(counted(&pair.a, Verdict::NoSendKey), 310);
    pair.assert_frames_are_back();
}

#[test]
fn frames_of_an_ethernet_tunnel_wait_too() {
    let mut pair = waiting(Protocol::Ethernet);
    let frame = [&[2; 12][..], &[0x88, 0xB5], &[7; 100]].concat();
    assert!(pair.a.push_frame(&frame));
    assert!(pair.a.seal().is_empty());
    pair.change_key(&KEYS[0], None);
    assert_eq!(pair.a.release().len(), 1);
    pair.assert_frames_are_back();
}

#[test]
fn the_frames_of_a_removed_tunnel_are_freed() {
    let mut pair = waiting(Protocol::Ip);
    assert!(pair.a.push(&udp(100), 0));
    assert!(pair.a.seal().is_empty());
    pair.a.datapath.tunnels.remove(&0);
    pair.a.datapath.drop_held(0);
    pair.assert_frames_are_back();
}

#[test]
fn packets_to_an_unknown_peer_wait_while_it_is_asked() {
    let mut pair = waiting(Protocol::Ip);
    pair.a.tunnel().static_data = true;
    let home = pair.b.me();
    pair.a.tunnel().peer = None;
    assert!(pair.a.push(&udp(100), 0));
    assert!(pair.a.seal().is_empty());
    assert_eq!(counted(&pair.a, Verdict::NoPeer), 1, "nobody is asked");
    let now = pair.a.datapath.now;
    pair.a.tunnel().common.challenge.ask(home, false, now);
    assert!(pair.a.push(&udp(100), 0));
    assert!(pair.a.seal().is_empty());
    assert_eq!(counted(&pair.a, Verdict::NoPeer), 1);
    pair.a.tunnel().peer = Some(home);
    assert_eq!(pair.a.release().len(), 1);
    pair.assert_frames_are_back();
}
