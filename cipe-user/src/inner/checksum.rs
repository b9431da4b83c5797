//! The Internet checksum (RFC 1071), and its use in inner TCP and UDP packets.
//!
//! Sums run over native-endian words. One's complement addition does not depend on the octet order, if the result is
//! stored in the same order (RFC 1071, section 2, "byte order independence").

use crate::inner::headers::{Headers, IpVersion, Part, TCP, UDP};

/// A running one's complement sum over pieces of any length.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Congruent, modulo 2^16 - 1, to the sum of the native-endian 16-bit words.
    words: u64,
    /// Whether the number of octets so far is odd, so that the next piece starts in the second half of a word.
    odd: bool,
}

impl Sum {
    /// Returns the sum of the pseudo header for a transport packet of `len` octets behind the given IP header (RFC
    /// 9293, section 3.1; RFC 8200, section 8.1). The caller then adds the transport packet.
    ///
    /// # Panics
    /// If `ip` is shorter than the fixed header of its version.
    #[inline]
    pub fn pseudo_header(version: IpVersion, ip: &[u8], protocol: u8, len: usize) -> Self {
        let mut sum = Self::default();
        match version {
            IpVersion::V4 => sum.add(&ip[12..20]),
            IpVersion::V6 => sum.add(&ip[8..40]),
        }
        // The length field has 16 bits in IPv4 and 32 bits in IPv6; the sum is the same for lengths below 64 KiB.
        let len = u32::from_ne_bytes((len as u32).to_be_bytes());
        let protocol = u16::from_ne_bytes([0, protocol]);
        sum.words = plus(sum.words, u64::from(len) + u64::from(protocol));
        sum
    }

    /// Adds a piece to the sum.
    #[inline]
    pub fn add(&mut self, piece: &[u8]) {
        self.join(words(piece), piece.len());
    }

    /// Copies `from` to `to`, and adds it to the sum while it is in the first-level cache.
    ///
    /// # Panics
    /// If the lengths differ.
    #[inline]
    pub fn copy(&mut self, to: &mut [u8], from: &[u8]) {
        self.join(copy_words(to, from), from.len());
    }

    /// Returns the sum folded to 16 bits, in network order. A stack leaves this value in a checksum field that the
    /// device has to complete. It is zero only if all octets so far were zero.
    #[inline]
    pub fn folded(self) -> [u8; 2] {
        fold(self.words).to_ne_bytes()
    }

    /// Returns the checksum: the folded sum inverted. It is 0xFFFF only if all octets so far were zero.
    #[inline]
    pub fn checksum(self) -> [u8; 2] {
        (!fold(self.words)).to_ne_bytes()
    }

    #[inline]
    fn join(&mut self, words: u64, len: usize) {
        // A piece that starts in the second half of a word has its octets in the opposite halves.
        self.words = plus(self.words, if self.odd { words.rotate_left(8) } else { words });
        self.odd ^= len % 2 == 1;
    }
}

/// Folds to 16 bits with end-around carry.
#[inline]
fn fold(words: u64) -> u16 {
    let words = (words & 0xFFFF_FFFF) + (words >> 32);
    let words = (words & 0xFFFF) + (words >> 16 & 0xFFFF) + (words >> 32);
    let words = (words & 0xFFFF) + (words >> 16);
    ((words & 0xFFFF) + (words >> 16)) as u16
}

/// One's complement addition of 64-bit words, each a row of four 16-bit words.
#[inline]
fn plus(a: u64, b: u64) -> u64 {
    let (sum, carry) = a.overflowing_add(b);
    sum + u64::from(carry)
}

#[inline]
fn word(octets: &[u8; 8]) -> u64 {
    u64::from_ne_bytes(*octets)
}

