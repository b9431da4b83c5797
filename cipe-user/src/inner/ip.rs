//! Inner IP headers, and the strict check of an opened data payload: exactly one IP packet (protocol section 6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Octets of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Octets of an IPv6 header.
pub const IPV6: usize = 40;
/// Below this an IPv4 link is none (RFC 791).
pub const LEAST_MTU: usize = 68;

use cipe_common::Verdict;

/// What the way of a packet needs to know of its inner IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// Inner sender.
    pub source: IpAddr,
    /// Inner receiver.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class, ECN bits included.
    pub tos: u8,
    /// May not be fragmented: the DF bit of IPv4; IPv6 never may.
    pub dont_fragment: bool,
    /// Protocol, or the first next header of IPv6.
    pub protocol: u8,
    /// Octets of the header: 20 to 60, or 40 for IPv6 without its extension headers.
    pub header: usize,
    /// Octets of the whole packet as the header says; at least [`Inner::header`].
    pub total: usize,
}

impl Inner {
    /// Reads the header at the start of `packet`, which may end before the packet does or after it. The layouts are
    /// those of RFC 791 and RFC 8200; `None` for other versions, a header that is cut off, or lengths that contradict
    /// each other. The IPv4 checksum is not looked at.
    pub fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => ipv4(packet),
            6 => ipv6(packet),
            _ => None,
        }
    }

    /// IP version, 4 or 6.
    pub fn version(&self) -> u8 {
        if self.source.is_ipv4() { 4 } else { 6 }
    }
}

/// Checks that `payload` is exactly one IPv4 or IPv6 packet, to the octet.
///
/// A CRC under CBC is no authentication, so everything that an honest sender always gets right is required. That
/// includes the IPv4 header checksum: every stack fills it in in software, the next hop would drop the packet anyway,
/// and it costs a spliced packet another factor of 65,536.
///
/// # Errors
/// [`Verdict::BadInner`].
pub fn check(payload: &[u8]) -> Result<Inner, Verdict> {
    let inner = Inner::parse(payload).filter(|inner| inner.total == payload.len()).ok_or(Verdict::BadInner)?;
    if inner.source.is_ipv4() && checksum(&payload[..inner.header]) != 0xFFFF {
        return Err(Verdict::BadInner);
    }
    Ok(inner)
}

fn ipv4(packet: &[u8]) -> Option<Inner> {
    let fixed: &[u8; 20] = packet.first_chunk()?;
    let header = usize::from(fixed[0] & 0xF) * 4;
    let total = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
    if header < 20 || header > total || header > packet.len() {
        return None;
    }
    Some(Inner {
        source: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]).into(),
        destination: Ipv4Addr::new(fixed[16], fixed[17], fixed[18], fixed[19]).into(),
        ttl: fixed[8],
        tos: fixed[1],
        dont_fragment: fixed[6] & 0x40 != 0,
        protocol: fixed[9],
        header,
        total,
    })
}

fn ipv6(packet: &[u8]) -> Option<Inner> {
    let fixed: &[u8; 40] = packet.first_chunk()?;
    let address = |at: usize| fixed[at..].first_chunk::<16>().map(|octets| Ipv6Addr::from(*octets));
    Some(Inner {
        source: address(8)?.into(),
        destination: address(24)?.into(),
        ttl: fixed[7],
        tos: fixed[0] << 4 | fixed[1] >> 4,
        dont_fragment: true,
        protocol: fixed[6],
        header: 40,
        total: 40 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]])),
    })
}

