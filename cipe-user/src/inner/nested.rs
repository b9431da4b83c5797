//! Completes the partial checksum inside an encapsulated packet (VXLAN, Geneve, GRE, IP in IP and others).
//!
//! The kernel leaves the checksum of the *innermost* transport header to the device. It gives the device the offset of
//! that header, but the offset does not reach the engine. A list of encapsulations would be incomplete, and the
//! operator may choose their ports. So the code searches for the header, by what the kernel must have written: an IP
//! header with correct lengths and checksum, before a transport header whose checksum field holds the folded sum of the
//! pseudo header. It searches only packets that the TC program marks as encapsulated
//! ([`cipe_common::Stamp::encapsulated`]), because it must not change the payload of other packets.

use crate::inner::checksum::{Sum, complete};
use crate::inner::ethernet::ETHERNET;
use crate::inner::headers::{Headers, IpVersion};
use crate::inner::ip::IPV4;

/// Maximum octets of encapsulation headers that are searched: more than any kernel writes. Geneve has up to 260 with
/// its options.
const WINDOW: usize = 512;

/// Octets between two places that are tried: all encapsulation headers are a multiple of this long.
const STEP: usize = 2;

/// Completes the checksum inside `packet`, whose own headers are `outer`; returns whether there was one to complete. The outer
/// checksums cover it as it will be (local checksum offload), and stay.
///
/// The outermost packet that fits is taken. By chance that is the wrong one for one of 65,536 packets in a UDP tunnel with
/// checksums that is itself in another tunnel; the peer then drops it for its checksum, as after damage on a line.
pub fn complete_inside(packet: &mut [u8], outer: &Headers) -> bool {
    let end = outer.total().min(packet.len());
    let last = end.min(outer.transport() + WINDOW);
    (outer.transport()..last).step_by(STEP).any(|at| complete_at(&mut packet[at..end]))
}

/// Does the same in an Ethernet frame, behind headers of any kind: MPLS, PPPoE, many VLAN tags. Only for frames in
/// which the TC program has found such a checksum ([`cipe_common::EthernetStamp::Hidden`]).
pub fn complete_hidden(frame: &mut [u8]) -> bool {
    let last = frame.len().min(ETHERNET + WINDOW);
    (ETHERNET..last).step_by(STEP).any(|at| complete_at(&mut frame[at..]))
}

