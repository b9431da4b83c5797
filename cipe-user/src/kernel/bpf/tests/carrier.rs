//! Properties of the carrier program.

use std::net::SocketAddr;

use cipe_common::maps::Slot;
use proptest::prelude::*;

use super::{
    frames::{ETHERNET, IPV4, UDP, tagged, udp},
    *,
};

const LOCAL: &str = "192.0.2.1:4000";
const LOCAL_V6: &str = "[2001:db8::1]:4000";
const VLAN: [u8; 2] = [0x81, 0x00];
const QINQ: [u8; 2] = [0x88, 0xA8];
/// Value of `TC_ACT_PIPE`; the test run gives it as it is.
const TC_PIPE: u32 = 3;

/// A payload with the flag of a static or dynamic key.
fn payload(length: usize, dynamic: bool) -> Vec<u8> {
    vec![if dynamic { 0x80 } else { 0x7F }; length]
}

fn frame(length: usize) -> Vec<u8> {
    udp(LOCAL.parse().unwrap(), &payload(length, false))
}

/// Programs with a live tunnel at both local addresses, and a socket. The caller must keep the socket open.
fn ready(flags: u32) -> Option<(Programs, OwnedFd)> {
    ready_with(flags, LoadOptions::default())
}

fn ready_with(flags: u32, options: LoadOptions) -> Option<(Programs, OwnedFd)> {
    let mut programs = programs_with(options)?;
    let socket = xdp_socket();
    programs.set_tunnel(TUNNEL, Tunnel { flags, ..Tunnel::default() }).unwrap();
    programs.add_carrier_address(LOCAL.parse().unwrap(), TUNNEL).unwrap();
    programs.add_carrier_address(LOCAL_V6.parse().unwrap(), TUNNEL).unwrap();
    programs.set_carrier_device(DEVICE, CARRIER_QUEUES).unwrap();
    programs.set_carrier_socket(CARRIER_QUEUES, &socket).unwrap();
    Some((programs, socket))
}

impl Programs {
    fn carrier(&mut self, frame: &[u8]) -> u32 {
        self.run_xdp(names::CARRIER_XDP, frame)
    }
}

#[test]
fn our_datagrams_go_to_the_engine_with_up_to_two_tags_over_either_ip() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    for plain in [frame(16), udp(LOCAL_V6.parse().unwrap(), &payload(1440, false))] {
        assert_eq!(programs.carrier(&plain), XDP_REDIRECT);
        assert_eq!(programs.carrier(&tagged(&plain, VLAN)), XDP_REDIRECT);
        let twice = tagged(&tagged(&plain, VLAN), QINQ);
        assert_eq!(programs.carrier(&twice), XDP_REDIRECT);
        assert_eq!(programs.carrier(&tagged(&twice, QINQ)), XDP_PASS);
    }
    assert_eq!(programs.verdicts(TUNNEL).unwrap(), [0; Verdict::COUNT]);
}

#[test]
fn octets_behind_the_datagram_are_no_matter() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let mut padded = frame(16);
    padded.resize(padded.len() + 7, 0);
    assert_eq!(programs.carrier(&padded), XDP_REDIRECT);
}

#[test]
fn a_frame_of_several_buffers_counts_whole() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let large = frame(16_000);
    assert_eq!(programs.carrier(&large), XDP_REDIRECT);
    assert_eq!(programs.carrier(&large[..large.len() - 1]), XDP_DROP);
}

#[test]
fn what_no_socket_takes_in_one_piece_is_left_to_the_kernel() {
    let largest_frame = frame(1_000).len() as u32;
    let options = LoadOptions { largest_frame, ..LoadOptions::default() };
    let Some((mut programs, _socket)) = ready_with(Tunnel::ALIVE, options) else { return };
    assert_eq!(programs.carrier(&frame(1_000)), XDP_REDIRECT);
    assert_eq!(programs.carrier(&frame(1_008)), XDP_PASS);
    assert_eq!(programs.carrier(&frame(16_000)), XDP_PASS);
}

#[test]
fn a_datagram_to_another_address_or_port_passes() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    for other in ["192.0.2.2:4000", "192.0.2.1:4001", "[2001:db8::2]:4000", "[::ffff:192.0.2.3]:4000"] {
        assert_eq!(programs.carrier(&udp(other.parse().unwrap(), &payload(16, false))), XDP_PASS, "{other}");
    }
}

