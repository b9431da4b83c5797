//! One look at an inner packet that yields all that later stages need of its headers.
//!
//! Accepts any octets and never panics.

use std::net::IpAddr;
use std::ops::Range;

use cipe_common::Verdict;

use crate::inner::ip::{IPV4, IPV6};

/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

/// Protocol number of IPv6 that says that nothing follows.
pub const NO_NEXT_HEADER: u8 = 59;

const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const SCTP: u8 = 132;
/// In the IPv4 header, the bit and the field of fragments.
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1FFF;
/// Where the addresses stand.
const ADDRESSES_V4: Range<usize> = 12..20;
const ADDRESSES_V6: Range<usize> = 8..40;
/// Maximum IPv6 extension headers: more than any sender uses.
const MAX_EXTENSIONS: usize = 8;

/// The version of an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Which part of a packet one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All of it.
    Whole,
    /// The first fragment, which has the transport header.
    First,
    /// A later fragment.
    Later,
}

/// What the headers of an inner packet say: read once each way, and handed from stage to stage beside the packet. Addresses and
/// ports stay in the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// IP version.
    pub version: IpVersion,
    /// TOS or traffic class, ECN bits included.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// May not be fragmented: the DF bit of IPv4; IPv6 never may.
    pub dont_fragment: bool,
    /// Whether it is a fragment of a larger packet, so that its transport header or payload is elsewhere.
    pub part: Part,
    /// Number of the protocol that stands at [`Headers::transport`]; [`NO_NEXT_HEADER`] behind IPv6 extension headers that are cut
    /// off or contradict the length.
    pub protocol: u8,
    header: u8,
    transport: u16,
    total: u32,
}

impl Headers {
    /// Reads the headers at the start of `packet`. The slice may end before the packet does, as the first piece of a
    /// superframe, or after it; whoever needs it whole compares the total length. The layouts are those of RFC 791 and
    /// RFC 8200. No checksum is looked at.
    ///
    /// # Errors
    /// [`Verdict::PrivateNotIp`] where the version is neither 4 nor 6, [`Verdict::PrivateMalformed`] where the IP header is cut off
    /// or its lengths contradict each other.
    // Inline, as are its callers: the fields stay in registers until they are stored in one place. A copy right behind such narrow
    // stores waits for them, which takes longer than to read the headers again.
    #[inline(always)]
    pub fn parse(packet: &[u8]) -> Result<Self, Verdict> {
        let read = match packet.first().map(|first| first >> 4) {
            Some(4) => Self::in_v4(packet),
            Some(6) => Self::in_v6(packet),
            _ => return Err(Verdict::PrivateNotIp),
        };
        read.ok_or(Verdict::PrivateMalformed)
    }

