//! Frames for the tests, built octet by octet.

use std::net::{IpAddr, SocketAddr};

pub(super) const ETHERNET: usize = 14;
pub(super) const IPV4: usize = 20;
pub(super) const IPV6: usize = 40;
pub(super) const UDP: usize = 8;
pub(super) const TCP: usize = 20;

const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// An Ethernet frame around an IP packet.
pub(super) fn ethernet(packet: &[u8]) -> Vec<u8> {
    let ethertype = if packet[0] >> 4 == 4 { [0x08, 0x00] } else { [0x86, 0xDD] };
    let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    frame.extend(ethertype);
    frame.extend(packet);
    frame
}

/// The frame with one more VLAN tag, outermost.
pub(super) fn tagged(frame: &[u8], tpid: [u8; 2]) -> Vec<u8> {
    let mut tagged = frame[..12].to_vec();
    tagged.extend(tpid);
    tagged.extend([0x00, 0x07]);
    tagged.extend(&frame[12..]);
    tagged
}

/// A frame with a UDP datagram to `to`.
pub(super) fn udp(to: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut segment = Vec::new();
    segment.extend(6543u16.to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend((UDP as u16 + payload.len() as u16).to_be_bytes());
    segment.extend([0, 0]);
    segment.extend(payload);
    ethernet(&ip(to.ip(), PROTOCOL_UDP, &segment))
}

/// A frame with a TCP segment to `to`, checksum complete. `options` are padded with END to a multiple of four.
pub(super) fn tcp(to: IpAddr, flags: u8, options: &[u8]) -> Vec<u8> {
    let mut options = options.to_vec();
    options.resize(options.len().next_multiple_of(4), 0);
    let mut segment = Vec::new();
    segment.extend(40_000u16.to_be_bytes());
    segment.extend(443u16.to_be_bytes());
    segment.extend(0x1234_5678u32.to_be_bytes());
    segment.extend([0; 4]);
    segment.extend([((TCP + options.len()) as u8 / 4) << 4, flags, 0xFF, 0xFF, 0, 0, 0, 0]);
    segment.extend(&options);
    let mut packet = ip(to, PROTOCOL_TCP, &segment);
    let at = packet.len() - segment.len();
    let sum = !tcp_sum(&packet, at);
    packet[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
    ethernet(&packet)
}

/// An IP packet around a transport segment.
fn ip(to: IpAddr, protocol: u8, segment: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    match to {
        IpAddr::V4(to) => {
            packet.extend([0x45, 0]);
            packet.extend((IPV4 as u16 + segment.len() as u16).to_be_bytes());
            packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0, 198, 51, 100, 1]);
            packet.extend(to.octets());
            let sum = !fold(words(&packet));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        IpAddr::V6(to) => {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((segment.len() as u16).to_be_bytes());
            packet.extend([protocol, 64]);
            packet.extend([0x20, 0x01, 0x0D, 0xB8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]);
            packet.extend(to.octets());
        }
    }
    packet.extend(segment);
    packet
}

/// Ones' complement sum of the pseudo-header and the TCP segment that starts at `at`: 0xFFFF if its checksum is right.
pub(super) fn tcp_sum(packet: &[u8], at: usize) -> u16 {
    fold(u32::from(pseudo_sum(packet, at)) + words(&packet[at..]))
}

/// Ones' complement sum of the TCP pseudo-header: the value of a partial checksum.
pub(super) fn pseudo_sum(packet: &[u8], at: usize) -> u16 {
    let addresses = if packet[0] >> 4 == 4 { &packet[12..20] } else { &packet[8..40] };
    fold(words(addresses) + u32::from(PROTOCOL_TCP) + (packet.len() - at) as u32)
}

fn words(octets: &[u8]) -> u32 {
    octets.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))).sum()
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xFFFF {
        sum = (sum >> 16) + (sum & 0xFFFF);
    }
    sum as u16
}

/// The source of the datagrams that [`udp`] makes for `to`.
pub(super) fn source(to: SocketAddr) -> SocketAddr {
    let ip: IpAddr = if to.is_ipv4() { [198, 51, 100, 1].into() } else { [0x2001, 0x0DB8, 0, 0, 0, 0, 0, 9].into() };
    (ip, 6543).into()
}
