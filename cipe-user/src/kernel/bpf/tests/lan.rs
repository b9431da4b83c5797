//! Properties of the program of LAN cards with a short cut.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use cipe_common::Stamp;
use cipe_common::maps::{Lan, LanRoute, NO_TUNNEL};
use proptest::prelude::*;

use super::frames::{ETHERNET, IPV4, IPV6, pseudo_sum, tagged, tcp, udp};
use super::*;
use crate::kernel::forwarding::Prefix;

/// The card's address: the destination of frames from `frames`.
const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
const MTU: u32 = 1_400;
const ACK: u8 = 0x10;
const SYN: u8 = 0x02;
const V4: &str = "192.0.2.7";
const V6: &str = "2001:db8::7";
const SOCKETS: u32 = 5;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn to(address: &str) -> SocketAddr {
    SocketAddr::new(ip(address), 53)
}

/// A live tunnel behind both destinations, the sources of `frames` behind the card, and a socket that receives
/// redirected frames.
fn ready(flags: u32) -> Option<(Programs, OwnedFd)> {
    let mut programs = programs()?;
    programs.set_tunnel(TUNNEL, Tunnel { flags: 1, mtu: MTU, ..Default::default() }).unwrap();
    programs.set_lan_device(DEVICE, Lan { sockets: SOCKETS, flags, mac: MAC, ..Lan::default() }).unwrap();
    for (prefix, bits, tunnel) in
        [("192.0.2.0", 24, TUNNEL), ("198.51.100.0", 24, NO_TUNNEL), (V6, 128, TUNNEL), ("2001:db8::", 64, NO_TUNNEL)]
    {
        programs.set_lan_route(Prefix::new(ip(prefix), bits), LanRoute { lan: DEVICE, tunnel }).unwrap();
    }
    let socket = xdp_socket();
    programs.set_lan_socket(SOCKETS, &socket).unwrap();
    Some((programs, socket))
}

fn run(programs: &mut Programs, frame: &[u8]) -> (u32, Vec<u8>) {
    programs.run_xdp_on(names::LAN_XDP, frame, DEVICE, 0)
}

fn passes(programs: &mut Programs, frame: &[u8]) -> bool {
    let (action, out) = run(programs, frame);
    assert!(out == frame || action == XDP_REDIRECT, "changed and passed on");
    action == XDP_PASS
}

fn header_sum(packet: &[u8]) -> u16 {
    let sum: u32 = packet[..IPV4].chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let sum = (sum & 0xFFFF) + (sum >> 16);
    ((sum & 0xFFFF) + (sum >> 16)) as u16
}