#[test]
fn an_unspecified_address_takes_its_port_at_any_address_of_this_host_unless_one_is_listed() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    programs.add_carrier_address("0.0.0.0:5000".parse().unwrap(), TUNNEL).unwrap();
    let any = ["203.0.113.9:5000", "[2001:db8::9]:5000"].map(|any| any.parse::<SocketAddr>().unwrap());
    for local in [&any[..], &any[1..], &[]] {
        programs.set_local_addresses(&local.iter().map(SocketAddr::ip).collect()).unwrap();
        for to in any {
            let action = if local.contains(&to) { XDP_REDIRECT } else { XDP_PASS };
            assert_eq!(programs.carrier(&udp(to, &payload(16, false))), action, "{to} of {local:?}");
        }
    }
    programs.set_local_addresses(&any.map(|any| any.ip()).into()).unwrap();
    // A listed address of a dead tunnel has priority over the wildcard.
    programs.add_carrier_address("203.0.113.9:5000".parse().unwrap(), TUNNEL + 1).unwrap();
    assert_eq!(programs.carrier(&udp("203.0.113.9:5000".parse().unwrap(), &payload(16, false))), XDP_PASS);
}

#[test]
fn a_link_local_address_is_that_of_one_device() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let ours = udp("[fe80::1]:4000".parse().unwrap(), &payload(16, false));
    assert_eq!(programs.carrier(&ours), XDP_PASS);
    programs.add_carrier_address("[fe80::1%77]:4000".parse().unwrap(), TUNNEL).unwrap();
    assert_eq!(programs.carrier(&ours), XDP_PASS, "another device's");
    programs.add_carrier_address(format!("[fe80::1%{DEVICE}]:4000").parse().unwrap(), TUNNEL).unwrap();
    assert_eq!(programs.carrier(&ours), XDP_REDIRECT);
    programs.remove_carrier_address(format!("[fe80::1%{DEVICE}]:4000").parse().unwrap()).unwrap();
    assert_eq!(programs.carrier(&ours), XDP_PASS);
    programs.add_carrier_address("[::]:4000".parse().unwrap(), TUNNEL).unwrap();
    programs.set_local_addresses(&["fe80::1".parse().unwrap()].into()).unwrap();
    assert_eq!(programs.carrier(&ours), XDP_REDIRECT);
    // The frame may be for a VLAN device, which has other addresses.
    assert_eq!(programs.carrier(&tagged(&ours, VLAN)), XDP_PASS);
    let mut from_link_local = udp(LOCAL_V6.parse().unwrap(), &payload(16, false));
    let source = ETHERNET + 8;
    from_link_local[source..source + 16].copy_from_slice(&"fe80::2".parse::<std::net::Ipv6Addr>().unwrap().octets());
    assert_eq!(programs.carrier(&from_link_local), XDP_REDIRECT);
    assert_eq!(programs.carrier(&tagged(&from_link_local, VLAN)), XDP_PASS);
    assert_eq!(programs.verdicts(TUNNEL).unwrap(), [0; Verdict::COUNT]);
}

#[test]
fn what_is_not_plain_udp_passes() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let change = |at: usize, value: u8| {
        let mut frame = frame(16);
        frame[at] = value;
        frame
    };
    let v6 = |at: usize, value: u8| {
        let mut frame = udp(LOCAL_V6.parse().unwrap(), &payload(16, false));
        frame[at] = value;
        frame
    };
    for (what, frame) in [
        ("ARP", change(13, 0x06)),
        ("IP options", change(ETHERNET, 0x46)),
        ("version 5", change(ETHERNET, 0x55)),
        ("more fragments", change(ETHERNET + 6, 0x20)),
        ("a later fragment", change(ETHERNET + 7, 0x01)),
        ("TCP", change(ETHERNET + 9, 6)),
        ("an IPv6 fragment header", v6(ETHERNET + 6, 44)),
        ("IPv6 hop-by-hop options", v6(ETHERNET + 6, 0)),
        ("version 4 in an IPv6 frame", v6(ETHERNET, 0x40)),
    ] {
        assert_eq!(programs.carrier(&frame), XDP_PASS, "{what}");
    }
}

