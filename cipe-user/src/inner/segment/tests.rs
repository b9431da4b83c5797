//! Compares the segmenter with a second one that is slow and obviously correct, and with tables.

use proptest::prelude::*;

use super::*;
use crate::inner::test_packets::{Flow, checksums_are_right};

/// Cuts a superframe in one slice.
fn cut(packet: &[u8], gso_size: u16) -> Vec<Vec<u8>> {
    cut_pieces(&[packet], gso_size).unwrap()
}

fn cut_pieces(pieces: &[&[u8]], gso_size: u16) -> Result<Vec<Vec<u8>>, Verdict> {
    let mut superframe = Superframe::parse(pieces, gso_size)?;
    let (segments, longest) = (superframe.segments(), superframe.longest());
    let mut all = Vec::new();
    let mut buffer = vec![0xEE; longest];
    while let Some(len) = superframe.cut(&mut buffer) {
        all.push(buffer[..len].to_vec());
    }
    assert_eq!((all.len(), all[0].len()), (segments, longest));
    assert_eq!(superframe.cut(&mut buffer), None);
    Ok(all)
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn one_flow_is_cut_as_a_sender_would_have_sent_it() {
    let flow = Flow { id: 0xFFFE, sequence: u32::MAX - 1000, flags: 0x98 | FIN, ..Flow::tcp4() };
    let segments = cut(&flow.packet(&payload(3500)), 1402);
    let expected: Vec<Vec<u8>> = payload(3500)
        .chunks(1402)
        .zip([0x90, 0x10, 0x19])
        .enumerate()
        .map(|(index, (chunk, flags))| {
            let id = flow.id.wrapping_add(index as u16);
            Flow { id, flags, sequence: flow.sequence.wrapping_add(index as u32 * 1402), ..flow.clone() }.packet(chunk)
        })
        .collect();
    assert_eq!(segments, expected);
}

#[test]
fn one_segment_keeps_all_its_flags() {
    let flow = Flow { flags: 0xFF, ..Flow::tcp6() };
    for len in [0, 1, 1000] {
        let packet = flow.packet(&payload(len));
        assert_eq!(cut(&packet, 1000), [packet]);
    }
}

#[test]
fn a_datagram_without_a_checksum_is_cut_into_such() {
    let mut packet = Flow::udp4().packet(&payload(100));
    packet[26..28].fill(0);
    for segment in cut(&packet, 30) {
        assert_eq!(segment[26..28], [0, 0]);
    }
}

#[test]
fn headers_that_contradict_the_frame_are_malformed() {
    let packet = Flow::tcp4().packet(&payload(3000));
    let with = |at: usize, value: u8| {
        let mut packet = packet.clone();
        packet[at] = value;
        packet
    };
    let cases = [
        ("fragment", with(6, 0x20)),
        ("another protocol", with(9, 132)),
        ("data offset under 20", with(32, 0x40)),
        ("total length of 0 (BIG TCP)", [with(2, 0), vec![0; 70_000]].concat()),
        ("cut off", packet[..packet.len() - 1].to_vec()),
        ("header beyond the packet", { Flow { options: vec![1; 40], ..Flow::tcp4() }.packet(&[])[..60].to_vec() }),
        ("empty", Vec::new()),
    ];
    for (what, mut packet) in cases {
        if what.starts_with("total") {
            packet[3] = 0;
        }
        let error = if what == "empty" { Verdict::PrivateNotIp } else { Verdict::PrivateMalformed };
        assert_eq!(cut_pieces(&[&packet], 1400).err(), Some(error), "{what}");
    }
    assert_eq!(cut_pieces(&[&packet], 0).err(), Some(Verdict::PrivateMalformed));
    assert_eq!(cut_pieces(&[&with(0, 0x55)], 1400).err(), Some(Verdict::PrivateNotIp));
}

#[test]
fn the_largest_superframe_is_cut() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp6()] {
        let room = if flow.v6() { 65_535 } else { 65_515 } - flow.transport_header_len();
        let segments = cut(&flow.packet(&payload(room)), 1);
        assert_eq!(segments.len(), room);
        assert!(segments.iter().all(|segment| checksums_are_right(segment)));
    }
}

/// Splits `packet` at the given offsets; some may be equal.
fn pieces_of(packet: &[u8], mut places: Vec<usize>) -> Vec<&[u8]> {
    places.sort_unstable();
    places.push(packet.len());
    let mut start = 0;
    places
        .into_iter()
        .map(|place| {
            let end = place.clamp(start, packet.len());
            let piece = &packet[start..end];
            start = end;
            piece
        })
        .collect()
}

proptest! {
    #[test]
    fn segments_are_those_of_the_obvious_segmenter(
        flow in Flow::any(), len in 0usize..9000, gso_size in 1u16..3000, excess in 0usize..4,
        places in prop::collection::vec(prop_oneof![0usize..130, 0usize..9200], 0..6),
    ) {
        let payload = payload(len);
        // The kernel leaves the sum of the pseudo header in the checksum field.
        let mut packet = flow.with_partial_checksum(&payload);
        packet.resize(packet.len() + excess, 0xEE);
        let pieces = pieces_of(&packet, places);
        let segments = cut_pieces(&pieces, gso_size).unwrap();
        prop_assert_eq!(segments, flow.segments(&payload, usize::from(gso_size)));
    }

    #[test]
    fn any_octets_are_cut_or_refused(
        flow in Flow::any(), len in 0usize..300, gso_size in 0u16..300, changes in prop::collection::vec((0usize..140, any::<u8>()), 0..4),
        places in prop::collection::vec(0usize..300, 0..4),
    ) {
        let mut packet = flow.packet(&payload(len));
        for (at, value) in changes {
            if let Some(octet) = packet.get_mut(at) {
                *octet = value;
            }
        }
        if let Ok(segments) = cut_pieces(&pieces_of(&packet, places), gso_size) {
            let cut: usize = segments.iter().map(Vec::len).sum();
            prop_assert!(cut >= packet.len().min(segments[0].len()));
        }
    }
}
