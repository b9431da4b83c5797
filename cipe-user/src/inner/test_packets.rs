//! Inner packets for tests, built with slow code that is obviously correct.

use std::net::IpAddr;

use proptest::prelude::*;

use crate::inner::headers::{TCP, UDP};

/// The fields of a TCP or UDP packet.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub protocol: u8,
    pub ports: [u16; 2],
    pub tos: u8,
    pub ttl: u8,
    /// IPv4 only.
    pub dont_fragment: bool,
    /// IPv4 only.
    pub id: u16,
    /// 32-bit words of IPv4 options, or 64-bit words of an IPv6 destination options header.
    pub ip_options: usize,
    pub sequence: u32,
    pub ack: u32,
    pub flags: u8,
    pub window: u16,
    /// TCP options, a multiple of four octets.
    pub options: Vec<u8>,
}

impl Flow {
    pub(crate) fn tcp4() -> Self {
        Self {
            source: [192, 0, 2, 1].into(),
            destination: [198, 51, 100, 2].into(),
            protocol: TCP,
            ports: [40_000, 5201],
            tos: 0,
            ttl: 63,
            dont_fragment: true,
            id: 0x1234,
            ip_options: 0,
            sequence: 1_000_000,
            ack: 77,
            flags: 0x10,
            window: 501,
            options: vec![1, 1, 8, 10, 0, 0, 1, 2, 0, 0, 3, 4],
        }
    }

    pub(crate) fn tcp6() -> Self {
        let [source, destination] = [1, 2].map(|host| [0x2001, 0xDB8, 0, 0, 0xFFFF, 0, 0, host].into());
        Self { source, destination, ..Self::tcp4() }
    }

    pub(crate) fn udp4() -> Self {
        Self { protocol: UDP, ..Self::tcp4() }
    }

    pub(crate) fn udp6() -> Self {
        Self { protocol: UDP, ..Self::tcp6() }
    }

    pub(crate) fn any() -> impl Strategy<Value = Self> {
        let kind = prop::sample::select(vec![Self::tcp4(), Self::tcp6(), Self::udp4(), Self::udp6()]);
        let ip = (any::<u8>(), any::<u8>(), any::<bool>(), any::<u16>(), 0usize..=10);
        let tcp = (any::<u32>(), any::<u32>(), any::<u8>(), any::<u16>(), 0usize..=10, any::<[u16; 2]>());
        (kind, ip, tcp).prop_map(|(kind, ip, tcp)| Self {
            tos: ip.0,
            ttl: ip.1,
            dont_fragment: ip.2,
            id: ip.3,
            ip_options: ip.4,
            sequence: tcp.0,
            ack: tcp.1,
            flags: tcp.2,
            window: tcp.3,
            options: (0..tcp.4 * 4).map(|at| at as u8 ^ 0x55).collect(),
            ports: tcp.5,
            ..kind
        })
    }

    pub(crate) fn v6(&self) -> bool {
        self.source.is_ipv6()
    }

    pub(crate) fn transport_header_len(&self) -> usize {
        if self.protocol == UDP { 8 } else { 20 + self.options.len() }
    }

    /// Offset of the checksum field in the transport header.
    pub(crate) fn checksum_field(&self) -> usize {
        if self.protocol == UDP { 6 } else { 16 }
    }

    /// Offset of the transport header.
    pub(crate) fn transport(&self) -> usize {
        if self.v6() { 40 + self.ip_options * 8 } else { 20 + self.ip_options * 4 }
    }

