//! Which packets a router forwards without a check, and what it changes in them.

use std::net::IpAddr;

use crate::inner::headers::{Headers, IpVersion, Part, TCP, UDP};
use crate::inner::ip::{IPV4, IPV6};

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Offset of the flags in a TCP header.
const TCP_FLAGS: usize = 13;
const SYN: u8 = 0x02;

/// Source and destination of a packet that may go past the kernel: whole, without options or extension headers, with
/// another hop to live, and no opening of a connection. `packet` was found to be exactly one IP packet.
pub fn plain(packet: &[u8], headers: &Headers) -> Option<(IpAddr, IpAddr)> {
    let shortest = if headers.version == IpVersion::V4 { IPV4 } else { IPV6 };
    if headers.transport() != shortest || headers.part != Part::Whole || headers.ttl <= 1 {
        return None;
    }
    match headers.protocol {
        TCP if packet.get(shortest + TCP_FLAGS).is_some_and(|flags| flags & SYN == 0) => headers.addresses(packet),
        UDP | ICMP | ICMPV6 => headers.addresses(packet),
        _ => None,
    }
}

/// Decrements the TTL of a [`plain`] packet.
pub fn count_hop(header: &mut [u8]) {
    match header {
        [first, ..] if *first >> 4 == 6 => {
            if let Some(limit) = header.get_mut(7) {
                *limit = limit.wrapping_sub(1);
            }
        }
        [_, _, _, _, _, _, _, _, ttl, _, high, low, ..] => {
            *ttl = ttl.wrapping_sub(1);
            // RFC 1141: the TTL is the high octet of its word.
            let sum = u32::from(u16::from_be_bytes([*high, *low])) + 0x0100;
            [*high, *low] = ((sum + (sum >> 16)) as u16).to_be_bytes();
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::ip;
    use crate::inner::test_packets::Flow;

    fn plain(packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
        super::plain(packet, &Headers::parse(packet).ok()?)
    }

    #[test]
    fn plain_packets_are_seen_and_others_are_not() {
        for flow in [Flow::tcp4(), Flow::udp4(), Flow::tcp6(), Flow::udp6()] {
            let packet = flow.packet(b"payload");
            assert!(plain(&packet).is_some(), "{packet:02x?}");
            let is_v6 = packet[0] >> 4 == 6;
            let hop = if is_v6 { 7 } else { 8 };
            for left in [0, 1] {
                let mut last = packet.clone();
                last[hop] = left;
                assert_eq!(plain(&last), None);
            }
            let mut other = packet.clone();
            other[if is_v6 { 6 } else { 9 }] = 47;
            assert_eq!(plain(&other), None);
        }
        let tcp = Flow::tcp4().packet(b"payload");
        for (at, value) in [(6, 0x20), (7, 1), (0, 0x46), (33, 0x12)] {
            let mut other = tcp.clone();
            other[at] = value;
            assert_eq!(plain(&other), None, "octet {at}");
        }
        assert_eq!(plain(&[]), None);
    }

    proptest! {
        #[test]
        fn a_hop_less_leaves_a_right_checksum(ttl in 2u8.., id in any::<u16>(), tos in any::<u8>()) {
            let mut packet = Flow::tcp4().packet(b"payload");
            packet[1] = tos;
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[8] = ttl;
            packet[10..12].fill(0);
            let mut sum = crate::inner::checksum::Sum::default();
            sum.add(&packet[..20]);
            packet[10..12].copy_from_slice(&sum.checksum());
            count_hop(&mut packet);
            prop_assert_eq!(packet[8], ttl - 1);
            prop_assert!(ip::check(&packet).is_ok());
        }

        #[test]
        fn any_octets_are_plain_or_not(octets in prop::collection::vec(any::<u8>(), 0..80)) {
            plain(&octets);
            count_hop(&mut octets.clone());
        }
    }
}