/// Sum of the words of up to seven octets.
#[inline]
fn tail_words(octets: &[u8]) -> u64 {
    let (mut words, mut rest) = (0, octets);
    if let Some((four, later)) = rest.split_first_chunk() {
        words += u64::from(u32::from_ne_bytes(*four));
        rest = later;
    }
    if let Some((two, later)) = rest.split_first_chunk() {
        words += u64::from(u16::from_ne_bytes(*two));
        rest = later;
    }
    if let Some(last) = rest.first() {
        words += u64::from(u16::from_ne_bytes([*last, 0]));
    }
    words
}

/// Eight parallel sums of 32-bit words, which compilers turn into vector additions. They cannot overflow before 16 GiB.
fn words(piece: &[u8]) -> u64 {
    let (blocks, rest) = piece.as_chunks::<32>();
    let mut lanes = [0_u64; 8];
    for block in blocks {
        let eight: &[[u8; 4]; 8] = block.as_chunks().0.try_into().expect("32 octets are eight times four");
        for i in 0..8 {
            lanes[i] += u64::from(u32::from_ne_bytes(eight[i]));
        }
    }
    let (singles, tail) = rest.as_chunks::<8>();
    let start = lanes.iter().fold(0, |sum, lane| plus(sum, *lane));
    plus(singles.iter().fold(start, |sum, octets| plus(sum, word(octets))), tail_words(tail))
}

fn copy_words(to: &mut [u8], from: &[u8]) -> u64 {
    assert_eq!(to.len(), from.len(), "a copy needs room of the same length");
    to.copy_from_slice(from);
    words(from)
}

/// Offset of the checksum in a TCP header.
pub const TCP_CHECKSUM: usize = 16;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECKSUM: usize = 6;

/// Completes the checksum of a TCP or UDP packet that the local stack left to the device (`CHECKSUM_PARTIAL`): the
/// checksum field then holds the folded sum of the pseudo header. Returns whether it did so. All other packets stay
/// unchanged: other protocols, fragments, packets that are cut off, UDP without a checksum.
///
/// Nothing but that number in the field tells such a packet, and that is enough. What is written is computed from all
/// octets *except* the field, so a packet that was complete, and whose right checksum happens to be that number, gets
/// the number that it had; and so does whatever this function is called for twice: either the field no longer holds
/// the folded sum, or it holds the right checksum already. Only a packet that was damaged before it came here is
/// changed for the better by mistake, if its field is that number: one of 65,535.
pub fn complete(packet: &mut [u8], headers: &Headers) -> bool {
    let (shortest, field) = match headers.protocol {
        TCP => (20, TCP_CHECKSUM),
        UDP => (8, UDP_CHECKSUM),
        _ => return false,
    };
    if headers.part != Part::Whole || headers.transport_len() < shortest || packet.len() < headers.total() {
        return false;
    }
    let (ip, transport) = packet[..headers.total()].split_at_mut(headers.transport());
    let mut sum = Sum::pseudo_header(headers.version, ip, headers.protocol, transport.len());
    if transport[field..field + 2] != sum.folded() {
        return false;
    }
    transport[field..field + 2].fill(0);
    sum.add(transport);
    transport[field..field + 2].copy_from_slice(&transport_checksum(sum, headers.protocol));
    true
}

