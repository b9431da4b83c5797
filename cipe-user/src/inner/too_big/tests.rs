//! Examples and properties of ICMP messages.

use proptest::prelude::*;

use super::*;
use crate::inner::test_packets::{Flow, naive_sum};

fn too_big(packet: &[u8], mtu: usize) -> Option<TooBigMessage> {
    TooBigMessage::too_big(packet, &Headers::parse(packet).ok()?, mtu)
}

fn with_source(source: &str) -> Vec<u8> {
    let base = if source.contains(':') { Flow::udp6() } else { Flow::udp4() };
    Flow { source: source.parse().unwrap(), ..base }.packet(&[7; 1400])
}

fn with_destination(destination: &str) -> Vec<u8> {
    let base = if destination.contains(':') { Flow::udp6() } else { Flow::udp4() };
    Flow { destination: destination.parse().unwrap(), ..base }.packet(&[7; 1400])
}

/// An ICMP or ICMPv6 packet of one type.
fn icmp(base: Flow, kind: u8) -> Vec<u8> {
    let protocol = if base.v6() { ICMPV6 } else { ICMP };
    Flow { protocol, ..base }.carrying(&[&[kind, 0, 0, 0], &[0x5A; 1400][..]].concat())
}

/// An IPv6 packet with these octets behind its header.
fn v6(next: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = Flow { protocol: next, ..Flow::udp6() }.carrying(content);
    packet[6] = next;
    packet
}

#[test]
fn fragmentation_needed_is_laid_out_as_in_rfc_1191() {
    let packet = Flow::tcp4().packet(&[7; 1400]);
    let message = too_big(&packet, 1352).unwrap();
    assert_eq!(message.to, Flow::tcp4().source);
    assert_eq!(message.octets.len() + 20, 576);
    assert_eq!((message.octets[..2].to_vec(), message.octets[4..8].to_vec()), (vec![3, 4], vec![0, 0, 0x05, 0x48]));
    assert_eq!(message.octets[8..], packet[..548]);
    assert_eq!(naive_sum(&message.octets), 0xFFFF);
}

#[test]
fn packet_too_big_is_laid_out_as_in_rfc_4443() {
    let packet = Flow::tcp6().packet(&[7; 1400]);
    let message = too_big(&packet, 1352).unwrap();
    assert_eq!(message.to, Flow::tcp6().source);
    assert_eq!(message.octets.len() + 40, 1280);
    assert_eq!(message.octets[..8], [2, 0, 0, 0, 0, 0, 0x05, 0x48]);
    assert_eq!(message.octets[8..], packet[..1232]);
}

#[test]
fn a_short_packet_is_quoted_whole_and_nothing_behind_it() {
    let mut packet = Flow::udp4().packet(&[7; 100]);
    let whole = packet.len();
    packet.extend([0xEE; 20]);
    let message = too_big(&packet, 68).unwrap();
    assert_eq!(message.octets[8..], packet[..whole]);
}

#[test]
fn icmp_errors_are_not_answered_and_queries_are() {
    let answered = |base: fn() -> Flow| -> Vec<u8> {
        (0..=255).filter(|kind| too_big(&icmp(base(), *kind), 1300).is_some()).collect()
    };
    assert_eq!(answered(Flow::udp4), [0, 8, 9, 10, 13, 14, 15, 16, 17, 18]);
    let informational: Vec<u8> = (128..=255).filter(|kind| *kind != 137).collect();
    assert_eq!(answered(Flow::udp6), informational);
}

#[test]
fn only_the_first_fragment_is_answered() {
    let fragment = |field: u16| {
        let mut packet = Flow::udp4().packet(&[7; 1400]);
        packet[6..8].copy_from_slice(&field.to_be_bytes());
        too_big(&packet, 1300).is_some()
    };
    assert!(fragment(0x2000));
    assert!(!fragment(0x2001));
    assert!(!fragment(0x00B9));
    let fragment6 = |field: [u8; 2]| {
        let content = [&[17, 0, field[0], field[1], 0, 0, 0, 1][..], &[7; 1400]].concat();
        too_big(&v6(FRAGMENT, &content), 1300).is_some()
    };
    assert!(fragment6([0, 1]));
    assert!(!fragment6([0, 8]));
}

#[test]
fn several_hosts_and_none_are_not_answered() {
    for source in
        ["0.0.0.0", "0.1.2.3", "127.0.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "ff02::1"]
    {
        assert_eq!(too_big(&with_source(source), 1300), None, "from {source}");
    }
    for destination in ["224.0.0.5", "239.1.2.3", "255.255.255.255", "0.0.0.0"] {
        assert_eq!(too_big(&with_destination(destination), 1300), None, "to {destination}");
    }
    assert!(too_big(&with_destination("ff0e::101"), 1300).is_some(), "RFC 4443, section 2.4 e.3");
}

#[test]
fn icmpv6_is_found_behind_every_extension_header() {
    for (next, len) in [(HOP_BY_HOP, 8), (ROUTING, 24), (DESTINATION_OPTIONS, 16), (AUTHENTICATION, 24), (FRAGMENT, 8)]
    {
        for (kind, answered) in [(1, false), (128, true)] {
            let mut extension = vec![0; len];
            extension[0] = ICMPV6;
            extension[1] = if next == AUTHENTICATION { len / 4 - 2 } else { len / 8 - 1 } as u8;
            let packet = v6(next, &[&extension[..], &[kind, 0, 0, 0], &[7; 1400]].concat());
            assert_eq!(too_big(&packet, 1300).is_some(), answered, "{kind} behind {next}");
            assert_eq!(too_big(&packet[..40 + len - 1], 1300), None, "cut off in {next}");
        }
    }
}

proptest! {
    #[test]
    fn any_octets_are_taken(
        mut octets in prop::collection::vec(prop_oneof![0u8..4, 40u8..64, any::<u8>()], 0..200),
        first in prop_oneof![0x40u8..0x50, Just(0x60), any::<u8>()],
        mtu in any::<usize>(),
    ) {
        if let Some(octet) = octets.first_mut() {
            *octet = first;
        }
        if let Some(message) = too_big(&octets, mtu) {
            prop_assert!(octets.starts_with(&message.octets[8..]));
        }
    }
}