    #[inline(always)]
    fn in_v4(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; IPV4] = packet.first_chunk()?;
        let header = (fixed[0] & 0xF) * 4;
        let total = u16::from_be_bytes([fixed[2], fixed[3]]);
        let octets = usize::from(header);
        if octets < IPV4 || octets > usize::from(total) || octets > packet.len() {
            return None;
        }
        let part = match u16::from_be_bytes([fixed[6], fixed[7]]) {
            field if field & (MORE_FRAGMENTS | OFFSET) == 0 => Part::Whole,
            field if field & OFFSET == 0 => Part::First,
            _ => Part::Later,
        };
        Some(Self {
            version: IpVersion::V4,
            tos: fixed[1],
            ttl: fixed[8],
            dont_fragment: fixed[6] & 0x40 != 0,
            part,
            protocol: fixed[9],
            header,
            transport: header.into(),
            total: total.into(),
        })
    }

    fn in_v6(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; IPV6] = packet.first_chunk()?;
        let ip = Self {
            version: IpVersion::V6,
            tos: fixed[0] << 4 | fixed[1] >> 4,
            ttl: fixed[7],
            dont_fragment: true,
            part: Part::Whole,
            protocol: fixed[6],
            header: IPV6 as u8,
            transport: IPV6 as u16,
            total: IPV6 as u32 + u32::from(u16::from_be_bytes([fixed[4], fixed[5]])),
        };
        match ip.protocol {
            HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT => {
                Some(ip.behind_extensions(packet).unwrap_or(Self { protocol: NO_NEXT_HEADER, ..ip }))
            }
            _ => Some(ip),
        }
    }

    fn behind_extensions(mut self, packet: &[u8]) -> Option<Self> {
        for _ in 0..MAX_EXTENSIONS {
            // Routing and authentication headers change what a checksum covers, so they count as the payload.
            if self.part != Part::Whole || !matches!(self.protocol, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) {
                break;
            }
            let extension = packet.get(self.transport()..)?;
            let [next, length]: &[u8; 2] = extension.first_chunk()?;
            if self.protocol == FRAGMENT {
                let [_, _, high, low, ..]: &[u8; 8] = extension.first_chunk()?;
                let begins = u16::from_be_bytes([*high, *low]) & 0xFFF8 == 0;
                self.part = if begins { Part::First } else { Part::Later };
                self.transport += 8;
            } else {
                self.transport += (u16::from(*length) + 1) * 8;
            }
            self.protocol = *next;
            if self.transport() > packet.len() || self.transport() > self.total() {
                return None;
            }
        }
        Some(self)
    }

    /// Octets of the IP header: 20 to 60, or 40 for IPv6 without its extension headers.
    pub fn header(&self) -> usize {
        self.header.into()
    }

    /// Offset of the transport header, or of the first IPv6 extension header that is neither hop-by-hop nor
    /// destination options. In a fragment, of what follows the fragment header.
    pub fn transport(&self) -> usize {
        self.transport.into()
    }

    /// Octets of the whole packet as its header says; at least [`Headers::transport`].
    pub fn total(&self) -> usize {
        self.total as usize
    }

    /// Octets from the transport header to the end of the packet.
    pub fn transport_len(&self) -> usize {
        self.total() - self.transport()
    }

    /// The headers of a segment of this packet, which is `total` octets long with all of them.
    #[must_use]
    pub fn of_segment(self, total: usize) -> Self {
        Self { total: total.max(self.transport()) as u32, ..self }
    }

    /// Source and destination, which `packet` has if these are its headers.
    pub fn addresses(&self, packet: &[u8]) -> Option<(IpAddr, IpAddr)> {
        match self.version {
            IpVersion::V4 => {
                let [a, b]: &[[u8; 4]; 2] = packet.get(ADDRESSES_V4)?.as_chunks().0.try_into().ok()?;
                Some(((*a).into(), (*b).into()))
            }
            IpVersion::V6 => {
                let [a, b]: &[[u8; 16]; 2] = packet.get(ADDRESSES_V6)?.as_chunks().0.try_into().ok()?;
                Some(((*a).into(), (*b).into()))
            }
        }
    }

    /// The same number for every packet of a flow: a hash of addresses, protocol and, where it has them, ports. All
    /// fragments have the number of their addresses and protocol alone, since only the first has ports.
    pub fn flow(&self, packet: &[u8]) -> u32 {
        let addresses = packet.get(match self.version {
            IpVersion::V4 => ADDRESSES_V4,
            IpVersion::V6 => ADDRESSES_V6,
        });
        let has_ports = self.part == Part::Whole && matches!(self.protocol, TCP | UDP | SCTP);
        let ports = packet.get(self.transport()..).and_then(<[u8]>::first_chunk).filter(|_| has_ports);
        flow_hash(addresses.unwrap_or_default(), self.protocol, ports.map_or(0, |ports| u32::from_be_bytes(*ports)))
    }
}

