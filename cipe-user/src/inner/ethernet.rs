//! Ethernet frames as payloads (protocol 4): their headers, VLAN tags and MPLS labels, and how to tell a frame from an
//! IP packet.
//!
//! Pure functions over slices. They accept any octets and never panic.

use crate::inner::headers::{Headers, IpVersion};
use crate::inner::ip;
use crate::inner::payload::PayloadHeaders;

/// Octets of an Ethernet header.
pub const ETHERNET: usize = 14;

const IPV4: [u8; 2] = [0x08, 0x00];
const IPV6: [u8; 2] = [0x86, 0xDD];
const ARP: [u8; 2] = [0x08, 0x06];
/// Start of an ARP packet for IPv4 over Ethernet: hardware type, protocol, and the lengths of both addresses (RFC 826).
const ARP_ETHERNET: [u8; 6] = [0x00, 0x01, 0x08, 0x00, 6, 4];
/// Ethertypes of VLAN tags: IEEE 802.1Q and 802.1ad.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xA8]];
/// Octets of a VLAN tag, ethertype included.
const TAG: usize = 4;
/// Maximum VLAN tags that a reader of frames skips.
const MOST_TAGS: usize = 2;

/// Maximum VLAN tags that the kernel skips (`VLAN_MAX_DEPTH`).
const KERNEL_TAGS: usize = 8;
/// Ethertypes of MPLS, unicast and multicast.
const MPLS: [[u8; 2]; 2] = [[0x88, 0x47], [0x88, 0x48]];
/// Octets of one entry of the MPLS label stack.
const LABEL: usize = 4;
/// The bit in an entry's third octet that marks the last entry.
const BOTTOM_OF_STACK: u8 = 0x01;

/// An Ethernet header and the tags behind it.
#[derive(Clone, Copy)]
struct Link {
    octets: u8,
    ethertype: [u8; 2],
}

impl Link {
    /// Reads the header of a frame; `None` where there is none.
    #[inline(always)]
    fn parse(frame: &[u8]) -> Option<Self> {
        let mut octets = ETHERNET;
        let mut ethertype = *frame.get(octets - 2..)?.first_chunk()?;
        for _ in 0..MOST_TAGS {
            let behind = frame.get(octets + TAG - 2..).and_then(<[u8]>::first_chunk);
            let Some(behind) = behind.filter(|_| TAGS.contains(&ethertype)) else { break };
            ethertype = *behind;
            octets += TAG;
        }
        Some(Self { octets: octets as u8, ethertype })
    }

    /// Whether it says that such an IP packet follows.
    fn announces(&self, ip: &Headers) -> bool {
        self.ethertype == if ip.version == IpVersion::V4 { IPV4 } else { IPV6 }
    }
}

/// Reads what a frame carries, from its destination address on and without its FCS: an IP packet that is whole, or something else.
/// `None` where there is no Ethernet header.
#[inline(always)]
pub fn read(frame: &[u8]) -> Option<PayloadHeaders> {
    let link = Link::parse(frame)?;
    let content = frame.get(link.octets.into()..).unwrap_or_default();
    let ip = [IPV4, IPV6].contains(&link.ethertype).then(|| Headers::parse(content).ok()).flatten();
    let ip = ip.filter(|ip| ip.total() <= content.len() && link.announces(ip));
    Some(PayloadHeaders::of_frame(link.octets, ip))
}

/// What [`read`] would say of a frame that is whole. Its IP headers stand `header` octets behind its begin, and were read before.
pub fn read_before(frame: &[u8], header: usize, ip: Headers) -> Option<PayloadHeaders> {
    let link = Link::parse(frame)?;
    let is_there = usize::from(link.octets) == header && link.announces(&ip);
    Some(PayloadHeaders::of_frame(link.octets, is_there.then_some(ip)))
}