/// One's complement sum of a header (RFC 1071), folded to 16 bits; 0xFFFF over a header with a right checksum.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.as_chunks().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    // 30 words at most: two folds are enough.
    let sum = (sum & 0xFFFF) + (sum >> 16);
    ((sum & 0xFFFF) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An ICMP packet of `n` octets with a right header.
    fn v4(n: u16) -> Vec<u8> {
        let mut packet = vec![0; usize::from(n)];
        packet[..20].copy_from_slice(&[0x45, 0xB8, 0, 0, 0, 1, 0x40, 0, 63, 1, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        packet[2..4].copy_from_slice(&n.to_be_bytes());
        let sum = !checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    fn v6(n: u16) -> Vec<u8> {
        let mut packet = vec![0; 40 + usize::from(n)];
        packet[..8].copy_from_slice(&[0x6B, 0x80, 0, 0, 0, 0, 17, 64]);
        packet[4..6].copy_from_slice(&n.to_be_bytes());
        packet[8] = 0xFD;
        packet[39] = 1;
        packet
    }

    #[test]
    fn the_fields_are_read() {
        let inner = check(&v4(28)).unwrap();
        assert_eq!((inner.version(), inner.ttl, inner.tos, inner.protocol, inner.header), (4, 63, 0xB8, 1, 20));
        assert_eq!((inner.source, inner.destination), (Ipv4Addr::new(10, 0, 0, 1).into(), [10, 0, 0, 2].into()));
        assert!(inner.dont_fragment);
        let inner = check(&v6(9)).unwrap();
        assert_eq!((inner.version(), inner.ttl, inner.tos, inner.protocol, inner.header), (6, 64, 0xB8, 17, 40));
        assert_eq!(inner.source, "fd00::".parse::<IpAddr>().unwrap());
        assert_eq!(inner.destination, "::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn a_length_that_is_not_exact_is_refused() {
        for mut packet in [v4(28), v6(0), v6(20)] {
            packet.push(0);
            assert_eq!(check(&packet), Err(Verdict::BadInner));
            packet.truncate(packet.len() - 2);
            assert_eq!(check(&packet), Err(Verdict::BadInner));
        }
    }

    #[test]
    fn options_are_part_of_the_checksum() {
        let mut packet = v4(28);
        packet[0] = 0x47;
        packet[10..12].fill(0);
        let sum = !checksum(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        assert_eq!(check(&packet).unwrap().header, 28);
        packet[27] = 1;
        assert_eq!(check(&packet), Err(Verdict::BadInner));
    }

    #[test]
    fn every_changed_bit_of_an_ipv4_header_is_noticed() {
        for bit in 0..160 {
            let mut packet = v4(28);
            packet[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(check(&packet), Err(Verdict::BadInner), "bit {bit}");
        }
    }

    #[test]
    fn other_versions_and_short_headers_are_refused() {
        assert_eq!(check(&[]), Err(Verdict::BadInner));
        for version in (0..16).filter(|v| ![4, 6].contains(v)) {
            assert_eq!(check(&[version << 4; 64]), Err(Verdict::BadInner));
        }
        let mut packet = v4(28);
        packet[0] = 0x44;
        assert_eq!(check(&packet), Err(Verdict::BadInner));
        packet[0] = 0x4F;
        assert_eq!(check(&packet), Err(Verdict::BadInner));
        assert_eq!(check(&v4(28)[..19]), Err(Verdict::BadInner));
        assert_eq!(check(&v6(0)[..39]), Err(Verdict::BadInner));
    }

    #[test]
    fn a_header_is_read_from_the_first_piece_of_its_packet() {
        for (packet, header) in [(v4(28), 20), (v6(9), 40)] {
            assert_eq!(Inner::parse(&packet[..header]), check(&packet).ok());
            assert_eq!(Inner::parse(&packet[..header - 1]), None);
        }
    }

    proptest! {
        #[test]
        fn any_octets_get_a_verdict(first in prop_oneof![Just(0x45u8), Just(0x4F), Just(0x60), any::<u8>()],
                                    rest in proptest::collection::vec(any::<u8>(), 0..100)) {
            let payload: Vec<u8> = std::iter::once(first).chain(rest).collect();
            if let Ok(inner) = check(&payload) {
                prop_assert!(inner.header <= payload.len());
            }
        }
    }
}