/// The IPv4 header with a correct checksum.
fn summed(mut frame: Vec<u8>) -> Vec<u8> {
    frame[ETHERNET + 10..ETHERNET + 12].fill(0);
    let sum = !header_sum(&frame[ETHERNET..]);
    frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn a_plain_packet_is_stamped_for_its_tunnel_and_loses_a_hop() {
    let Some((mut programs, _socket)) = ready(0) else { return };
    let mut short = udp(to(V4), b"");
    short.resize(60, 0);
    for frame in
        [udp(to(V4), b"question"), udp(to(V6), b"question"), tcp(ip(V4), ACK, &[]), tcp(ip(V6), ACK, &[]), short]
    {
        let (action, out) = run(&mut programs, &frame);
        assert_eq!(action, XDP_REDIRECT, "{frame:02x?}");
        let mut expected = frame.clone();
        expected[..6].copy_from_slice(&Stamp { tunnel: TUNNEL as u16, ..Stamp::default() }.to_mac());
        if frame[ETHERNET] == 0x45 {
            expected[ETHERNET + 8] -= 1;
            expected = summed(expected);
        } else {
            expected[ETHERNET + 7] -= 1;
        }
        assert_eq!(out, expected);
    }
}

#[test]
fn whatever_is_not_plain_passes_untouched() {
    let Some((mut programs, _socket)) = ready(0) else { return };
    let (v4, v6) = (udp(to(V4), b"question"), udp(to(V6), b"question"));
    let changed = |frame: &[u8], octets: &[(usize, u8)]| {
        let mut frame = frame.to_vec();
        octets.iter().for_each(|(at, value)| frame[ETHERNET + at] = *value);
        if frame[ETHERNET] >> 4 == 4 { summed(frame) } else { frame }
    };
    let to_another_host = |mut frame: Vec<u8>| {
        frame[5] ^= 1;
        frame
    };
    let mut damaged = v4.clone();
    damaged[ETHERNET + 10] ^= 1;
    let mut long_padding = v4.clone();
    long_padding.resize(100, 0);
    for (what, frame) in [
        ("for another host", to_another_host(v4.clone())),
        ("for everybody", [&[0xFF; 6], &v4[6..]].concat()),
        ("in a VLAN", tagged(&v4, [0x81, 0x00])),
        ("ARP", [&v4[..12], &[0x08, 0x06], &v4[14..]].concat()),
        ("options", changed(&v4, &[(0, 0x46)])),
        ("a first fragment", changed(&v4, &[(6, 0x20)])),
        ("a later fragment", changed(&v4, &[(7, 1)])),
        ("the last hop", changed(&v4, &[(8, 1)])),
        ("no hop", changed(&v4, &[(8, 0)])),
        ("the last hop, IPv6", changed(&v6, &[(7, 1)])),
        ("hop-by-hop options", changed(&v6, &[(6, 0)])),
        ("a fragment header", changed(&v6, &[(6, 44)])),
        ("another protocol", changed(&v4, &[(9, 47)])),
        ("a damaged header", damaged),
        ("a length beyond the frame", changed(&v4, &[(3, 200)])),
        ("a length below the header", changed(&v4, &[(3, 19)])),
        ("much behind it", long_padding),
        ("the end of the frame before it", v4[..ETHERNET + 10].to_vec()),
        ("the opening of a connection", tcp(ip(V4), SYN, &[2, 4, 5, 0xB4])),
        ("the answer to it", tcp(ip(V6), SYN | ACK, &[2, 4, 5, 0xB4])),
        ("no route", udp(to("203.0.113.1"), b"question")),
        ("back out of the card", udp(to("198.51.100.9"), b"question")),
        ("too large", udp(to(V4), &[0; MTU as usize - 27])),
        ("a source from elsewhere", changed(&v4, &[(12, 203)])),
        ("a source from the tunnel", changed(&v4, &[(12, 192), (13, 0), (14, 2), (15, 1)])),
    ] {
        assert!(passes(&mut programs, &frame), "{what}");
    }
    assert!(!passes(&mut programs, &udp(to(V4), &[0; MTU as usize - 28])), "exactly the MTU");
}

#[test]
fn a_longer_prefix_that_leads_elsewhere_wins() {
    let Some((mut programs, _socket)) = ready(0) else { return };
    let host = Prefix::new(ip(V4), 32);
    programs.set_lan_route(host, LanRoute { lan: 0, tunnel: NO_TUNNEL }).unwrap();
    assert!(passes(&mut programs, &udp(to(V4), b"question")));
    assert!(!passes(&mut programs, &udp(to("192.0.2.8"), b"question")));
    programs.remove_lan_route(host).unwrap();
    programs.remove_lan_route(host).unwrap();
    assert!(!passes(&mut programs, &udp(to(V4), b"question")));
}

#[test]
fn without_tunnel_socket_or_card_everything_passes() {
    let Some((mut programs, socket)) = ready(0) else { return };
    let frame = udp(to(V4), b"question");
    let route = |lan| LanRoute { lan, tunnel: TUNNEL };
    let prefix = Prefix::new(ip("192.0.2.0"), 24);
    programs.set_lan_route(prefix, route(DEVICE + 1)).unwrap();
    assert!(passes(&mut programs, &frame), "the tunnel has its short cut with another card");
    programs.set_lan_route(prefix, route(DEVICE)).unwrap();
    assert!(!passes(&mut programs, &frame));

    drop(socket);
    assert!(passes(&mut programs, &frame), "a closed socket has left the map");
    let socket = xdp_socket();
    programs.set_lan_socket(SOCKETS, &socket).unwrap();
    assert!(!passes(&mut programs, &frame));

    programs.clear_tunnel(TUNNEL).unwrap();
    assert!(passes(&mut programs, &frame), "the tunnel's device fails closed, not this program");
    programs.set_tunnel(TUNNEL, Tunnel { flags: 1, mtu: MTU, ..Default::default() }).unwrap();
    programs.remove_lan_device(DEVICE).unwrap();
    assert!(passes(&mut programs, &frame));
}

/// A TCP segment with a partial checksum, as this host's stack sends it to the device, or as one segment of a
/// superframe.
fn unfinished(to: &str) -> Vec<u8> {
    let mut frame = tcp(ip(to), ACK, &[]);
    let at = if ip(to).is_ipv4() { IPV4 } else { IPV6 };
    let sum = pseudo_sum(&frame[ETHERNET..], at);
    frame[ETHERNET + at + 16..ETHERNET + at + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

#[test]
fn in_the_stack_what_may_be_unfinished_or_several_passes_and_so_does_its_stream() {
    for address in [V4, V6] {
        let Some((mut programs, _socket)) = ready(Lan::GENERIC) else { return };
        let finished = tcp(ip(address), ACK, &[]);
        assert!(passes(&mut programs, &udp(to(address), b"no checksum")));
        assert!(!passes(&mut programs, &finished));
        assert!(passes(&mut programs, &unfinished(address)));
        assert!(passes(&mut programs, &finished), "the stream keeps its order");
        programs.set_lan_device(DEVICE, Lan { sockets: SOCKETS, mac: MAC, ..Lan::default() }).unwrap();
        assert!(!passes(&mut programs, &unfinished(address)), "a driver delivers what was on the wire");
    }
}

/// A finished TCP segment of so many octets of payload, whose right checksum is the number that an unfinished one would have.
fn finished_and_looks_unfinished(to: &str, octets: usize) -> Vec<u8> {
    let mut frame = tcp(ip(to), ACK, &[]);
    frame.extend(std::iter::repeat_n(0x5A, octets));
    let at = if ip(to).is_ipv4() { IPV4 } else { IPV6 };
    let total = (frame.len() - ETHERNET) as u16;
    match at {
        IPV4 => {
            frame[ETHERNET + 2..ETHERNET + 4].copy_from_slice(&total.to_be_bytes());
            frame = summed(frame);
        }
        _ => frame[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&(total - at as u16).to_be_bytes()),
    }
    let transport = ETHERNET + at;
    let pseudo = pseudo_sum(&frame[ETHERNET..], at);
    frame[transport + 16..transport + 18].copy_from_slice(&pseudo.to_be_bytes());
    // The window makes the sum of all that is summed, the field and the pseudo header right.
    frame[transport + 14..transport + 16].fill(0);
    let padded = frame[transport..].chunks(2).map(|two| u16::from_be_bytes([two[0], *two.get(1).unwrap_or(&0)]));
    let sum = padded.fold(u64::from(pseudo), |sum, word| sum + u64::from(word));
    frame[transport + 14..transport + 16].copy_from_slice(&(0xFFFF - (sum % 0xFFFF) as u16).to_be_bytes());
    frame
}

#[test]
fn a_finished_checksum_that_looks_unfinished_is_recognized() {
    for address in [V4, V6] {
        let Some((mut programs, _socket)) = ready(Lan::GENERIC) else { return };
        for octets in (0..200).chain([1000, 1001, 1002, 1003, 1330]) {
            let right = finished_and_looks_unfinished(address, octets);
            assert!(!passes(&mut programs, &right), "{octets}");
        }
        assert!(!passes(&mut programs, &tcp(ip(address), ACK, &[])), "and its stream does not pass by the kernel");
        for octets in [0, 1, 63, 64, 1330] {
            let mut damaged = finished_and_looks_unfinished(address, octets);
            let last = damaged.len() - 1;
            damaged[last] ^= 1;
            assert!(passes(&mut programs, &damaged), "{octets}");
        }
    }
}

#[test]
fn the_checksum_of_the_header_stays_right_whatever_it_is() {
    let Some(ready) = ready(0) else { return };
    let (programs, _socket) = ready;
    let programs = std::cell::RefCell::new(programs);
    proptest!(ProptestConfig::with_cases(256), |(ttl in 2u8.., id in any::<u16>(), tos in any::<u8>())| {
        let mut frame = udp(to(V4), b"question");
        frame[ETHERNET + 1] = tos;
        frame[ETHERNET + 4..ETHERNET + 6].copy_from_slice(&id.to_be_bytes());
        frame[ETHERNET + 8] = ttl;
        let (action, out) = run(&mut programs.borrow_mut(), &summed(frame));
        prop_assert_eq!(action, XDP_REDIRECT);
        prop_assert_eq!(header_sum(&out[ETHERNET..]), 0xFFFF);
        prop_assert_eq!(out[ETHERNET + 8], ttl - 1);
    });
}