/// Returns the octets before the IP packet in a frame with up to 8 VLAN tags and any MPLS labels (RFC 3032). The
/// segments of a superframe repeat these octets unchanged. Returns `None` for a frame with any other header.
pub fn link_header(frame: &[u8]) -> Option<usize> {
    let mut header = ETHERNET;
    let mut ethertype = *frame.get(header - 2..)?.first_chunk()?;
    for _ in 0..KERNEL_TAGS {
        if !TAGS.contains(&ethertype) {
            break;
        }
        header += TAG;
        ethertype = *frame.get(header - 2..)?.first_chunk()?;
    }
    if [IPV4, IPV6].contains(&ethertype) {
        return Some(header);
    }
    if !MPLS.contains(&ethertype) {
        return None;
    }
    loop {
        let label: &[u8; LABEL] = frame.get(header..)?.first_chunk()?;
        header += LABEL;
        if label[2] & BOTTOM_OF_STACK != 0 {
            return Some(header);
        }
    }
}

/// Whether a payload is a frame beyond doubt: one that carries IP or ARP. `read` is what [`read`] says of it.
pub fn is_surely_frame(payload: &[u8], read: Option<&PayloadHeaders>) -> bool {
    read.is_some_and(|headers| {
        let carries_arp = || {
            let content = payload.get(headers.link()..).unwrap_or_default();
            let is_arp = payload.get(..headers.link()).is_some_and(|link| link.ends_with(&ARP));
            is_arp && content.starts_with(&ARP_ETHERNET)
        };
        headers.ip().is_some() || carries_arp()
    })
}

