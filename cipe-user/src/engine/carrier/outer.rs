//! Carrier headers: Ethernet, IPv4 or IPv6, and UDP around a sealed datagram, written and read as octets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

use crate::inner::checksum::{Sum, transport_checksum};
pub(crate) use crate::inner::ethernet::ETHERNET;
use crate::inner::headers::IpVersion;
pub(crate) use crate::inner::ip::{IPV4, IPV6};

/// Octets of a UDP header.
pub(crate) const UDP: usize = 8;

/// Offset of a new datagram or message in its frame: it leaves space for all headers.
pub(crate) const FRESH: usize = 256;

const _: () = assert!(FRESH >= ETHERNET + IPV6 + UDP + crate::sealed::packet::HEADROOM);

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERTYPE_IPV6: [u8; 2] = [0x86, 0xDD];
const PROTOCOL_UDP: u8 = 17;
const DONT_FRAGMENT: u8 = 0x40;

/// The link-layer addresses of one hop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Source MAC address.
    pub source: [u8; 6],
    /// Destination MAC address.
    pub destination: [u8; 6],
}

/// Header fields of a datagram beside its addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether to set IPv4's don't-fragment flag.
    pub dont_fragment: bool,
}

/// Returns the octets of Ethernet, IP and UDP headers in front of a datagram to `peer`.
pub fn room(peer: IpAddr) -> usize {
    let ip = if peer.is_ipv4() { IPV4 } else { IPV6 };
    ETHERNET + ip + UDP
}

/// An Ethernet header.
pub(crate) fn ethernet(hop: Hop, is_ipv4: bool) -> [u8; ETHERNET] {
    let mut header = [0; ETHERNET];
    write_ethernet(&mut header, ETHERNET, hop, is_ipv4);
    header
}

/// Writes an Ethernet header in front of the IP packet at `at`, which is at least [`ETHERNET`].
pub(crate) fn write_ethernet(chunk: &mut [u8], at: usize, hop: Hop, is_ipv4: bool) {
    let header = &mut chunk[at - ETHERNET..at];
    header[..6].copy_from_slice(&hop.destination);
    header[6..12].copy_from_slice(&hop.source);
    header[12..].copy_from_slice(if is_ipv4 { &ETHERTYPE_IPV4 } else { &ETHERTYPE_IPV6 });
}

/// Writes Ethernet, IP and UDP headers in front of the datagram at `datagram`. Returns the start of the frame.
///
/// `from` and `to` always have the same IP version: the engine chooses `from` by a route to `to`. `ip_id` is the IPv4
/// id. Over IPv6 the UDP checksum is always written (RFC 8200, section 8.1), over IPv4 only if `checksum`.
pub fn write_frame(
    chunk: &mut [u8],
    datagram: Range<usize>,
    hop: Hop,
    (from, to): (SocketAddr, SocketAddr),
    marks: Marks,
    ip_id: u16,
    checksum: bool,
) -> usize {
    let udp_len = (datagram.len() + UDP) as u16;
    let udp = datagram.start - UDP;
    chunk[udp..udp + 2].copy_from_slice(&from.port().to_be_bytes());
    chunk[udp + 2..udp + 4].copy_from_slice(&to.port().to_be_bytes());
    chunk[udp + 4..udp + 6].copy_from_slice(&udp_len.to_be_bytes());
    chunk[udp + 6..udp + 8].copy_from_slice(&[0, 0]);
    let (version, ip) = match (from.ip(), to.ip()) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let ip = udp - IPV6;
            let header = &mut chunk[ip..udp];
            header[0] = 0x60 | marks.tos >> 4;
            header[1] = marks.tos << 4;
            header[2..4].copy_from_slice(&[0, 0]);
            header[4..6].copy_from_slice(&udp_len.to_be_bytes());
            header[6] = PROTOCOL_UDP;
            header[7] = marks.ttl;
            header[8..24].copy_from_slice(&source.octets());
            header[24..40].copy_from_slice(&destination.octets());
            (IpVersion::V6, ip)
        }
        (source, destination) => {
            let ip = udp - IPV4;
            let header = &mut chunk[ip..udp];
            header[0] = 0x45;
            header[1] = marks.tos;
            header[2..4].copy_from_slice(&(udp_len + IPV4 as u16).to_be_bytes());
            header[4..6].copy_from_slice(&ip_id.to_be_bytes());
            header[6] = if marks.dont_fragment { DONT_FRAGMENT } else { 0 };
            header[7] = 0;
            header[8] = marks.ttl;
            header[9] = PROTOCOL_UDP;
            header[10..12].copy_from_slice(&[0, 0]);
            header[12..16].copy_from_slice(&ipv4(source).octets());
            header[16..20].copy_from_slice(&ipv4(destination).octets());
            let mut sum = Sum::default();
            sum.add(header);
            header[10..12].copy_from_slice(&sum.checksum());
            (IpVersion::V4, ip)
        }
    };
    if checksum || to.is_ipv6() {
        let mut sum = Sum::pseudo_header(version, &chunk[ip..udp], PROTOCOL_UDP, udp_len.into());
        sum.add(&chunk[udp..datagram.end]);
        chunk[udp + 6..udp + 8].copy_from_slice(&transport_checksum(sum, PROTOCOL_UDP));
    }
    write_ethernet(chunk, ip, hop, to.is_ipv4());
    ip - ETHERNET
}

