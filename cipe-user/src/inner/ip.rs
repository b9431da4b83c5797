//! The strict check of an opened data payload: exactly one IP packet (protocol section 6).

use cipe_common::Verdict;

use crate::inner::headers::{Headers, IpVersion};

/// Octets of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Octets of an IPv6 header.
pub const IPV6: usize = 40;
/// Minimum MTU of an IPv4 link in octets (RFC 791).
pub const LEAST_MTU: usize = 68;

/// Checks that `payload` is exactly one IPv4 or IPv6 packet.
///
/// A CRC under CBC is no authentication, so everything that an honest sender always gets right is required. This
/// includes the IPv4 header checksum: every stack computes it in software, the next hop would drop a packet with a
/// wrong one, and it makes a spliced packet 65,536 times less likely to pass.
///
/// # Errors
/// [`Verdict::BadInner`].
#[inline(always)]
pub fn check(payload: &[u8]) -> Result<Headers, Verdict> {
    let Ok(headers) = Headers::parse(payload) else { return Err(Verdict::BadInner) };
    let is_right = || headers.version == IpVersion::V6 || checksum(&payload[..headers.header()]) == 0xFFFF;
    if headers.total() == payload.len() && is_right() { Ok(headers) } else { Err(Verdict::BadInner) }
}

/// One's complement sum of a header (RFC 1071), folded to 16 bits; 0xFFFF over a header with a right checksum.
fn checksum(header: &[u8]) -> u16 {
    let sum: u32 = header.as_chunks().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    // At most 30 words, so two folds are enough.
    let sum = (sum & 0xFFFF) + (sum >> 16);
    ((sum & 0xFFFF) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::headers::IpVersion::{V4, V6};

    /// An ICMP packet of `n` octets with a correct header.
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
        assert_eq!((inner.version, inner.ttl, inner.tos, inner.protocol, inner.header()), (V4, 63, 0xB8, 1, 20));
        let addresses = ([10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        assert_eq!(inner.addresses(&v4(28)), Some(addresses));
        assert!(inner.dont_fragment);
        let inner = check(&v6(9)).unwrap();
        assert_eq!((inner.version, inner.ttl, inner.tos, inner.protocol, inner.header()), (V6, 64, 0xB8, 17, 40));
        assert_eq!(inner.addresses(&v6(9)), Some(("fd00::".parse().unwrap(), "::1".parse().unwrap())));
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
        assert_eq!(check(&packet).unwrap().header(), 28);
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
            assert_eq!(Headers::parse(&packet[..header]).ok(), check(&packet).ok());
            assert_eq!(Headers::parse(&packet[..header - 1]), Err(Verdict::PrivateMalformed));
        }
    }

    proptest! {
        #[test]
        fn any_octets_get_a_verdict(first in prop_oneof![Just(0x45u8), Just(0x4F), Just(0x60), any::<u8>()],
                                    rest in proptest::collection::vec(any::<u8>(), 0..100)) {
            let payload: Vec<u8> = std::iter::once(first).chain(rest).collect();
            if let Ok(inner) = check(&payload) {
                prop_assert!(inner.header() <= payload.len());
            }
        }
    }
}