/// Whether a payload is an IP packet to the octet, and reads as no frame that is known here. A frame that is addressed to a
/// device of the address 6x:xx:xx:xx:LL:LL looks so, too, if the last two octets are its length less 40.
pub fn is_bare_ip(payload: &[u8], read: Option<&PayloadHeaders>) -> bool {
    matches!(payload.first().map(|first| first >> 4), Some(4 | 6))
        && !is_surely_frame(payload, read)
        && ip::check(payload).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::test_packets::Flow;

    const MACS: [u8; 12] = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];

    fn is_bare_ip(payload: &[u8]) -> bool {
        super::is_bare_ip(payload, read(payload).as_ref())
    }

    fn is_surely_frame(payload: &[u8]) -> bool {
        super::is_surely_frame(payload, read(payload).as_ref())
    }

    fn frame(header: &[u8], content: &[u8]) -> Vec<u8> {
        [&MACS, header, content].concat()
    }

    #[test]
    fn the_packet_is_found_behind_tags_and_before_padding() {
        for (flow, ethertype) in [(Flow::tcp4(), IPV4), (Flow::udp6(), IPV6)] {
            let packet = flow.packet(b"payload");
            for tags in [&[][..], &[0x81, 0, 0x20, 5], &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 5]] {
                let octets = frame(&[tags, &ethertype].concat(), &packet);
                let mut found = read(&octets).unwrap();
                let headers = Headers::parse(&packet).unwrap();
                assert_eq!((found.link(), found.is_tagged()), (ETHERNET + tags.len(), !tags.is_empty()));
                assert_eq!(found.packet(&octets), Some((&packet[..], &headers)));
                assert_eq!(
                    found.packet_mut(&mut octets.clone()),
                    Some((&mut packet.clone()[..], &mut headers.clone()))
                );
                assert_eq!(found.plain_packet(&octets).is_some(), tags.is_empty());
                let padded = [&octets[..], &[0; 9]].concat();
                assert_eq!((read(&padded), found.plain_packet(&padded)), (Some(found), None));
                assert_eq!(read_before(&octets, found.link(), headers), Some(found));
                assert_eq!(read_before(&octets, found.link() + 4, headers).unwrap().ip(), None, "behind more");
            }
        }
    }

    #[test]
    fn a_packet_is_found_behind_tags_and_labels_and_nothing_else() {
        let vlan = [0x81, 0, 0, 5];
        for (header, before) in [
            (vec![], Some(14)),
            (vlan.to_vec(), Some(18)),
            (vlan.repeat(8), Some(46)),
            (vlan.repeat(9), None),
            ([&vlan[..], &[0x88, 0x47, 0, 1, 0x20, 64, 0, 1, 0x31, 64]].concat(), Some(26)),
            (vec![0x88, 0x48, 0, 1, 0x21, 64], Some(18)),
            // PPPoE: its header has a length field.
            (vec![0x88, 0x64, 0x11, 0, 0, 1, 0, 50, 0, 0x21], None),
        ] {
            let ethertype: &[u8] = if header.contains(&0x88) { &[] } else { &IPV4 };
            let octets = frame(&[&header[..], ethertype].concat(), &[0x45; 40]);
            assert_eq!(link_header(&octets), before, "{header:X?}");
        }
        assert_eq!(link_header(&frame(&[0x88, 0x47, 0, 1, 0x20, 64], &[])), None, "no last label");
    }

    #[test]
    fn what_the_ethertype_does_not_say_is_no_ip() {
        let packet = Flow::tcp4().packet(b"payload");
        for (header, content) in [(IPV6, &packet[..]), (ARP, &packet), (IPV4, &packet[..packet.len() - 1]), (IPV4, &[])]
        {
            assert_eq!(read(&frame(&header, content)).unwrap().ip(), None);
        }
        let ip = Headers::parse(&packet).unwrap();
        assert_eq!(read_before(&frame(&IPV6, &packet), ETHERNET, ip).unwrap().ip(), None);
        assert_eq!((read(&MACS), read_before(&MACS, ETHERNET, ip)), (None, None));
    }

    #[test]
    fn frames_and_bare_packets_are_told_apart() {
        let arp = [&ARP_ETHERNET[..], &[0; 22]].concat();
        for packet in [Flow::tcp4(), Flow::udp4(), Flow::tcp6(), Flow::udp6()].map(|flow| flow.packet(b"payload")) {
            assert!(is_bare_ip(&packet) && !is_surely_frame(&packet));
            let ethertype = if packet[0] >> 4 == 4 { IPV4 } else { IPV6 };
            let octets = frame(&ethertype, &packet);
            assert!(!is_bare_ip(&octets) && is_surely_frame(&octets));
        }
        assert!(is_surely_frame(&frame(&ARP, &arp)));
        for octets in
            [frame(&ARP, &arp), frame(&[0x88, 0xB5], &[0x45; 46]), frame(&[0x81, 0, 0, 5], &arp), vec![0x45; 10]]
        {
            assert!(!is_bare_ip(&octets));
        }
    }

    #[test]
    fn a_frame_to_an_address_that_looks_like_an_ip_header_is_a_frame_if_it_carries_ip() {
        let packet = Flow::udp4().packet(b"payload");
        let mut octets = frame(&IPV4, &packet);
        let length = (octets.len() - 40) as u16;
        octets[0] = 0x60;
        octets[4..6].copy_from_slice(&length.to_be_bytes());
        assert!(ip::check(&octets).is_ok(), "it reads as an IPv6 packet");
        assert!(!is_bare_ip(&octets));
    }

    proptest! {
        #[test]
        fn any_octets_get_an_answer(
            octets in prop::collection::vec(any::<u8>(), 0..120),
            ethertype in prop_oneof![Just(IPV4), Just(IPV6), Just(ARP), Just(TAGS[0]), Just(TAGS[1]), any::<[u8; 2]>()],
        ) {
            let mut octets = octets;
            if let Some(place) = octets.get_mut(12..14) {
                place.copy_from_slice(&ethertype);
            }
            if let Some(found) = read(&octets) {
                prop_assert!(found.link() <= octets.len());
                prop_assert!(found.packet(&octets).is_none_or(|(packet, headers)| headers.total() <= packet.len()));
            }
            is_bare_ip(&octets);
        }
    }
}