    /// The packet with all checksums right.
    pub(crate) fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.without_checksum(payload);
        let summed = [self.pseudo_header(&packet), packet[self.transport()..].to_vec()].concat();
        let checksum = match !naive_sum(&summed) {
            0 if self.protocol == UDP => 0xFFFF,
            checksum => checksum,
        };
        self.set_checksum(&mut packet, checksum);
        packet
    }

    /// The packet as the local stack sends it to a device that computes checksums.
    pub(crate) fn with_partial_checksum(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.without_checksum(payload);
        let sum = naive_sum(&self.pseudo_header(&packet));
        self.set_checksum(&mut packet, sum);
        packet
    }

    /// An IP packet of this protocol with these octets as content.
    pub(crate) fn carrying(&self, content: &[u8]) -> Vec<u8> {
        [self.ip_header(content.len()), content.to_vec()].concat()
    }

    /// The packets that a sender without segmentation offload would have sent.
    pub(crate) fn segments(&self, payload: &[u8], size: usize) -> Vec<Vec<u8>> {
        let chunks: Vec<&[u8]> = if payload.is_empty() { vec![payload] } else { payload.chunks(size).collect() };
        let last = chunks.len() - 1;
        let segment = |(index, chunk): (usize, &&[u8])| {
            let mut flow = self.clone();
            flow.id = self.id.wrapping_add(index as u16);
            flow.sequence = self.sequence.wrapping_add((index * size) as u32);
            // CWR stays on the first segment only, PSH and FIN on the last only.
            flow.flags &= if index == 0 { 0xFF } else { 0x7F };
            flow.flags &= if index == last { 0xFF } else { 0xF6 };
            flow.packet(chunk)
        };
        chunks.iter().enumerate().map(segment).collect()
    }

    fn set_checksum(&self, packet: &mut [u8], checksum: u16) {
        let at = self.transport() + self.checksum_field();
        packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }

    fn pseudo_header(&self, packet: &[u8]) -> Vec<u8> {
        let addresses = if self.v6() { &packet[8..40] } else { &packet[12..20] };
        let len = (packet.len() - self.transport()) as u32;
        [addresses, &len.to_be_bytes(), &[0, 0, 0, self.protocol]].concat()
    }

    fn without_checksum(&self, payload: &[u8]) -> Vec<u8> {
        let transport_len = self.transport_header_len() + payload.len();
        let mut packet = self.ip_header(transport_len);
        packet.extend(self.ports.iter().flat_map(|port| port.to_be_bytes()));
        if self.protocol == UDP {
            packet.extend((transport_len as u16).to_be_bytes());
            packet.extend([0, 0]);
        } else {
            packet.extend(self.sequence.to_be_bytes());
            packet.extend(self.ack.to_be_bytes());
            packet.extend([(self.transport_header_len() * 4) as u8, self.flags]);
            packet.extend(self.window.to_be_bytes());
            packet.extend([0; 4]);
            packet.extend(&self.options);
        }
        packet.extend(payload);
        packet
    }

    fn ip_header(&self, transport_len: usize) -> Vec<u8> {
        if self.v6() { self.v6_header(transport_len) } else { self.v4_header(transport_len) }
    }

    fn v4_header(&self, transport_len: usize) -> Vec<u8> {
        let (IpAddr::V4(source), IpAddr::V4(destination)) = (self.source, self.destination) else {
            panic!("addresses of two IP versions")
        };
        let mut header = vec![0x45 + self.ip_options as u8, self.tos];
        header.extend(((20 + self.ip_options * 4 + transport_len) as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend([if self.dont_fragment { 0x40 } else { 0 }, 0, self.ttl, self.protocol, 0, 0]);
        header.extend(source.octets());
        header.extend(destination.octets());
        header.resize(header.len() + self.ip_options * 4, 1);
        let checksum = !naive_sum(&header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
        header
    }

    fn v6_header(&self, transport_len: usize) -> Vec<u8> {
        let (IpAddr::V6(source), IpAddr::V6(destination)) = (self.source, self.destination) else {
            panic!("addresses of two IP versions")
        };
        let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, 0x12, 0x34];
        header.extend(((self.ip_options * 8 + transport_len) as u16).to_be_bytes());
        header.extend([if self.ip_options > 0 { 60 } else { self.protocol }, self.ttl]);
        header.extend(source.octets());
        header.extend(destination.octets());
        if self.ip_options > 0 {
            // Destination options: one padding option fills them.
            let pad = self.ip_options * 8 - 4;
            header.extend([self.protocol, self.ip_options as u8 - 1, 1, pad as u8]);
            header.resize(header.len() + pad, 0);
        }
        header
    }
}

/// The one's complement sum by the definition of RFC 1071.
pub(crate) fn naive_sum(octets: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in octets.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// Whether the checksums of a TCP or UDP packet without IP options are right.
pub(crate) fn checksums_are_right(packet: &[u8]) -> bool {
    let v6 = packet[0] >> 4 == 6;
    let (transport, protocol) = if v6 { (40, packet[6]) } else { (20, packet[9]) };
    let addresses = if v6 { &packet[8..40] } else { &packet[12..20] };
    let len = ((packet.len() - transport) as u32).to_be_bytes();
    let summed = [addresses, &len, &[0, protocol], &packet[transport..]].concat();
    naive_sum(&summed) == 0xFFFF && (v6 || naive_sum(&packet[..20]) == 0xFFFF)
}
