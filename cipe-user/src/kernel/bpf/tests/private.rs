//! Properties of the two private programs.

use std::net::IpAddr;

use cipe_common::{
    Stamp,
    maps::{NO_TUNNEL, PrivateAddress, private_socket_index},
};
use proptest::prelude::*;

use super::{
    frames::{ETHERNET, IPV4, IPV6, TCP, tagged, tcp, tcp_sum, udp},
    *,
};

/// Source address of frames from `frames`.
const SOURCE: [u8; 6] = [0x02, 0, 0, 0, 0, 2];
/// The hub of the tunnel's device.
const HUB: u8 = 3;
const MSS: u32 = 1_360;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const V4: &str = "192.0.2.7";
const V6: &str = "2001:db8::7";

fn ready(mss: u32) -> Option<Programs> {
    let mut programs = programs()?;
    programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, mss, hub: HUB.into(), ..Tunnel::default() }).unwrap();
    programs.set_private_address(SOURCE, TUNNEL).unwrap();
    Some(programs)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// The frame after the TC program, with its stamp checked and replaced by the original address.
fn stamped(programs: &mut Programs, frame: &[u8], gso_size: u16) -> Vec<u8> {
    let (action, mut out) = programs.run_tc(frame, u32::from(gso_size));
    assert_eq!(action, TC_OK);
    assert_eq!(out[..6], Stamp { hub: HUB, gso_size, tunnel: TUNNEL as u16, ..Stamp::default() }.to_mac());
    out[..6].copy_from_slice(&frame[..6]);
    out
}

fn mss_option(mss: u16) -> [u8; 4] {
    let [high, low] = mss.to_be_bytes();
    [2, 4, high, low]
}

/// Offset of the TCP header in a frame of [`tcp`].
fn tcp_at(to: IpAddr) -> usize {
    ETHERNET + if to.is_ipv4() { IPV4 } else { IPV6 }
}

#[test]
fn private_frames_are_stamped_and_else_unchanged() {
    let Some(mut programs) = ready(0) else { return };
    for frame in [
        udp("192.0.2.7:53".parse().unwrap(), b"question"),
        udp("[2001:db8::7]:53".parse().unwrap(), b"question"),
        tcp(address(V4), ACK, &[]),
        tcp(address(V6), SYN, &mss_option(9_000)),
    ] {
        assert_eq!(stamped(&mut programs, &frame, 0), frame);
    }
}

#[test]
fn superframes_are_stamped_with_the_size_of_their_segments() {
    let Some(mut programs) = ready(0) else { return };
    for to in [V4, V6] {
        let frame = tcp(address(to), ACK, &[]);
        assert_eq!(stamped(&mut programs, &frame, 1_402), frame);
    }
}

#[test]
fn what_the_kernel_cuts_by_itself_is_stamped_as_a_single_frame() {
    let Some(mut programs) = ready(0) else { return };
    // Under BPF_PROG_TEST_RUN a superframe has a segment size but no GSO type, which a UDP superframe always has.
    let frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    let (action, out) = programs.run_tc(&frame, 1_402);
    assert_eq!(action, TC_OK);
    assert_eq!(out[..6], Stamp { hub: HUB, tunnel: TUNNEL as u16, ..Stamp::default() }.to_mac());
}

#[test]
fn a_tunnel_s_own_datagrams_do_not_come_into_it() {
    let Some(mut programs) = programs() else { return };
    programs.set_private_address(SOURCE, TUNNEL).unwrap();
    // IPv6 inserts a fragment header of 8 octets: next header, offset and flags, number.
    let fragmented = |mut frame: Vec<u8>, offset: u16| {
        let header = [&[17, 0][..], &offset.to_be_bytes(), &[0, 0, 0, 7]].concat();
        frame[ETHERNET + 6] = 44;
        frame.splice(ETHERNET + IPV6..ETHERNET + IPV6, header);
        frame
    };
    for (target, others) in [
        ("192.0.2.7:6789", ["192.0.2.7:6790", "192.0.2.8:6789"]),
        ("[2001:db8::7]:6789", ["[2001:db8::7]:6790", "[2001:db8:1::7]:6789"]),
    ] {
        let target: SocketAddr = target.parse().unwrap();
        let known = Tunnel { flags: Tunnel::ALIVE, target: carrier_address(target), ..Tunnel::default() };
        programs.set_tunnel(TUNNEL, known).unwrap();
        let own = udp(target, b"sealed");
        let before = programs.counted(TUNNEL, Verdict::RouteLoop);
        assert_eq!(programs.run_tc(&own, 0).0, TC_SHOT, "{target}");
        let mut first = own.clone();
        if target.is_ipv4() {
            first[ETHERNET + 6] = 0x20;
        } else {
            first = fragmented(own.clone(), 1);
            assert_eq!(programs.run_tc(&fragmented(own.clone(), 8), 0).0, TC_OK, "a later fragment");
        }
        assert_eq!(programs.run_tc(&first, 0).0, TC_SHOT, "{target}, the first fragment");
        assert_eq!(programs.counted(TUNNEL, Verdict::RouteLoop), before + 2);
        for other in others {
            assert_eq!(programs.run_tc(&udp(other.parse().unwrap(), b"sealed"), 0).0, TC_OK, "{other}");
        }
        assert_eq!(programs.run_tc(&tcp(target.ip(), ACK, &[]), 0).0, TC_OK);
        // The peer is not known yet.
        programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, ..Tunnel::default() }).unwrap();
        assert_eq!(programs.run_tc(&own, 0).0, TC_OK);
    }
}