#[test]
fn fragments_pass_and_are_not_counted_as_datagrams() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    // A whole datagram of this length would be dropped.
    let mut first = frame(20);
    first[ETHERNET + 6] = 0x20;
    let mut later = first.clone();
    later[ETHERNET + 7] = 0x03;
    for frame in [&first, &later, &tagged(&first, VLAN)] {
        assert_eq!(programs.carrier(frame), XDP_PASS);
    }
    let plain = udp(LOCAL_V6.parse().unwrap(), &payload(20, false));
    for offset in [[0, 1], [0, 9], [0, 0]] {
        let mut fragment = plain[..ETHERNET + 40].to_vec();
        fragment[ETHERNET + 6] = 44;
        fragment.extend([17, 0, offset[0], offset[1], 0, 0, 0, 7]);
        fragment.extend(&plain[ETHERNET + 40..]);
        assert_eq!(programs.carrier(&fragment), XDP_PASS);
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), 0);
}

#[test]
fn a_frame_cut_within_the_headers_passes_and_within_the_payload_is_a_bad_length() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let whole = frame(24);
    let headers = ETHERNET + IPV4 + UDP;
    for cut in ETHERNET..headers {
        assert_eq!(programs.carrier(&whole[..cut]), XDP_PASS, "{cut} octets");
    }
    for cut in headers..whole.len() {
        assert_eq!(programs.carrier(&whole[..cut]), XDP_DROP, "{cut} octets");
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), (whole.len() - headers) as u64);
}

#[test]
fn only_lengths_of_the_protocol_go_to_the_engine() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let mut dropped = 0;
    for length in 0..=80 {
        let fits = length >= 16 && length % 8 == 0;
        assert_eq!(programs.carrier(&frame(length)), if fits { XDP_REDIRECT } else { XDP_DROP }, "{length} octets");
        dropped += u64::from(!fits);
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), dropped);
    programs.reset_verdicts(TUNNEL).unwrap();
    assert_eq!(programs.verdicts(TUNNEL).unwrap(), [0; Verdict::COUNT]);
}

#[test]
fn a_length_field_that_lies_is_a_bad_length() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let udp_length = ETHERNET + IPV4 + 4;
    let ip_length = ETHERNET + 2;
    for (at, value) in
        [(udp_length, 7u16), (udp_length, 0), (udp_length, 8 + 32), (ip_length, 20 + 8 + 8), (ip_length, 19)]
    {
        let mut frame = frame(24);
        frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
        assert_eq!(programs.carrier(&frame), XDP_DROP, "{value} at {at}");
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), 5);
}

#[test]
fn without_a_cipher_any_length_and_first_octet_goes_to_the_engine() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE | Tunnel::NOKEY) else { return };
    for length in 0..=40 {
        let frame = udp(LOCAL.parse().unwrap(), &payload(length, true));
        assert_eq!(programs.carrier(&frame), XDP_REDIRECT, "{length} octets");
    }
    assert_eq!(programs.carrier(&frame(24)[..ETHERNET + IPV4 + UDP + 23]), XDP_DROP);
}

/// A sealed datagram of `length` octets.
fn sealed(length: usize) -> Vec<u8> {
    let mut payload = payload(length, true);
    let prefix = length.min(4);
    payload[..prefix].copy_from_slice(&Tunnel::SEALED_PREFIX[..prefix]);
    udp(LOCAL.parse().unwrap(), &payload)
}

#[test]
fn sealed_datagrams_of_any_length_from_25_on_go_to_the_engine_without_a_key() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE | Tunnel::SEALED) else { return };
    for length in 4..200 {
        let action = if length >= 25 { XDP_REDIRECT } else { XDP_DROP };
        assert_eq!(programs.carrier(&sealed(length)), action, "{length} octets");
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), 21);
    assert_eq!(programs.carrier(&sealed(1400)[..500]), XDP_DROP, "cut");
    // Other datagrams go as before.
    for length in 0..=80 {
        let fits = length >= 16 && length % 8 == 0;
        assert_eq!(programs.carrier(&frame(length)), if fits { XDP_REDIRECT } else { XDP_DROP }, "{length} octets");
    }
    assert_eq!(programs.counted(TUNNEL, Verdict::Unsealed), 0);
}

#[test]
fn to_a_tunnel_without_sealed_packets_they_are_packets_under_an_unknown_key() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    assert_eq!(programs.carrier(&sealed(33)), XDP_DROP);
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), 1);
    let passed = (0..100).filter(|_| programs.carrier(&sealed(32)) == XDP_REDIRECT).count() as u64;
    assert_eq!(programs.counted(TUNNEL, Verdict::NoReceiveKey), 100 - passed);
}

