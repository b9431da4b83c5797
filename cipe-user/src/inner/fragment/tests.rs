//! Examples and properties of fragmentation.

use proptest::prelude::*;

use super::*;
use crate::inner::test_packets::{Flow, naive_sum};

fn fragments(packet: &[u8], mtu: usize) -> Result<Vec<Vec<u8>>, Verdict> {
    let mut cutter = Fragments::new(packet, &Headers::parse(packet)?, mtu)?;
    let mut buffer = vec![0xEE; mtu];
    Ok(std::iter::from_fn(|| cutter.cut(&mut buffer).map(|len| buffer[..len].to_vec())).collect())
}

/// The flags and offset field of a fragment.
fn field(fragment: &[u8]) -> u16 {
    u16::from_be_bytes([fragment[6], fragment[7]])
}

fn header_len(packet: &[u8]) -> usize {
    usize::from(packet[0] & 0xF) * 4
}

/// Reassembles by RFC 791, section 3.2, "An Example Reassembly Procedure": the first fragment's header, with all
/// payloads.
fn reassemble(fragments: &[Vec<u8>]) -> Vec<u8> {
    let mut packet = fragments[0][..header_len(&fragments[0])].to_vec();
    let start = usize::from(field(&fragments[0]) & OFFSET) * 8;
    let mut payload: Vec<u8> = Vec::new();
    for (index, fragment) in fragments.iter().enumerate() {
        assert_eq!(usize::from(field(fragment) & OFFSET) * 8, start + payload.len(), "fragment {index}");
        assert_eq!(usize::from(u16::from_be_bytes([fragment[2], fragment[3]])), fragment.len());
        assert_eq!(naive_sum(&fragment[..header_len(fragment)]), 0xFFFF, "checksum of fragment {index}");
        payload.extend(&fragment[header_len(fragment)..]);
    }
    let last = field(&fragments[fragments.len() - 1]);
    packet.extend(payload);
    let total = packet.len() as u16;
    packet[2..4].copy_from_slice(&total.to_be_bytes());
    packet[6..8].copy_from_slice(&(last & MORE_FRAGMENTS | field(&fragments[0]) & OFFSET).to_be_bytes());
    let header = header_len(&packet);
    packet[10..12].fill(0);
    let checksum = !naive_sum(&packet[..header]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

fn udp(octets: usize) -> Vec<u8> {
    let payload: Vec<u8> = (0..octets).map(|octet| octet as u8).collect();
    Flow { dont_fragment: false, ..Flow::udp4() }.packet(&payload)
}

/// A packet with these options, padded to a whole word.
fn with_options(options: &[u8], octets: usize) -> Vec<u8> {
    let words = options.len().div_ceil(4);
    let mut packet = Flow { dont_fragment: false, ip_options: words, ..Flow::udp4() }.packet(&vec![7; octets]);
    packet[20..20 + words * 4].fill(0);
    packet[20..20 + options.len()].copy_from_slice(options);
    packet[10..12].fill(0);
    let checksum = !naive_sum(&packet[..20 + words * 4]);
    packet[10..12].copy_from_slice(&checksum.to_be_bytes());
    packet
}

#[test]
fn the_example_of_rfc_791_is_cut_as_there() {
    // Appendix A, example 2: 452 octets of data behind a header of 20 octets, over a link with an MTU of 280.
    let packet = udp(452 - 8);
    let cut = fragments(&packet, 280).unwrap();
    let seen: Vec<(usize, u16)> = cut.iter().map(|fragment| (fragment.len(), field(fragment))).collect();
    assert_eq!(seen, [(276, MORE_FRAGMENTS), (216, 32)]);
    assert_eq!(reassemble(&cut), packet);
}

#[test]
fn what_fits_comes_out_as_it_is() {
    let packet = udp(100);
    assert_eq!(fragments(&packet, packet.len()).unwrap(), [packet]);
}

#[test]
fn a_fragment_of_a_fragment_goes_on_where_it_was() {
    let whole = udp(3000);
    let outer = fragments(&whole, 1500).unwrap();
    let inner: Vec<Vec<u8>> = outer.iter().flat_map(|fragment| fragments(fragment, 576).unwrap()).collect();
    assert!(inner[..inner.len() - 1].iter().all(|fragment| field(fragment) & MORE_FRAGMENTS != 0));
    assert_eq!(field(&inner[inner.len() - 1]) & MORE_FRAGMENTS, 0);
    assert_eq!(reassemble(&inner), whole);
}

#[test]
fn later_fragments_carry_only_options_with_the_copied_flag() {
    // Record route (7, not copied), no operation, stream id (136, copied), router alert (148, copied).
    let options = [7, 7, 4, 0, 0, 0, 0, 1, 136, 4, 0x12, 0x34, 148, 4, 0, 0];
    let packet = with_options(&options, 400);
    let cut = fragments(&packet, 200).unwrap();
    assert!(cut.len() > 2);
    assert_eq!(cut[0][20..36], options);
    for fragment in &cut[1..] {
        assert_eq!(header_len(fragment), 28);
        assert_eq!(fragment[20..28], options[8..]);
    }
    assert_eq!(reassemble(&cut), packet);
}

#[test]
fn copied_options_are_padded_with_the_end_of_options() {
    let cut = fragments(&with_options(&[131, 7, 4, 10, 0, 0, 1, 0], 400), 200).unwrap();
    assert_eq!(cut[1][20..28], [131, 7, 4, 10, 0, 0, 1, 0]);
    let cut = fragments(&with_options(&[7, 3, 4, 0], 400), 200).unwrap();
    assert_eq!(header_len(&cut[1]), 20);
}

#[test]
fn options_that_cannot_be_read_end_the_list() {
    for options in [[148, 1, 0, 0], [148, 0, 0, 0], [148, 9, 0, 0], [1, 1, 1, 148]] {
        let cut = fragments(&with_options(&options, 400), 200).unwrap();
        assert_eq!(header_len(&cut[1]), 20, "{options:?}");
    }
}

#[test]
fn what_must_not_or_cannot_be_cut_is_refused() {
    let refused = |packet: &[u8], mtu| fragments(packet, mtu).unwrap_err();
    assert_eq!(refused(&Flow::udp4().packet(&[7; 400]), 200), Verdict::TooBig, "DF");
    assert_eq!(refused(&Flow::udp6().packet(&[7; 400]), 200), Verdict::TooBig, "IPv6");
    assert_eq!(refused(&udp(400), 27), Verdict::TooBig, "no room for a unit");
    let packet = udp(400);
    assert_eq!(refused(&packet[..427], 200), Verdict::PrivateMalformed, "cut off");
    let mut far = udp(400);
    far[6..8].copy_from_slice(&0x1FFFu16.to_be_bytes());
    assert_eq!(refused(&far, 200), Verdict::PrivateMalformed, "beyond 64 KiB");
}

proptest! {
    #[test]
    fn fragments_fit_and_make_the_packet_again(
        flow in Flow::any().prop_filter("IPv4", |flow| !flow.v6()),
        payload in prop::collection::vec(any::<u8>(), 0..3000),
        options in prop::collection::vec(prop_oneof![Just(1u8), Just(4), Just(148), any::<u8>()], 40),
        offset in 0u16..7000,
        more in any::<bool>(),
        mtu in 68usize..1500,
    ) {
        let mut packet = Flow { dont_fragment: false, ..flow }.packet(&payload);
        let header = header_len(&packet);
        packet[20..header].copy_from_slice(&options[..header - 20]);
        packet[6..8].copy_from_slice(&(offset | if more { MORE_FRAGMENTS } else { 0 }).to_be_bytes());
        packet[10..12].fill(0);
        let checksum = !naive_sum(&packet[..header]);
        packet[10..12].copy_from_slice(&checksum.to_be_bytes());

        let cut = fragments(&packet, mtu).unwrap();
        prop_assert!(cut.iter().all(|fragment| fragment.len() <= mtu));
        prop_assert_eq!(reassemble(&cut), packet);
    }

    #[test]
    fn any_octets_are_taken(mut octets in prop::collection::vec(any::<u8>(), 0..200), mtu in 0usize..300) {
        if let Some(octet) = octets.first_mut() {
            *octet = 0x40 | *octet & 0xF;
        }
        if let Some(flags) = octets.get_mut(6) {
            *flags &= 0x3F;
        }
        let _ = fragments(&octets, mtu);
    }
}