#[test]
fn what_is_not_ip_is_dropped_and_counted() {
    let Some(mut programs) = ready(0) else { return };
    let mut frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    frame[13] = 0x06;
    assert_eq!(programs.run_tc(&frame, 0).0, TC_SHOT);
    assert_eq!(programs.counted(TUNNEL, Verdict::PrivateNotIp), 1);
    let tagged = tagged(&udp("192.0.2.7:53".parse().unwrap(), b"question"), [0x81, 0x00]);
    assert_eq!(programs.run_tc(&tagged, 0).0, TC_SHOT);
    assert_eq!(programs.counted(TUNNEL, Verdict::PrivateNotIp), 2);
}

#[test]
fn a_dead_tunnel_and_a_forged_source_fail_closed() {
    let Some(mut programs) = ready(0) else { return };
    let frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    programs.clear_tunnel(TUNNEL).unwrap();
    assert_eq!(programs.run_tc(&frame, 0).0, TC_SHOT);
    assert_eq!(programs.counted(TUNNEL, Verdict::TunnelDead), 1);
    programs.remove_private_address(SOURCE).unwrap();
    assert_eq!(programs.run_tc(&frame, 0).0, TC_SHOT);
    assert_eq!(programs.counted(TUNNEL, Verdict::TunnelDead), 1);
    assert_eq!(programs.counted(NO_TUNNEL, Verdict::TunnelDead), 1);
}

#[test]
fn an_address_that_says_its_number_is_found_without_the_hash_table_and_forged_ones_are_not() {
    let Some(mut programs) = programs() else { return };
    let mac = [0x1E, 1, 2, 3, 0, TUNNEL as u8];
    let tunnel = Tunnel { flags: Tunnel::ALIVE, device: PrivateAddress::new(mac), ..Tunnel::default() };
    programs.set_tunnel(TUNNEL, tunnel).unwrap();
    programs.set_tunnel(TUNNEL - 1, tunnel).unwrap();
    let mut frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    frame[6..12].copy_from_slice(&mac);
    assert_eq!(programs.run_tc(&frame, 0).0, TC_OK);
    for forged in [[0x1E, 1, 2, 4, 0, TUNNEL as u8], [0x1E, 1, 2, 3, 0, TUNNEL as u8 - 1], [0xFF; 6]] {
        frame[6..12].copy_from_slice(&forged);
        assert_eq!(programs.run_tc(&frame, 0).0, TC_SHOT);
    }
    assert_eq!(programs.counted(NO_TUNNEL, Verdict::TunnelDead), 3);
    assert_eq!(programs.counted(TUNNEL, Verdict::TunnelDead) + programs.counted(TUNNEL - 1, Verdict::TunnelDead), 0);
}

#[test]
fn a_larger_mss_is_lowered_for_ipv6_by_20_more() {
    let Some(mut programs) = ready(MSS) else { return };
    for (to, expected) in [(address(V4), MSS), (address(V6), MSS - 20)] {
        for flags in [SYN, SYN | ACK] {
            let out = stamped(&mut programs, &tcp(to, flags, &mss_option(8_960)), 0);
            let tcp_at = tcp_at(to);
            assert_eq!(out[tcp_at + TCP..], mss_option(expected as u16));
            assert_eq!(tcp_sum(&out[ETHERNET..], tcp_at - ETHERNET), 0xFFFF, "checksum");
        }
    }
}