/// Distributes flows evenly, but is not secure against attack: a sender that makes flows collide only slows down those
/// flows.
fn flow_hash(addresses: &[u8], protocol: u8, ports: u32) -> u32 {
    // Digits of pi: constants without a pattern.
    let start = 0x2439_6A88_85A3_08D3 ^ (u64::from(protocol) << 32 | u64::from(ports));
    let words = addresses.as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
    (words.fold(start, |hash, word| mix(hash ^ word, 0xA409_3822_299F_31D1)) >> 32) as u32
}

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::test_packets::Flow;

    const V4_TCP: [u8; 40] = [
        0x45, 0x2E, 0, 40, 0x12, 0x34, 0x40, 0, 63, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2, // IPv4, DF
        0x9C, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ];

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x6A, 0xB1, 0x23, 0x45, 0, payload.len() as u8, next, 61];
        packet.extend((1..=32).collect::<Vec<u8>>());
        packet.extend(payload);
        packet
    }

    #[test]
    fn the_transport_header_is_found() {
        let headers = Headers::parse(&V4_TCP).unwrap();
        assert_eq!((headers.version, headers.part), (IpVersion::V4, Part::Whole));
        assert_eq!((headers.protocol, headers.transport(), headers.transport_len()), (TCP, 20, 20));
        let headers = Headers::parse(&v6(UDP, &[0; 8])).unwrap();
        assert_eq!((headers.version, headers.part), (IpVersion::V6, Part::Whole));
        assert_eq!((headers.protocol, headers.transport(), headers.transport_len()), (UDP, 40, 8));
    }

    #[test]
    fn ipv6_options_are_skipped_and_other_extensions_are_the_payload() {
        let options = [DESTINATION_OPTIONS, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, TCP, 0, 0, 0, 0, 0, 0, 0];
        let headers = Headers::parse(&v6(HOP_BY_HOP, &options)).unwrap();
        assert_eq!((headers.protocol, headers.transport(), headers.part), (TCP, 64, Part::Whole));
        let routing = Headers::parse(&v6(43, &[TCP, 0, 0, 0, 0, 0, 0, 0])).unwrap();
        assert_eq!((routing.protocol, routing.transport()), (43, 40));
    }

    #[test]
    fn fragments_are_recognized() {
        for (fragmentation, part) in
            [([0x20, 0], Part::First), ([0, 1], Part::Later), ([0x3F, 0xFF], Part::Later), ([0xC0, 0], Part::Whole)]
        {
            let mut packet = V4_TCP;
            packet[6..8].copy_from_slice(&fragmentation);
            assert_eq!(Headers::parse(&packet).unwrap().part, part);
        }
        for (field, part) in
            [([0, 0], Part::First), ([0, 7], Part::First), ([0, 8], Part::Later), ([0xFF, 0], Part::Later)]
        {
            let headers =
                Headers::parse(&v6(FRAGMENT, &[UDP, 0xFF, field[0], field[1], 0, 0, 0, 0, 1, 2, 3, 4])).unwrap();
            assert_eq!((headers.part, headers.protocol, headers.transport()), (part, UDP, 48));
        }
    }

    #[test]
    fn headers_that_contradict_themselves_are_malformed() {
        let malformed = Err(Verdict::PrivateMalformed);
        let mut short_header = V4_TCP;
        short_header[0] = 0x44;
        let mut short_total = V4_TCP;
        short_total[3] = 19;
        let mut long_header = V4_TCP;
        (long_header[0], long_header[3]) = (0x4F, 60);
        for packet in [short_header, short_total, long_header] {
            assert_eq!(Headers::parse(&packet), malformed);
        }
        assert_eq!(Headers::parse(&V4_TCP[..19]), malformed);
        assert_eq!(Headers::parse(&v6(UDP, &[])[..39]), malformed);
    }

    #[test]
    fn behind_extension_headers_that_cannot_be_read_is_nothing() {
        for content in [&[TCP, 1, 0, 0, 0, 0, 0, 0][..], &[TCP], &[]] {
            for next in [HOP_BY_HOP, DESTINATION_OPTIONS] {
                let headers = Headers::parse(&v6(next, content)).unwrap();
                assert_eq!((headers.protocol, headers.part, headers.transport()), (NO_NEXT_HEADER, Part::Whole, 40));
                assert_eq!(headers.total(), 40 + content.len());
            }
        }
        assert_eq!(Headers::parse(&v6(FRAGMENT, &[TCP, 0, 0, 1])).unwrap().protocol, NO_NEXT_HEADER);
    }

    #[test]
    fn addresses_are_those_of_the_packet() {
        for flow in [Flow::tcp4(), Flow::udp6()] {
            let packet = flow.packet(b"payload");
            let headers = Headers::parse(&packet).unwrap();
            assert_eq!(headers.addresses(&packet), Some((flow.source, flow.destination)));
            assert_eq!(headers.addresses(&packet[..19]), None);
        }
    }

    #[test]
    fn what_stages_hand_on_is_small() {
        assert_eq!((size_of::<Headers>(), size_of::<Option<Headers>>()), (16, 16));
    }

    #[test]
    fn other_versions_are_not_ip() {
        for packet in [&[][..], &[0x05; 40], &[0x55; 40], &[0xF4; 40]] {
            assert_eq!(Headers::parse(packet), Err(Verdict::PrivateNotIp));
        }
    }

    #[test]
    fn a_flow_is_told_by_addresses_protocol_and_ports_only() {
        let flow = |packet: &[u8]| Headers::parse(packet).unwrap().flow(packet);
        let base = flow(&V4_TCP);
        for at in 9..24 {
            let mut packet = V4_TCP;
            packet[at] ^= 1;
            let same = matches!(at, 10 | 11);
            assert!(at == 9 || (flow(&packet) == base) == same, "octet {at}");
        }
        for at in [1, 5, 8, 27, 33] {
            let mut packet = V4_TCP;
            packet[at] ^= 1;
            assert_eq!(flow(&packet), base, "octet {at}");
        }
    }

    #[test]
    fn flows_spread_evenly() {
        let mut buckets = [0u32; 16];
        for port in 0..4096u16 {
            let mut packet = V4_TCP;
            packet[20..22].copy_from_slice(&port.to_be_bytes());
            buckets[(Headers::parse(&packet).unwrap().flow(&packet) % 16) as usize] += 1;
        }
        assert!(buckets.iter().all(|bucket| (180..=340).contains(bucket)), "{buckets:?}");
    }

    proptest! {
        #[test]
        fn any_octets_give_an_answer_with_offsets_in_order(packet in octets_like_ip()) {
            if let Ok(headers) = Headers::parse(&packet) {
                prop_assert!(headers.header() <= headers.transport());
                prop_assert!(headers.transport() <= headers.total());
                prop_assert!(headers.transport() <= packet.len());
                headers.flow(&packet);
                prop_assert!(headers.addresses(&packet).is_some());
            }
        }
    }

    fn octets_like_ip() -> impl Strategy<Value = Vec<u8>> {
        let next = prop_oneof![Just(HOP_BY_HOP), Just(DESTINATION_OPTIONS), Just(FRAGMENT), Just(TCP), any::<u8>()];
        (prop::collection::vec(prop_oneof![0u8..3, any::<u8>()], 0..160), any::<bool>(), next).prop_map(
            |(mut octets, v6, next)| {
                if let Some(first) = octets.first_mut() {
                    *first = if v6 { 0x60 } else { 0x40 } | *first & 0x0F;
                }
                if let Some(field) = octets.get_mut(6).filter(|_| v6) {
                    *field = next;
                }
                octets
            },
        )
    }
}