#[test]
fn where_only_sealed_datagrams_are_accepted_few_others_reach_the_engine() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE | Tunnel::SEALED | Tunnel::SEALED_ONLY) else { return };
    let mut keys = programs.take_keys().unwrap();
    keys.set(TUNNEL, Slot::Static, &[1; 16]);
    keys.set(TUNNEL, Slot::Receive, &[1; 16]);
    let clear = udp(LOCAL.parse().unwrap(), &[0; 60]);
    let others = [frame(16), frame(17), udp(LOCAL.parse().unwrap(), &payload(64, true)), clear];
    const ROUNDS: usize = 100;
    let mut passed = 0;
    for frame in others.iter().cycle().take(ROUNDS * others.len()) {
        passed += u64::from(programs.carrier(frame) == XDP_REDIRECT);
        let (action, _) = programs.run_tc_of(names::SHIELD_TC, frame, 0);
        passed += u64::from(action == TC_PIPE);
        assert_eq!(programs.carrier(&sealed(25)), XDP_REDIRECT);
        assert_eq!(programs.run_tc_of(names::SHIELD_TC, &sealed(25), 0).0, TC_PIPE);
    }
    assert!((1..200).contains(&passed), "the engine must see one, or the peer's mistake is not known: {passed}");
    assert_eq!(programs.counted(TUNNEL, Verdict::Unsealed), (2 * ROUNDS * others.len()) as u64 - passed);
}

#[test]
fn a_dead_tunnel_leaves_its_datagrams_to_the_kernel() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    programs.clear_tunnel(TUNNEL).unwrap();
    assert_eq!(programs.carrier(&frame(16)), XDP_PASS);
    assert_eq!(programs.carrier(&frame(15)), XDP_PASS);
}

#[test]
fn without_a_socket_or_device_datagrams_are_left_to_the_kernel() {
    let Some((mut programs, socket)) = ready(Tunnel::ALIVE) else { return };
    programs.remove_carrier_device(DEVICE).unwrap();
    assert_eq!(programs.carrier(&frame(16)), XDP_PASS);
    programs.set_carrier_device(DEVICE, 0).unwrap();
    assert_eq!(programs.carrier(&frame(16)), XDP_PASS);
    programs.set_carrier_socket(0, &socket).unwrap();
    assert_eq!(programs.carrier(&frame(16)), XDP_REDIRECT);
    programs.remove_carrier_address(LOCAL.parse().unwrap()).unwrap();
    assert_eq!(programs.carrier(&frame(16)), XDP_PASS);
}

#[test]
fn under_an_unknown_dynamic_key_few_reach_the_engine_and_the_rest_is_counted() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let dynamic = udp(LOCAL.parse().unwrap(), &payload(16, true));
    const SENT: u64 = 1_000;
    let passed = (0..SENT).filter(|_| programs.carrier(&dynamic) == XDP_REDIRECT).count() as u64;
    assert!(passed >= 1, "the engine must see one, or it never asks for a key");
    assert!(passed < SENT, "the rest must not reach it");
    assert_eq!(programs.counted(TUNNEL, Verdict::NoReceiveKey), SENT - passed);
    assert_eq!(programs.carrier(&frame(16)), XDP_REDIRECT, "the static key is always there");
}

#[test]
fn under_the_current_or_previous_receive_key_all_reach_the_engine() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let mut keys = programs.take_keys().unwrap();
    let dynamic = udp(LOCAL.parse().unwrap(), &payload(16, true));
    for slot in [Slot::Receive, Slot::Previous] {
        keys.set(TUNNEL, slot, &[1; 16]);
        for _ in 0..10 {
            assert_eq!(programs.carrier(&dynamic), XDP_REDIRECT, "{slot:?}");
        }
        keys.clear(TUNNEL, slot);
    }
    // Keys of another purpose, or of another tunnel, do not count.
    keys.set(TUNNEL, Slot::Static, &[1; 16]);
    keys.set(TUNNEL, Slot::Send, &[1; 16]);
    keys.set(TUNNEL + 1, Slot::Receive, &[1; 16]);
    assert!((0..100).any(|_| programs.carrier(&dynamic) == XDP_DROP));
}