#[test]
fn whatever_needs_no_clamp_is_left_alone() {
    let Some(mut programs) = ready(MSS) else { return };
    let large = mss_option(8_960);
    let mut fragment = tcp(address(V4), SYN, &large);
    fragment[ETHERNET + 7] = 1;
    let mut short = tcp(address(V4), SYN, &large);
    short.truncate(tcp_at(address(V4)) + TCP + 2);
    for (what, frame) in [
        ("an equal MSS", tcp(address(V4), SYN, &mss_option(MSS as u16))),
        ("a smaller MSS", tcp(address(V4), SYN, &mss_option(536))),
        ("no SYN", tcp(address(V4), ACK, &large)),
        ("no options", tcp(address(V4), SYN, &[])),
        ("an end before it", tcp(address(V4), SYN, &[0, 2, 4, 0x23, 0x28])),
        ("an option of length 0", tcp(address(V4), SYN, &[3, 0, 2, 4, 0x23, 0x28])),
        ("an option of length 1", tcp(address(V4), SYN, &[3, 1, 2, 4, 0x23, 0x28])),
        ("an option that runs over the end", tcp(address(V4), SYN, &[3, 255, 2, 4, 0x23, 0x28])),
        ("an MSS of a wrong length", tcp(address(V4), SYN, &[2, 6, 0x23, 0x28, 0, 0])),
        ("a fragment", fragment),
        ("a frame shorter than its options", short),
        ("UDP", udp("192.0.2.7:53".parse().unwrap(), &[2, 4, 0x23, 0x28])),
    ] {
        assert_eq!(stamped(&mut programs, &frame, 0), frame, "{what}");
    }
}

#[test]
fn the_clamp_finds_the_option_wherever_it_stands_and_keeps_the_checksum_right() {
    let Some(programs) = ready(MSS) else { return };
    let programs = std::cell::RefCell::new(programs);
    // Options before and behind: NOPs, window scale, SACK permitted, timestamps; 36 octets beside the MSS at most.
    let option = prop_oneof![
        4 => Just(vec![1]),
        2 => Just(vec![3, 3, 7]),
        2 => Just(vec![4, 2]),
        1 => Just(vec![8, 10, 1, 2, 3, 4, 0, 0, 0, 0]),
    ];
    let options = (prop::collection::vec(option.clone(), 0..9), prop::collection::vec(option, 0..9))
        .prop_map(|(before, after)| (before.concat(), after.concat()))
        .prop_filter("too long", |(before, after)| before.len() + after.len() <= 36);
    proptest!(ProptestConfig::with_cases(512), |((before, after) in options, mss in any::<u16>(), v6 in any::<bool>())| {
        let to = address(if v6 { V6 } else { V4 });
        let limit = if v6 { MSS - 20 } else { MSS } as u16;
        let with = |mss: u16| tcp(to, SYN, &[&before[..], &mss_option(mss), &after[..]].concat());
        // `tcp` computes the checksum again, so equality covers it; 0 and 0xFFFF are the same checksum.
        let out = stamped(&mut programs.borrow_mut(), &with(mss), 0);
        let mut expected = with(mss.min(limit));
        let sum = tcp_at(to) + 16;
        prop_assert_eq!(tcp_sum(&out[ETHERNET..], tcp_at(to) - ETHERNET), 0xFFFF);
        expected[sum..sum + 2].copy_from_slice(&out[sum..sum + 2]);
        prop_assert_eq!(out, expected);
    });
}

#[test]
fn stamped_frames_go_to_the_socket_of_their_hub() {
    let Some(mut programs) = ready(0) else { return };
    let socket = xdp_socket();
    programs.set_private_socket(private_socket_index(HUB.into(), 0), &socket).unwrap();
    let mut frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    frame[..6]
        .copy_from_slice(&Stamp { hub: HUB, gso_size: 1_402, tunnel: TUNNEL as u16, ..Stamp::default() }.to_mac());
    assert_eq!(programs.run_xdp(names::PRIVATE_XDP, &frame), XDP_REDIRECT);
    drop(socket);
    assert_eq!(programs.run_xdp(names::PRIVATE_XDP, &frame), XDP_DROP, "a closed socket has left the map");
    assert_eq!(programs.counted(TUNNEL, Verdict::NoEngine), 1);
}

#[test]
fn unstamped_frames_are_dropped_and_counted_for_the_tunnel_of_their_source() {
    let Some(mut programs) = ready(0) else { return };
    let frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    assert_eq!(programs.run_xdp(names::PRIVATE_XDP, &frame), XDP_DROP);
    assert_eq!(programs.counted(TUNNEL, Verdict::PrivateUnstamped), 1);
    programs.remove_private_address(SOURCE).unwrap();
    assert_eq!(programs.run_xdp(names::PRIVATE_XDP, &frame), XDP_DROP);
    assert_eq!(programs.counted(NO_TUNNEL, Verdict::PrivateUnstamped), 1);
}

#[test]
fn a_stamp_beyond_the_tables_is_dropped_and_counted_for_no_tunnel() {
    let Some(mut programs) = ready(0) else { return };
    let mut frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    frame[..6].copy_from_slice(&Stamp { hub: HUB, tunnel: u16::MAX, ..Stamp::default() }.to_mac());
    assert_eq!(programs.run_xdp(names::PRIVATE_XDP, &frame), XDP_DROP);
    assert_eq!(programs.counted(NO_TUNNEL, Verdict::NoEngine), 1);
}
