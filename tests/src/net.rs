//! The parts of IPv4, ICMP and UDP that the bed needs to make packets and to read captures.

use std::net::Ipv4Addr;

/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

/// The Internet checksum (RFC 1071) over `octets`; 0 over octets that contain their own correct checksum.
pub fn checksum(octets: &[u8]) -> u16 {
    let mut sum: u32 = octets.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |&o| u32::from(o))).sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}

/// The parts of an Ethernet frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Source hardware address.
    pub source: [u8; 6],
    /// EtherType.
    pub kind: u16,
    /// Octets after the Ethernet header.
    pub payload: &'a [u8],
}

impl<'a> Frame<'a> {
    /// Parses a frame; `None` if it is shorter than an Ethernet header.
    pub fn parse(frame: &'a [u8]) -> Option<Self> {
        let (header, payload) = frame.split_at_checked(14)?;
        let source = header[6..12].try_into().ok()?;
        Some(Self { source, kind: u16::from_be_bytes([header[12], header[13]]), payload })
    }

    /// The IPv4 packet inside, without Ethernet's padding.
    pub fn ipv4(&self) -> Option<Ipv4<'a>> {
        (self.kind == ETHERTYPE_IPV4).then(|| Ipv4::parse(self.payload))?
    }
}

/// The parts of an IPv4 packet.
#[derive(Clone, Copy, Debug)]
pub struct Ipv4<'a> {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// Protocol number.
    pub protocol: u8,
    /// Octets after the header and its options.
    pub payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// Parses a packet; `None` if its lengths do not fit.
    pub fn parse(packet: &'a [u8]) -> Option<Self> {
        let &first = packet.first()?;
        let header = usize::from(first & 15) * 4;
        if first >> 4 != 4 || header < 20 || packet.len() < header {
            return None;
        }
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        Some(Self {
            source: Ipv4Addr::new(packet[12], packet[13], packet[14], packet[15]),
            destination: Ipv4Addr::new(packet[16], packet[17], packet[18], packet[19]),
            protocol: packet[9],
            payload: packet.get(header..total)?,
        })
    }

    /// The UDP datagram inside: source port, destination port, payload.
    pub fn udp(&self) -> Option<(u16, u16, &'a [u8])> {
        if self.protocol != UDP {
            return None;
        }
        let (header, payload) = self.payload.split_at_checked(8)?;
        Some((u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]]), payload))
    }
}

/// `length` octets that a test recognises: different for each `seed`, and never found in ciphertext by chance.
pub fn pattern(seed: u32, length: usize) -> Vec<u8> {
    MARKER.iter().copied().chain(seed.to_be_bytes()).cycle().take(length).collect()
}

/// The beginning of every payload of [`pattern`]; on the carrier it shows a leak.
pub const MARKER: &[u8] = b"in clear!";

/// Whether `octets` hold the [`MARKER`].
pub fn in_clear(octets: &[u8]) -> bool {
    octets.windows(MARKER.len()).any(|window| window == MARKER)
}

/// An ICMP echo request between these addresses.
pub fn echo_request([from, to]: [Ipv4Addr; 2], payload: &[u8]) -> Vec<u8> {
    let mut icmp = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1], payload].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = (20 + icmp.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, ICMP, 0, 0]);
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(icmp);
    packet
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_rfc_1071() {
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
        assert_eq!(checksum(&[0xFF]), !0xFF00);
    }

    #[test]
    fn the_padding_of_a_short_frame_is_no_payload() {
        let mut frame = vec![0; 60];
        frame[12..14].copy_from_slice(&ETHERTYPE_IPV4.to_be_bytes());
        frame[14] = 0x45;
        frame[17] = 30;
        frame[23] = UDP;
        let packet = Frame::parse(&frame).and_then(|f| f.ipv4()).expect("a whole packet");
        assert_eq!(packet.udp().expect("a whole datagram").2.len(), 2);
    }

    #[test]
    fn lengths_that_do_not_fit_are_no_packet() {
        let mut packet = [0; 20];
        packet[0] = 0x45;
        packet[3] = 21;
        assert!(Ipv4::parse(&packet).is_none());
        assert!(Ipv4::parse(&packet[..19]).is_none());
        assert!(Ipv4::parse(&[]).is_none());
    }

    #[test]
    fn a_pattern_is_recognised_as_clear_text() {
        assert!(in_clear(&[&[7; 30][..], &pattern(9, 40)].concat()));
        assert!(!in_clear(&[7; 300]));
    }
}
