//! Ethernet tunnels.

use cipe_common::EthernetStamp;
use cipe_common::stamp::STAMP_TPID;

use super::*;

const HEADER: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];

fn pair() -> Pair {
    let mut pair = Pair::new(Algorithm::Idea, Protocol::Ethernet).unwrap();
    pair.change_key(&KEYS[0], None);
    pair
}

#[test]
fn frames_arrive_octet_for_octet_and_runs_as_superframes() {
    let mut pair = pair();
    let segments = Flow { dont_fragment: false, ..Flow::tcp4() }.segments(&[7; 10_000], 1000);
    let mut frames: Vec<Vec<u8>> = segments.iter().map(|segment| [&HEADER[..], segment].concat()).collect();
    frames.push([&[0xFF; 12][..], &[0x88, 0xB5], &[9; 60]].concat());
    frames.iter().for_each(|frame| assert!(pair.a.push_frame(frame)));
    let sealed = pair.a.seal();
    sealed.iter().for_each(|datagram| pair.b.push_datagram(pair.a.me(), datagram));
    pair.b.open();
    assert!(pair.b.device.frames == frames);
    assert_eq!((pair.b.device.superframes, counted(&pair.b, Verdict::Delivered)), (1, 11));
    pair.assert_frames_are_back();
}

#[test]
fn a_frame_that_the_device_would_lose_is_counted() {
    let mut pair = pair();
    let frame = [&HEADER[..], &Flow { dont_fragment: false, ..Flow::udp4() }.packet(&[7; 1500])].concat();
    pair.a.push_frame(&frame);
    let sealed = pair.a.seal();
    let (a, b) = (&pair.a, &mut pair.b);
    assert!(sealed.len() == 1 && b.receive(a, &sealed).is_empty());
    assert_eq!((counted(b, Verdict::PrivateFull), b.accounted()), (1, 1));
    pair.assert_frames_are_back();
}

#[test]
fn a_frame_of_several_pieces_is_too_big() {
    let mut pair = pair();
    pair.a.push_frame(&[2; 4000]);
    assert!(pair.a.seal().is_empty());
    assert_eq!((counted(&pair.a, Verdict::TooBig), pair.a.accounted()), (1, 1));
    pair.assert_frames_are_back();
}

/// Link headers without the addresses: none, one, two or three tags, and MPLS. Each segment repeats them.
const BEFORE: [&[u8]; 6] = [
    &[0x08, 0x00],
    &[0x81, 0, 0x20, 5, 0x08, 0x00],
    &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 5, 0x08, 0x00],
    &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 6, 0x81, 0, 0, 5, 0x08, 0x00],
    &[0x88, 0x47, 0, 1, 0x20, 64, 0, 1, 0x31, 64],
    &[0x81, 0, 0, 5, 0x88, 0x48, 0, 1, 0x21, 64],
];

fn link(before: &[u8]) -> Vec<u8> {
    [&HEADER[..12], before].concat()
}

/// Returns the frame with a stamp, as the TC program writes it.
fn stamped(frame: &[u8], stamp: EthernetStamp) -> Vec<u8> {
    [&frame[..12], &STAMP_TPID, &stamp.to_tci().to_be_bytes(), &frame[12..]].concat()
}

/// Sends a frame through the tunnel. Returns the frames that the other end delivers.
fn through(pair: &mut Pair, frame: &[u8]) -> Vec<Vec<u8>> {
    assert!(pair.a.push_frame(frame));
    let sealed = pair.a.seal();
    sealed.iter().for_each(|datagram| pair.b.push_datagram(pair.a.me(), datagram));
    pair.b.open();
    pair.assert_frames_are_back();
    pair.b.device.frames.drain(..).collect()
}

#[test]
fn superframes_are_cut_behind_whatever_stands_before_the_packet() {
    let mut pair = pair();
    pair.b.tunnel().device_mtu = 1500;
    for before in BEFORE {
        for flow in [Flow::tcp4(), Flow::udp4()] {
            let (flow, payload) = (Flow { dont_fragment: false, ..flow }, [7; 10_500]);
            let superframe = [&link(before)[..], &flow.with_partial_checksum(&payload)].concat();
            let came = through(&mut pair, &stamped(&superframe, EthernetStamp::Superframe(1000)));
            let expected: Vec<Vec<u8>> =
                flow.segments(&payload, 1000).iter().map(|segment| [&link(before)[..], segment].concat()).collect();
            assert!(came == expected, "{before:X?} {flow:?}");
        }
    }
    let (counters, sent) = (pair.a.counters(), 12 * 11);
    assert_eq!((counters.of(Verdict::Sent), pair.a.accounted()), (sent, sent));
}