#[test]
fn control_messages_in_clear_reach_the_engine_whatever_their_length() {
    let Some((mut programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let clear = |length: usize| udp(LOCAL.parse().unwrap(), &[&[0; 4][..], &vec![7; length - 4]].concat());
    for length in (9..100).step_by(6) {
        assert_eq!(programs.carrier(&clear(length)), XDP_REDIRECT, "{length}");
    }
    for length in 4..9 {
        assert_eq!(programs.carrier(&clear(length)), XDP_DROP, "{length}");
    }
    let dynamic = udp(LOCAL.parse().unwrap(), &[&[0x80, 0, 0, 0][..], &[7; 13]].concat());
    assert_eq!(programs.carrier(&dynamic), XDP_DROP, "a flag in front makes it a packet, of an impossible length");
    assert_eq!(programs.counted(TUNNEL, Verdict::BadLength), 6);
}

/// The rules once more, in a simple form: the expected action for a frame to a live tunnel at [`LOCAL`] and
/// [`LOCAL_V6`], with a receive key.
fn expected(frame: &[u8]) -> u32 {
    decide(frame).unwrap_or(XDP_PASS)
}

/// `None` if the headers end early or are not ours.
fn decide(frame: &[u8]) -> Option<u32> {
    let mut at = 12;
    let tags = [VLAN, QINQ];
    while at < 20 && tags.iter().any(|tag| frame.get(at..at + 2) == Some(tag)) {
        at += 4;
    }
    let ethertype = frame.get(at..at + 2)?;
    let packet = &frame[at + 2..];
    let (header, carried) = match ethertype {
        [0x08, 0x00] => {
            let ip = packet.get(..20)?;
            let fragment = u16::from_be_bytes([ip[6], ip[7]]);
            if ip[0] != 0x45 || fragment & 0x3FFF != 0 || ip[9] != 17 || ip[16..] != [192, 0, 2, 1] {
                return None;
            }
            (20, usize::from(u16::from_be_bytes([ip[2], ip[3]])).saturating_sub(20))
        }
        [0x86, 0xDD] => {
            let ip = packet.get(..40)?;
            let ours = "2001:db8::1".parse::<std::net::Ipv6Addr>().unwrap().octets();
            if ip[0] >> 4 != 6 || ip[6] != 17 || ip[24..] != ours {
                return None;
            }
            (40, usize::from(u16::from_be_bytes([ip[4], ip[5]])))
        }
        _ => return None,
    };
    let udp = packet.get(header..header + 8)?;
    if udp[2..4] != 4000u16.to_be_bytes() {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
    let payload = packet.get(header + 8..).unwrap_or_default();
    let clear = length > 16 && payload.starts_with(&[0; 4]);
    let whole = length >= 24 && length.is_multiple_of(8);
    let fits = (8..=carried.min(packet.len() - header)).contains(&length) && (whole || clear);
    Some(if fits { XDP_REDIRECT } else { XDP_DROP })
}

#[test]
fn damaged_frames_are_judged_as_the_rules_say() {
    let Some((programs, _socket)) = ready(Tunnel::ALIVE) else { return };
    let programs = std::cell::RefCell::new(programs);
    let mut keys = programs.borrow_mut().take_keys().unwrap();
    keys.set(TUNNEL, Slot::Receive, &[1; 16]);
    // Interesting octets are more frequent than others, and headers than payload.
    let octet = prop_oneof![
        any::<u8>(),
        prop::sample::select(vec![0, 1, 6, 8, 17, 0x08, 0x20, 0x40, 0x45, 0x60, 0x81, 0x88, 0xA8])
    ];
    let damage = prop::collection::vec((0usize..80, octet), 0..3);
    let config = ProptestConfig::with_cases(4_096);
    proptest!(config, |(v6 in any::<bool>(), tags in 0usize..4, length in 0usize..64, damage in damage, cut in 0usize..40)| {
        let local = if v6 { LOCAL_V6 } else { LOCAL };
        let mut frame = udp(local.parse().unwrap(), &payload(length, true));
        for tag in 0..tags {
            frame = tagged(&frame, [VLAN, QINQ][tag % 2]);
        }
        for (at, value) in damage {
            if let Some(octet) = frame.get_mut(at) {
                *octet = value;
            }
        }
        // Half of the frames are not truncated.
        frame.truncate((frame.len() - cut.saturating_sub(20)).max(ETHERNET));
        prop_assert_eq!(programs.borrow_mut().carrier(&frame), expected(&frame), "{:02X?}", frame);
    });
}
