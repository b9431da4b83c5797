//! Properties of the two programs of Ethernet tunnels.

use cipe_common::maps::{EthernetDevice, NO_TUNNEL, private_socket_index};
use proptest::prelude::*;

use super::{
    frames::{tagged, udp},
    *,
};

/// The slot of the tunnel's pair.
const HUB: u32 = 5;

/// Frames under test come from [`DEVICE`], which stands for either end.
fn ready() -> Option<Programs> {
    let mut programs = programs()?;
    programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, hub: HUB, ..Tunnel::default() }).unwrap();
    programs.set_ethernet_device([DEVICE, DEVICE + 1], EthernetDevice { tunnel: TUNNEL, hub: HUB }).unwrap();
    Some(programs)
}

#[test]
fn frames_of_every_kind_leave_unchanged() {
    let Some(mut programs) = ready() else { return };
    let socket = xdp_socket();
    programs.set_private_socket(private_socket_index(HUB, 0), &socket).unwrap();
    let plain = udp("192.0.2.7:53".parse().unwrap(), b"question");
    let mut foreign = plain.clone();
    foreign[12..14].copy_from_slice(&[0x88, 0xB5]);
    let mut like_a_stamp = plain.clone();
    like_a_stamp[..6]
        .copy_from_slice(&cipe_common::Stamp { hub: 0, gso_size: 0, encapsulated: false, tunnel: 0 }.to_mac());
    for frame in [tagged(&plain, [0x81, 0x00]), tagged(&plain, [0x88, 0xA8]), plain, foreign, like_a_stamp] {
        assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0), (TC_OK, frame.clone()));
        assert_eq!(programs.run_xdp(names::ETHERNET_XDP, &frame), XDP_REDIRECT);
    }
    for verdict in Verdict::KERNEL {
        assert_eq!((programs.counted(TUNNEL, *verdict), programs.counted(NO_TUNNEL, *verdict)), (0, 0));
    }
}

#[test]
fn frames_of_a_dead_tunnel_or_of_none_are_dropped_and_counted() {
    let Some(mut programs) = ready() else { return };
    let frame = udp("192.0.2.7:53".parse().unwrap(), b"question");
    assert_eq!(programs.run_xdp(names::ETHERNET_XDP, &frame), XDP_DROP, "no socket");
    assert_eq!(programs.counted(TUNNEL, Verdict::NoEngine), 1);
    programs.clear_tunnel(TUNNEL).unwrap();
    assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0).0, TC_SHOT);
    assert_eq!(programs.run_xdp(names::ETHERNET_XDP, &frame), XDP_DROP);
    assert_eq!(programs.counted(TUNNEL, Verdict::TunnelDead), 2);
    programs.remove_ethernet_device([DEVICE, DEVICE + 1]).unwrap();
    assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0).0, TC_SHOT);
    assert_eq!(programs.run_xdp(names::ETHERNET_XDP, &frame), XDP_DROP);
    assert_eq!(programs.counted(NO_TUNNEL, Verdict::TunnelDead), 2);
}

#[test]
fn a_tunnel_s_own_datagrams_do_not_come_into_it_whatever_their_tags() {
    let Some(mut programs) = ready() else { return };
    for (target, others) in [
        ("192.0.2.7:6789", ["192.0.2.7:6790", "192.0.2.8:6789"]),
        ("[2001:db8::7]:6789", ["[2001:db8::7]:6790", "[2001:db8:1::7]:6789"]),
    ] {
        let target: SocketAddr = target.parse().unwrap();
        let known = Tunnel { flags: Tunnel::ALIVE, target: carrier_address(target), ..Tunnel::default() };
        programs.set_tunnel(TUNNEL, known).unwrap();
        let with_tags = |frame: &[u8]| {
            let one = tagged(frame, [0x81, 0x00]);
            [frame.to_vec(), tagged(&one, [0x88, 0xA8]), one]
        };
        let before = programs.counted(TUNNEL, Verdict::RouteLoop);
        for frame in with_tags(&udp(target, b"sealed")) {
            assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0).0, TC_SHOT, "{target}");
        }
        assert_eq!(programs.counted(TUNNEL, Verdict::RouteLoop), before + 3);
        for frame in others.iter().flat_map(|other| with_tags(&udp(other.parse().unwrap(), b"sealed"))) {
            assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0), (TC_OK, frame.clone()));
        }
    }
}

#[test]
fn any_frame_is_passed_or_dropped_and_counted() {
    let Some(programs) = ready() else { return };
    let programs = std::cell::RefCell::new(programs);
    // BPF_PROG_TEST_RUN refuses frames that are too short for the IP header that their EtherType announces.
    let is_run = |frame: &Vec<u8>| match frame[12..14] {
        [0x08, 0x00] => frame.len() >= 14 + 20,
        [0x86, 0xDD] => frame.len() >= 14 + 40,
        _ => true,
    };
    proptest!(|(frame in prop::collection::vec(any::<u8>(), 14..100).prop_filter("too short", is_run))| {
        let mut programs = programs.borrow_mut();
        let before = programs.counted(TUNNEL, Verdict::NoEngine);
        prop_assert_eq!(programs.run_tc_of(names::ETHERNET_TC, &frame, 0).0, TC_OK);
        prop_assert_eq!(programs.run_xdp(names::ETHERNET_XDP, &frame), XDP_DROP);
        prop_assert_eq!(programs.counted(TUNNEL, Verdict::NoEngine), before + 1);
    });
}