/// Returns the checksum field for a finished sum. In UDP, 0 means "no checksum", so 0xFFFF replaces it (RFC 768).
#[inline]
pub fn transport_checksum(sum: Sum, protocol: u8) -> [u8; 2] {
    let checksum = sum.checksum();
    if protocol == UDP && checksum == [0; 2] { [0xFF; 2] } else { checksum }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::test_packets::{Flow, naive_sum};

    fn complete_partial(packet: &mut [u8]) -> bool {
        Headers::parse(packet).is_ok_and(|headers| complete(packet, &headers))
    }

    #[test]
    fn the_example_of_rfc_1071_sums_up() {
        let mut sum = Sum::default();
        sum.add(&[0x00, 0x01, 0xF2, 0x03, 0xF4, 0xF5, 0xF6, 0xF7]);
        assert_eq!((sum.folded(), sum.checksum()), ([0xDD, 0xF2], [0x22, 0x0D]));
    }

    #[test]
    fn carries_run_through_every_width() {
        for len in 0..200 {
            let mut sum = Sum::default();
            sum.add(&vec![0xFF; len]);
            assert_eq!(u16::from_be_bytes(sum.folded()), naive_sum(&vec![0xFF; len]), "{len}");
        }
    }

    #[test]
    fn fragments_other_protocols_and_cut_packets_are_left_alone() {
        let base = Flow::tcp4().with_partial_checksum(b"payload");
        let change = |at: usize, value: u8| {
            let mut packet = base.clone();
            packet[at] = value;
            packet
        };
        for mut packet in [change(6, 0x20), change(7, 1), change(9, 47), change(3, 255), change(0, 0x55), Vec::new()] {
            let before = packet.clone();
            assert!(!complete_partial(&mut packet));
            assert_eq!(packet, before);
        }
        assert!(complete_partial(&mut base.clone()));
    }

    #[test]
    fn udp_without_a_checksum_stays_without() {
        let mut packet = Flow::udp4().packet(b"payload");
        packet[26..28].fill(0);
        assert!(!complete_partial(&mut packet));
        assert_eq!(packet[26..28], [0, 0]);
    }

    #[test]
    fn a_udp_checksum_of_zero_is_sent_in_its_other_form() {
        for flow in [Flow::udp4(), Flow::udp6()] {
            // A packet whose payload is its own checksum has a checksum of zero.
            let payload = &flow.packet(&[0; 2])[flow.transport() + 6..flow.transport() + 8].to_vec();
            let mut packet = flow.with_partial_checksum(payload);
            assert!(complete_partial(&mut packet));
            assert_eq!(packet[flow.transport() + 6..flow.transport() + 8], [0xFF, 0xFF]);
        }
    }

    #[test]
    fn a_right_checksum_that_looks_partial_stays_as_it_is() {
        for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
            let field = flow.transport() + flow.checksum_field();
            let partial = flow.with_partial_checksum(&[0; 2])[field..field + 2].to_vec();
            let right = |payload: u16| flow.packet(&payload.to_be_bytes());
            let mut packet =
                (0..=u16::MAX).map(right).find(|packet| packet[field..field + 2] == partial).expect("one of all");
            let before = packet.clone();
            assert!(complete_partial(&mut packet));
            assert_eq!(packet, before);
        }
    }

    proptest! {
        #[test]
        fn pieces_of_any_length_sum_as_one(
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..90), 0..8),
        ) {
            let (mut sum, mut copied) = (Sum::default(), Sum::default());
            for piece in &pieces {
                sum.add(piece);
                let mut copy = vec![0; piece.len()];
                copied.copy(&mut copy, piece);
                prop_assert_eq!(&copy, piece);
            }
            prop_assert_eq!(u16::from_be_bytes(sum.folded()), naive_sum(&pieces.concat()));
            prop_assert_eq!(sum.folded(), copied.folded());
        }

        #[test]
        fn a_partial_checksum_is_completed_and_a_right_one_kept(
            flow in Flow::any(), payload in prop::collection::vec(any::<u8>(), 0..300), excess in 0usize..3,
        ) {
            let (mut partial, mut right) = (flow.with_partial_checksum(&payload), flow.packet(&payload));
            let whole = right.len();
            for packet in [&mut partial, &mut right] {
                packet.resize(whole + excess, 0xEE);
            }
            prop_assert!(complete_partial(&mut partial));
            prop_assert_eq!(&partial, &right);
            complete_partial(&mut partial);
            prop_assert_eq!(&partial, &right);
        }

        #[test]
        fn any_octets_are_taken(mut octets in prop::collection::vec(any::<u8>(), 0..120), first in 0x40u8..0x70) {
            if let Some(octet) = octets.first_mut() {
                *octet = first;
            }
            complete_partial(&mut octets);
        }
    }
}