/// Does the same for an IP packet at the start of `packet`, if there is one.
fn complete_at(packet: &mut [u8]) -> bool {
    let Ok(headers) = Headers::parse(packet) else { return false };
    let header_is_right = match headers.version {
        IpVersion::V4 => {
            let mut sum = Sum::default();
            sum.add(packet.get(..headers.header()).unwrap_or_default());
            headers.header() >= IPV4 && sum.folded() == [0xFF; 2]
        }
        IpVersion::V6 => true,
    };
    header_is_right && complete(packet, &headers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inner::headers::UDP;
    use crate::inner::test_packets::Flow;

    const ETHERNET4: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    const ETHERNET6: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xDD];

    fn complete_inside(packet: &mut [u8]) -> bool {
        Headers::parse(packet).is_ok_and(|outer| super::complete_inside(packet, &outer))
    }

    /// The encapsulation: an IP protocol, or a UDP port.
    enum Envelope {
        Protocol(u8),
        Port(u16),
    }

    fn wrap(outer: &Flow, envelope: &Envelope, header: &[u8], content: &[u8]) -> Vec<u8> {
        let content = [header, content].concat();
        match envelope {
            Envelope::Protocol(protocol) => Flow { protocol: *protocol, ..outer.clone() }.carrying(&content),
            Envelope::Port(port) => Flow { protocol: UDP, ports: [50_000, *port], ..outer.clone() }.packet(&content),
        }
    }

    #[test]
    fn checksums_are_completed_in_every_encapsulation() {
        use Envelope::{Port, Protocol};
        let vxlan = [8, 0, 0, 0, 0, 0, 5, 0];
        let tagged = [&ETHERNET4[..12], &[0x81, 0, 0, 9, 8, 0]].concat();
        let options = [9; 252];
        let cases: [(&str, Envelope, Vec<u8>, Flow); 16] = [
            ("IP in IP", Protocol(4), vec![], Flow::tcp4()),
            ("IPv6 in IP", Protocol(41), vec![], Flow::tcp6()),
            ("GRE", Protocol(47), vec![0, 0, 8, 0], Flow::udp4()),
            ("GRE, IPv6", Protocol(47), vec![0, 0, 0x86, 0xDD], Flow::udp6()),
            ("GRE with all fields", Protocol(47), [vec![0xB0, 0, 8, 0], vec![7; 12]].concat(), Flow::tcp4()),
            ("GRE, bridged", Protocol(47), [&[0x20, 0, 0x65, 0x58, 0, 0, 0, 1][..], &ETHERNET4].concat(), Flow::tcp4()),
            (
                "ERSPAN",
                Protocol(47),
                [&[0x10, 0, 0x88, 0xBE, 0, 0, 0, 1, 0x10, 0, 0, 1, 0, 0, 0, 1][..], &ETHERNET4].concat(),
                Flow::tcp4(),
            ),
            ("MPLS in UDP", Port(6635), vec![0, 1, 1, 64], Flow::tcp4()),
            ("FOU", Port(5555), vec![], Flow::tcp4()),
            ("GUE", Port(5556), vec![1, 4, 0, 0, 0, 0, 0, 1], Flow::udp4()),
            ("VXLAN", Port(4789), [&vxlan[..], &ETHERNET4].concat(), Flow::tcp4()),
            ("VXLAN on another port", Port(14_789), [&vxlan[..], &ETHERNET6].concat(), Flow::tcp6()),
            ("VXLAN with a VLAN inside", Port(4789), [&vxlan[..], &tagged].concat(), Flow::tcp4()),
            ("VXLAN-GPE", Port(4790), vec![0x0C, 0, 0, 1, 0, 0, 5, 0], Flow::udp4()),
            ("Geneve", Port(6081), [&[63, 0, 0x86, 0xDD, 0, 0, 5, 0][..], &options].concat(), Flow::udp6()),
            ("Geneve, bridged", Port(6081), [&[0, 0, 0x65, 0x58, 0, 0, 5, 0][..], &ETHERNET4].concat(), Flow::tcp4()),
        ];
        for (what, envelope, header, inner) in cases {
            for outer in [Flow::tcp4(), Flow::tcp6(), Flow { ip_options: 2, ..Flow::tcp4() }] {
                let (partial, right) = (inner.with_partial_checksum(b"payload"), inner.packet(b"payload"));
                // Ethernet padding may follow.
                for padding in [0, 3] {
                    let expected = wrap(&outer, &envelope, &header, &[&right[..], &[0; 3][..padding]].concat());
                    // The outer checksum is already the one of the complete packet (local checksum offload).
                    let mut packet = expected.clone();
                    let at = packet.len() - partial.len() - padding;
                    packet[at..at + partial.len()].copy_from_slice(&partial);
                    assert!(complete_inside(&mut packet), "{what}");
                    assert_eq!(packet, expected, "{what}");
                    complete_inside(&mut packet);
                    assert_eq!(packet, expected, "{what}: twice");
                }
            }
        }
    }

    #[test]
    fn a_checksum_is_completed_behind_headers_of_any_kind() {
        for before in [
            &[0x88, 0x47, 0, 1, 0x21, 64][..],
            // PPPoE, NSH and HSR.
            &[0x88, 0x64, 0x11, 0, 0, 1, 0, 50, 0, 0x21],
            &[0x89, 0x4F, 0x0F, 0xC2, 1, 1, 0, 0, 0, 255],
            &[0x89, 0x2F, 0, 60, 0, 1, 0x08, 0x00],
            &[0x81, 0, 0, 1, 0x81, 0, 0, 2, 0x81, 0, 0, 3, 0x08, 0x00],
        ] {
            for flow in [Flow::tcp4(), Flow::udp4(), Flow::tcp6(), Flow::udp6()] {
                let frame = |packet: &[u8]| [&ETHERNET4[..12], before, packet].concat();
                let mut octets = frame(&flow.with_partial_checksum(b"payload"));
                assert!(complete_hidden(&mut octets), "{before:X?} {flow:?}");
                assert_eq!(octets, frame(&flow.packet(b"payload")), "{before:X?} {flow:?}");
            }
        }
        let mut none = vec![0x45; 13];
        assert!(!complete_hidden(&mut none));
    }

    #[test]
    fn the_innermost_of_several_is_found() {
        let right = Flow::tcp4().packet(b"payload");
        let partial = Flow::tcp4().with_partial_checksum(b"payload");
        let nest = |content: &[u8], depth: usize| {
            (0..depth).fold(content.to_vec(), |content, _| wrap(&Flow::tcp4(), &Envelope::Protocol(4), &[], &content))
        };
        for depth in [2, 3, 9] {
            let mut packet = nest(&partial, depth);
            assert!(complete_inside(&mut packet));
            assert_eq!(packet, nest(&right, depth));
        }
        assert!(!complete_inside(&mut nest(&partial, 1000)));
    }

    #[test]
    fn what_is_complete_stays_and_what_is_no_packet_is_left_alone() {
        let right = wrap(&Flow::tcp4(), &Envelope::Port(4789), &ETHERNET4, &Flow::tcp4().packet(b"payload"));
        let mut packet = right.clone();
        assert!(!complete_inside(&mut packet));
        assert_eq!(packet, right);
        for length in 0..right.len() {
            complete_inside(&mut right[..length].to_vec());
        }
        let mut damaged = Flow::tcp4().with_partial_checksum(b"payload");
        damaged[9] ^= 1;
        let mut packet = wrap(&Flow::tcp4(), &Envelope::Protocol(4), &[], &damaged);
        assert!(!complete_inside(&mut packet), "a wrong checksum of the IP header");
    }
}
