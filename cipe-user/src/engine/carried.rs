//! Where a tunnel through the tunnel (IP in IP, GRE, VXLAN, Geneve) carries an IP packet.
//!
//! The local stack leaves the checksum of the *innermost* transport header to the device, so whoever completes it must
//! find that one. (VXLAN over a device that offers checksums, kernel 6.18: partial inside, complete outside.)

use super::headers::{Headers, UDP};

const IP_IN_IP: u8 = 4;
const IPV6_IN_IP: u8 = 41;
const GRE: u8 = 47;

/// UDP ports: that of RFC 7348, and the one that Linux took before.
const VXLAN: [u16; 2] = [4789, 8472];
/// UDP port of RFC 8926.
const GENEVE: u16 = 6081;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86DD;
/// Ethernet frames in GRE and Geneve.
const BRIDGED: u16 = 0x6558;

/// The offset in `packet` of the IP packet that it carries, if it is of a kind that is known here.
pub fn carried(packet: &[u8], headers: &Headers) -> Option<usize> {
    if headers.fragment {
        return None;
    }
    let at = headers.transport;
    match headers.protocol {
        IP_IN_IP | IPV6_IN_IP => Some(at),
        GRE => gre(packet, at),
        UDP => match word(packet, at + 2)? {
            port if VXLAN.contains(&port) => behind_type(packet, BRIDGED, at + 16),
            // Behind 8 octets of UDP and 8 of Geneve, options in words of 4.
            GENEVE => {
                let options = usize::from(packet.get(at + 8)? & 0x3F) * 4;
                behind_type(packet, word(packet, at + 10)?, at + 16 + options)
            }
            _ => None,
        },
        _ => None,
    }
}

/// RFC 2784 and 2890: four octets each for a checksum, a key and a sequence number, where flagged.
fn gre(packet: &[u8], at: usize) -> Option<usize> {
    let flags = word(packet, at)?;
    if flags & 0x4007 != 0 {
        return None;
    }
    let optional = [0x8000, 0x2000, 0x1000].iter().filter(|flag| flags & **flag != 0).count();
    behind_type(packet, word(packet, at + 2)?, at + 4 + optional * 4)
}

/// The IP packet at `at`, of the kind `ethertype`; or in the Ethernet frame that stands there.
fn behind_type(packet: &[u8], ethertype: u16, at: usize) -> Option<usize> {
    match ethertype {
        ETHERTYPE_IPV4 | ETHERTYPE_IPV6 => Some(at),
        BRIDGED if matches!(word(packet, at + 12)?, ETHERTYPE_IPV4 | ETHERTYPE_IPV6) => Some(at + 14),
        _ => None,
    }
}

fn word(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::checksum::complete_partial;
    use crate::engine::testpackets::Flow;

    const ETHERNET4: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x08, 0x00];
    const ETHERNET6: [u8; 14] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x86, 0xDD];

    /// A packet of `protocol`, or to a UDP port, around `content`.
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
    fn checksums_are_completed_inside_tunnels() {
        use Envelope::{Port, Protocol};
        let vxlan = [8, 0, 0, 0, 0, 0, 5, 0];
        let cases: [(&str, Envelope, Vec<u8>, Flow); 10] = [
            ("IP in IP", Protocol(4), vec![], Flow::tcp4()),
            ("IPv6 in IP", Protocol(41), vec![], Flow::tcp6()),
            ("GRE", Protocol(47), vec![0, 0, 8, 0], Flow::udp4()),
            ("GRE, IPv6", Protocol(47), vec![0, 0, 0x86, 0xDD], Flow::udp6()),
            ("GRE with all fields", Protocol(47), [vec![0xB0, 0, 8, 0], vec![7; 12]].concat(), Flow::tcp4()),
            ("GRE, bridged", Protocol(47), [&[0x20, 0, 0x65, 0x58, 0, 0, 0, 1][..], &ETHERNET4].concat(), Flow::tcp4()),
            ("VXLAN", Port(4789), [&vxlan[..], &ETHERNET4].concat(), Flow::tcp4()),
            ("VXLAN, Linux", Port(8472), [&vxlan[..], &ETHERNET6].concat(), Flow::tcp6()),
            ("Geneve", Port(6081), vec![1, 0, 0x86, 0xDD, 0, 0, 5, 0, 9, 9, 9, 9], Flow::udp6()),
            ("Geneve, bridged", Port(6081), [&[0, 0, 0x65, 0x58, 0, 0, 5, 0][..], &ETHERNET4].concat(), Flow::tcp4()),
        ];
        for (what, envelope, header, inner) in cases {
            for outer in [Flow::tcp4(), Flow::tcp6(), Flow { ip_options: 2, ..Flow::tcp4() }] {
                let (partial, right) = (inner.with_partial_checksum(b"payload"), inner.packet(b"payload"));
                let expected = wrap(&outer, &envelope, &header, &right);
                // The checksum of the envelope is the one that it has when all is complete (local checksum offload).
                let mut packet = expected.clone();
                let at = packet.len() - partial.len();
                packet[at..].copy_from_slice(&partial);
                assert!(complete_partial(&mut packet), "{what}");
                assert_eq!(packet, expected, "{what}");
            }
        }
    }

    #[test]
    fn other_contents_are_left_alone() {
        use Envelope::{Port, Protocol};
        let content = Flow::tcp4().with_partial_checksum(b"payload");
        let cases: [(&str, Envelope, &[u8]); 5] = [
            ("ESP", Protocol(50), &[]),
            ("GRE with a route", Protocol(47), &[0x40, 0, 8, 0]),
            ("PPTP", Protocol(47), &[0x20, 1, 8, 0, 0, 0, 0, 0]),
            ("GRE of something else", Protocol(47), &[0, 0, 0x88, 0x0B]),
            ("another port", Port(4790), &[8, 0, 0, 0, 0, 0, 5, 0]),
        ];
        for (what, envelope, header) in cases {
            let mut packet = wrap(&Flow::tcp4(), &envelope, header, &content);
            let before = packet.clone();
            assert!(!complete_partial(&mut packet), "{what}");
            assert_eq!(packet, before, "{what}");
        }
    }

    #[test]
    fn tunnels_in_tunnels_end_somewhere() {
        let right = Flow::tcp4().packet(b"payload");
        let partial = Flow::tcp4().with_partial_checksum(b"payload");
        let nest = |content: &[u8], depth: usize| {
            (0..depth).fold(content.to_vec(), |content, _| wrap(&Flow::tcp4(), &Envelope::Protocol(4), &[], &content))
        };
        for depth in [2, 3] {
            let mut packet = nest(&partial, depth);
            assert!(complete_partial(&mut packet));
            assert_eq!(packet, nest(&right, depth));
        }
        complete_partial(&mut nest(&partial, 1000));
    }
}