fn ipv4(address: IpAddr) -> Ipv4Addr {
    match address {
        IpAddr::V4(address) => address,
        IpAddr::V6(address) => address.to_ipv4_mapped().unwrap_or(Ipv4Addr::UNSPECIFIED),
    }
}

/// A UDP datagram inside a carrier frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CarrierDatagram {
    /// Its source. The zone of a link-local address is not in the headers.
    pub from: SocketAddr,
    /// The local address that it was sent to, also without a zone.
    pub to: SocketAddr,
    /// TOS or traffic class.
    pub tos: u8,
    /// Range of the UDP payload in the frame.
    pub payload: Range<usize>,
}

/// Finds the UDP datagram in a whole Ethernet frame: up to two VLAN tags, IPv4 without options or IPv6 without
/// extension headers, no fragment. Returns `None` for all other frames; the XDP program redirects only such frames.
pub fn parse_frame(frame: &[u8]) -> Option<CarrierDatagram> {
    parse_front(frame).filter(|datagram| datagram.payload.end <= frame.len())
}

/// Does the same in the first piece of a frame; the payload may continue behind it.
pub fn parse_front(frame: &[u8]) -> Option<CarrierDatagram> {
    let mut at = 12;
    let mut ethertype: [u8; 2] = frame.get(at..at + 2)?.try_into().ok()?;
    for _ in 0..2 {
        if !matches!(ethertype, [0x81, 0x00] | [0x88, 0xA8]) {
            break;
        }
        at += 4;
        ethertype = frame.get(at..at + 2)?.try_into().ok()?;
    }
    let ip = at + 2;
    let (udp, source, destination, tos) = match ethertype {
        ETHERTYPE_IPV4 => {
            let header: &[u8; IPV4] = frame.get(ip..ip + IPV4)?.try_into().ok()?;
            let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3FFF != 0;
            if header[0] != 0x45 || fragment || header[9] != PROTOCOL_UDP {
                return None;
            }
            let [a, b, c, d] = [12, 13, 14, 15].map(|i| header[i]);
            let [e, f, g, h] = [16, 17, 18, 19].map(|i| header[i]);
            (ip + IPV4, Ipv4Addr::new(a, b, c, d).into(), Ipv4Addr::new(e, f, g, h).into(), header[1])
        }
        ETHERTYPE_IPV6 => {
            let header: &[u8; IPV6] = frame.get(ip..ip + IPV6)?.try_into().ok()?;
            if header[0] >> 4 != 6 || header[6] != PROTOCOL_UDP {
                return None;
            }
            let source: [u8; 16] = header[8..24].try_into().ok()?;
            let destination: [u8; 16] = header[24..40].try_into().ok()?;
            let class = header[0] << 4 | header[1] >> 4;
            (ip + IPV6, IpAddr::V6(Ipv6Addr::from(source)), IpAddr::V6(Ipv6Addr::from(destination)), class)
        }
        _ => return None,
    };
    let header: &[u8; UDP] = frame.get(udp..udp + UDP)?.try_into().ok()?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if length < UDP {
        return None;
    }
    Some(CarrierDatagram {
        from: SocketAddr::new(source, u16::from_be_bytes([header[0], header[1]])),
        to: SocketAddr::new(destination, u16::from_be_bytes([header[2], header[3]])),
        tos,
        payload: udp + UDP..udp + length,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOP: Hop = Hop { source: [2, 0, 0, 0, 0, 1], destination: [2, 0, 0, 0, 0, 2] };
    const MARKS: Marks = Marks { tos: 0xB8, ttl: 63, dont_fragment: true };

    fn sum_of(mut sum: Sum, octets: &[u8]) -> [u8; 2] {
        sum.add(octets);
        sum.folded()
    }

    fn roundtrip(from: &str, to: &str, checksum: bool) -> Vec<u8> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse().unwrap(), to.parse().unwrap());
        let mut chunk = vec![0; 200];
        let at = room(to.ip());
        for (index, octet) in chunk.iter_mut().enumerate().skip(at) {
            *octet = index as u8;
        }
        let end = at + 33;
        let start = write_frame(&mut chunk, at..end, HOP, (from, to), MARKS, 7, checksum);
        assert_eq!(start, 0);
        let frame = chunk[..end].to_vec();
        assert_eq!(parse_frame(&frame), Some(CarrierDatagram { from, to, tos: MARKS.tos, payload: at..end }));
        frame
    }

    #[test]
    fn an_ipv4_frame_reads_back_and_its_header_sums_to_all_ones() {
        let frame = roundtrip("192.0.2.1:6789", "198.51.100.2:6790", false);
        assert_eq!(sum_of(Sum::default(), &frame[ETHERNET..ETHERNET + IPV4]), [0xFF; 2]);
        assert_eq!(frame[ETHERNET + IPV4 + 6..][..2], [0, 0], "no UDP checksum unless asked for");
        assert_eq!((frame[15], frame[22], frame[20]), (0xB8, 63, 0x40));
    }

    #[test]
    fn a_udp_checksum_is_right_over_both_families() {
        for (from, to) in [("192.0.2.1:6789", "198.51.100.2:6790"), ("[2001:db8::1]:1", "[2001:db8::2]:2")] {
            let frame = roundtrip(from, to, true);
            let udp = frame.len() - 33 - UDP;
            let version = if frame[12] == 8 { IpVersion::V4 } else { IpVersion::V6 };
            let pseudo = Sum::pseudo_header(version, &frame[ETHERNET..udp], PROTOCOL_UDP, 33 + 8);
            assert_eq!(sum_of(pseudo, &frame[udp..]), [0xFF; 2]);
        }
    }

    #[test]
    fn tagged_frames_are_read_and_fragments_options_and_runts_are_not() {
        let frame = roundtrip("192.0.2.1:6789", "198.51.100.2:6790", false);
        let mut tagged = frame[..12].to_vec();
        tagged.extend([0x81, 0x00, 0, 100]);
        tagged.extend(&frame[12..]);
        assert_eq!(parse_frame(&tagged).map(|d| d.payload.len()), Some(33));
        for (index, value) in [(20, 0x20), (21, 1), (14, 0x46), (23, 6), (38, 1), (39, 7)] {
            let mut other = frame.clone();
            other[index] = value;
            assert_eq!(parse_frame(&other), None, "octet {index}");
        }
        for length in 0..frame.len() {
            assert_eq!(parse_frame(&frame[..length]), None);
            let payload_begun = length >= frame.len() - 33;
            assert_eq!(parse_front(&frame[..length]), parse_frame(&frame).filter(|_| payload_begun));
        }
    }
}