#[test]
fn what_the_kernel_has_cut_already_goes_as_it_is() {
    let mut pair = pair();
    for before in BEFORE {
        let flow = Flow { dont_fragment: false, ..Flow::tcp4() };
        let segment = |packet: &[u8]| [&link(before)[..], packet].concat();
        let finished = segment(&flow.packet(&[7; 1000]));
        for packet in [flow.packet(&[7; 1000]), flow.with_partial_checksum(&[7; 1000])] {
            let frame = stamped(&segment(&packet), EthernetStamp::Superframe(1000));
            assert_eq!(through(&mut pair, &frame), [&finished[..]], "{before:X?}");
        }
    }
}

#[test]
fn unfinished_checksums_are_completed_wherever_they_are() {
    let mut pair = pair();
    let flow = Flow { dont_fragment: false, ..Flow::udp4() };
    let vxlan = |inner: &[u8]| {
        let content = [&[8, 0, 0, 0, 0, 0, 5, 0][..], &HEADER, inner].concat();
        Flow { ports: [50_000, 4789], ..flow.clone() }.packet(&content)
    };
    let [finished, unfinished] = [flow.packet(&[7; 99]), flow.with_partial_checksum(&[7; 99])];
    // The outer checksum already covers the finished inner checksum.
    let right = vxlan(&finished);
    let mut unfinished_inside = right.clone();
    unfinished_inside[right.len() - unfinished.len()..].copy_from_slice(&unfinished);
    for before in BEFORE {
        let is_known = before.len() <= 10 && before.ends_with(&[0x08, 0x00]);
        let frame = |packet: &[u8]| [&link(before)[..], packet].concat();
        let stamp = if is_known { EthernetStamp::Plain } else { EthernetStamp::Hidden };
        let octets = stamped(&frame(&unfinished), stamp);
        assert_eq!(through(&mut pair, &octets), [frame(&finished)], "{before:X?}");
        if is_known {
            let octets = stamped(&frame(&unfinished_inside), EthernetStamp::Encapsulated);
            assert_eq!(through(&mut pair, &octets), [frame(&right)], "{before:X?}");
        }
    }
    // The stamp does not announce an unfinished checksum, and the datapath does not look into frames without IP.
    for before in [&[0x88, 0x64, 0x11, 0, 0, 1, 0, 129, 0, 0x21][..], &[0x88, 0xB5]] {
        let other = [&link(before)[..], &unfinished].concat();
        assert_eq!(through(&mut pair, &other), [&other[..]]);
    }
}

#[test]
fn a_tag_like_the_stamp_s_stays_behind_the_stamp() {
    let mut pair = pair();
    for tags in [&[0x88, 0xA8, 0x05, 0xDC][..], &[0x88, 0xA8, 0, 0, 0x88, 0xA8, 0xFF, 0xFF]] {
        let frame = [&HEADER[..12], tags, &[0x88, 0xB5], &[9; 60]].concat();
        assert_eq!(through(&mut pair, &stamped(&frame, EthernetStamp::Plain)), [&frame[..]]);
    }
}

#[test]
fn of_a_superframe_that_may_not_leave_each_segment_is_counted() {
    let mut pair = pair();
    let superframe = |flow: &Flow, size: u16| {
        let frame = [&HEADER[..], &flow.with_partial_checksum(&[7; 10_500])].concat();
        stamped(&frame, EthernetStamp::Superframe(size))
    };
    // DF, and larger than the tunnel takes.
    assert_eq!(through(&mut pair, &superframe(&Flow::tcp4(), 1450)), [[0; 0]; 0]);
    assert_eq!(counted(&pair.a, Verdict::TooBig), 8);
    // Larger than a frame of memory.
    assert_eq!(through(&mut pair, &superframe(&Flow::tcp4(), 3000)), [[0; 0]; 0]);
    assert_eq!(counted(&pair.a, Verdict::TooBig), 8 + 4);
    pair.a.clear_key(Slot::Send);
    assert_eq!(through(&mut pair, &superframe(&Flow::tcp4(), 1000)), [[0; 0]; 0]);
    assert_eq!((counted(&pair.a, Verdict::NoSendKey), pair.a.accounted()), (11, 8 + 4 + 11));
}

#[test]
fn a_superframe_that_is_not_understood_is_dropped() {
    let mut pair = pair();
    let pppoe =
        [&link(&[0x88, 0x64, 0x11, 0, 0, 1, 0x29, 0x38, 0, 0x21])[..], &Flow::tcp4().packet(&[7; 10_500])].concat();
    for frame in [pppoe, HEADER.to_vec(), [&HEADER[..], &[0x45; 900]].concat()] {
        assert_eq!(through(&mut pair, &stamped(&frame, EthernetStamp::Superframe(1000))), [[0; 0]; 0]);
    }
    let dropped = [Verdict::PrivateMalformed, Verdict::PrivateNotIp].map(|verdict| counted(&pair.a, verdict));
    assert_eq!((dropped, pair.a.accounted()), ([2, 1], 3));
    // A stamp without a frame.
    assert_eq!(through(&mut pair, &stamped(&HEADER[..12], EthernetStamp::Plain)), [[0; 0]; 0]);
    assert_eq!(counted(&pair.a, Verdict::PrivateMalformed), 3);
}
