//! One look at an inner IP packet that yields all that the packet path wants to know of it.
//!
//! Total: any octets give an answer, none a panic. The layouts are those of RFC 791 and RFC 8200.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use cipe_common::Verdict;

/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;

const HOP_BY_HOP: u8 = 0;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;
const SCTP: u8 = 132;
/// More extension headers than any sender stacks; bounds the walk.
const MAX_EXTENSIONS: usize = 8;

/// The version of an inner packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What the headers of an inner packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inner {
    /// IP version.
    pub version: Version,
    /// Octets of the fixed IP header: with options for IPv4, 40 for IPv6.
    pub header_len: usize,
    /// Octets of the whole packet as its header says; at least [`Inner::transport`].
    pub total_len: usize,
    /// TOS or traffic class, DSCP and ECN together.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// Whether routers must not fragment it: DF for IPv4, always for IPv6.
    pub dont_fragment: bool,
    /// Whether it is a fragment of a larger packet, so that its transport header or payload is elsewhere.
    pub fragment: bool,
    /// Number of the protocol that stands at [`Inner::transport`].
    pub protocol: u8,
    /// Offset of the transport header, or of the first IPv6 extension header that is neither hop-by-hop nor
    /// destination options. In a fragment, of what follows the fragment header.
    pub transport: usize,
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// The same number for every packet of a flow: a hash of addresses, protocol and, where it has them, ports. All
    /// fragments have the number of their addresses and protocol alone, since only the first has ports.
    pub flow: u32,
}

impl Inner {
    /// Reads the headers at the start of `packet`. The slice may end before the packet does, as the first piece of a
    /// superframe, or after it; whoever needs it whole compares [`Inner::total_len`].
    ///
    /// # Errors
    /// [`Verdict::PrivateNotIp`] where the version is neither 4 nor 6, [`Verdict::PrivateMalformed`] where the headers
    /// are cut off or contradict themselves.
    pub fn parse(packet: &[u8]) -> Result<Self, Verdict> {
        match packet.first().map(|first| first >> 4) {
            Some(4) => Self::parse_v4(packet).ok_or(Verdict::PrivateMalformed),
            Some(6) => Self::parse_v6(packet).ok_or(Verdict::PrivateMalformed),
            _ => Err(Verdict::PrivateNotIp),
        }
    }

    fn parse_v4(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; 20] = packet.first_chunk()?;
        let header_len = usize::from(fixed[0] & 0x0F) * 4;
        let total_len = usize::from(u16::from_be_bytes([fixed[2], fixed[3]]));
        if header_len < 20 || header_len > packet.len() || header_len > total_len {
            return None;
        }
        let fragmentation = u16::from_be_bytes([fixed[6], fixed[7]]);
        let fragment = fragmentation & 0x3FFF != 0;
        let addresses = word(fixed, 12);
        let protocol = fixed[9];
        Some(Self {
            version: Version::V4,
            header_len,
            total_len,
            tos: fixed[1],
            ttl: fixed[8],
            dont_fragment: fragmentation & 0x4000 != 0,
            fragment,
            protocol,
            transport: header_len,
            source: IpAddr::V4(Ipv4Addr::from_bits((addresses >> 32) as u32)),
            destination: IpAddr::V4(Ipv4Addr::from_bits(addresses as u32)),
            flow: flow_hash(&[addresses], protocol, ports(packet, header_len, protocol, fragment)),
        })
    }

    fn parse_v6(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; 40] = packet.first_chunk()?;
        let total_len = 40 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]]));
        let mut protocol = fixed[6];
        let mut transport = 40;
        let mut fragment = false;
        for _ in 0..MAX_EXTENSIONS {
            // Routing and authentication headers change what a checksum covers, so they count as the payload.
            if !matches!(protocol, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) {
                break;
            }
            let extension: &[u8; 2] = packet.get(transport..)?.first_chunk()?;
            fragment = protocol == FRAGMENT;
            protocol = extension[0];
            transport += if fragment { 8 } else { (usize::from(extension[1]) + 1) * 8 };
            if transport > packet.len() || transport > total_len {
                return None;
            }
            if fragment {
                break;
            }
        }
        let addresses = [word(fixed, 8), word(fixed, 16), word(fixed, 24), word(fixed, 32)];
        Some(Self {
            version: Version::V6,
            header_len: 40,
            total_len,
            tos: fixed[0] << 4 | fixed[1] >> 4,
            ttl: fixed[7],
            dont_fragment: true,
            fragment,
            protocol,
            transport,
            source: IpAddr::V6(address_v6(addresses[0], addresses[1])),
            destination: IpAddr::V6(address_v6(addresses[2], addresses[3])),
            flow: flow_hash(&addresses, protocol, ports(packet, transport, protocol, fragment)),
        })
    }

    /// Octets from the transport header to the end of the packet.
    pub fn transport_len(&self) -> usize {
        self.total_len - self.transport
    }
}

fn address_v6(high: u64, low: u64) -> Ipv6Addr {
    Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low))
}

/// The big-endian word at `at`, which the caller's array holds whole.
fn word<const N: usize>(octets: &[u8; N], at: usize) -> u64 {
    octets[at..at + 8].iter().fold(0, |word, octet| word << 8 | u64::from(*octet))
}

fn ports(packet: &[u8], transport: usize, protocol: u8, fragment: bool) -> u32 {
    let has_ports = !fragment && matches!(protocol, TCP | UDP | SCTP);
    let ports = packet.get(transport..).and_then(|transport| transport.first_chunk());
    if has_ports { ports.map_or(0, |ports| u32::from_be_bytes(*ports)) } else { 0 }
}

/// Spreads well rather than withstands attack: whoever picks the flows to collide slows down only those flows.
fn flow_hash(addresses: &[u64], protocol: u8, ports: u32) -> u32 {
    // Fractional digits of pi: odd enough numbers with no structure.
    let start = 0x2439_6A88_85A3_08D3 ^ (u64::from(protocol) << 32 | u64::from(ports));
    let hash = addresses
        .iter()
        .fold(mix(start, 0x1319_8A2E_0370_7345), |hash, address| mix(hash ^ address, 0xA409_3822_299F_31D1));
    (hash >> 32) as u32
}

fn mix(a: u64, b: u64) -> u64 {
    let product = u128::from(a) * u128::from(b);
    (product >> 64) as u64 ^ product as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
    fn an_ipv4_header_is_read_in_full() {
        let inner = Inner::parse(&V4_TCP).unwrap();
        assert_eq!((inner.version, inner.header_len, inner.total_len), (Version::V4, 20, 40));
        assert_eq!((inner.tos, inner.ttl, inner.dont_fragment, inner.fragment), (0x2E, 63, true, false));
        assert_eq!((inner.protocol, inner.transport, inner.transport_len()), (TCP, 20, 20));
        assert_eq!(inner.source, "10.0.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(inner.destination, "10.0.0.2".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn an_ipv6_header_is_read_in_full() {
        let inner = Inner::parse(&v6(UDP, &[0; 8])).unwrap();
        assert_eq!((inner.version, inner.header_len, inner.total_len), (Version::V6, 40, 48));
        assert_eq!((inner.tos, inner.ttl, inner.dont_fragment, inner.fragment), (0xAB, 61, true, false));
        assert_eq!((inner.protocol, inner.transport), (UDP, 40));
        assert_eq!(inner.source, "102:304:506:708:90a:b0c:d0e:f10".parse::<IpAddr>().unwrap());
        assert_eq!(inner.destination, "1112:1314:1516:1718:191a:1b1c:1d1e:1f20".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn ipv6_options_are_skipped_and_other_extensions_are_the_payload() {
        let options = [DESTINATION_OPTIONS, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, TCP, 0, 0, 0, 0, 0, 0, 0];
        let inner = Inner::parse(&v6(HOP_BY_HOP, &options)).unwrap();
        assert_eq!((inner.protocol, inner.transport, inner.fragment), (TCP, 64, false));
        let routing = Inner::parse(&v6(43, &[TCP, 0, 0, 0, 0, 0, 0, 0])).unwrap();
        assert_eq!((routing.protocol, routing.transport), (43, 40));
    }

    #[test]
    fn fragments_are_recognized() {
        for fragmentation in [[0x20, 0], [0, 1], [0x3F, 0xFF]] {
            let mut packet = V4_TCP;
            packet[6..8].copy_from_slice(&fragmentation);
            assert!(Inner::parse(&packet).unwrap().fragment);
        }
        let inner = Inner::parse(&v6(FRAGMENT, &[UDP, 0xFF, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4])).unwrap();
        assert_eq!((inner.fragment, inner.protocol, inner.transport), (true, UDP, 48));
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
            assert_eq!(Inner::parse(&packet), malformed);
        }
        assert_eq!(Inner::parse(&V4_TCP[..19]), malformed);
        assert_eq!(Inner::parse(&v6(UDP, &[])[..39]), malformed);
        assert_eq!(Inner::parse(&v6(HOP_BY_HOP, &[TCP, 1, 0, 0, 0, 0, 0, 0])), malformed);
        assert_eq!(Inner::parse(&v6(HOP_BY_HOP, &[TCP])), malformed);
    }

    #[test]
    fn other_versions_are_not_ip() {
        for packet in [&[][..], &[0x05; 40], &[0x55; 40], &[0xF4; 40]] {
            assert_eq!(Inner::parse(packet), Err(Verdict::PrivateNotIp));
        }
    }

    #[test]
    fn a_flow_is_told_by_addresses_protocol_and_ports_only() {
        let flow = |packet: &[u8]| Inner::parse(packet).unwrap().flow;
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
            buckets[(Inner::parse(&packet).unwrap().flow % 16) as usize] += 1;
        }
        assert!(buckets.iter().all(|bucket| (180..=340).contains(bucket)), "{buckets:?}");
    }

    proptest! {
        #[test]
        fn any_octets_give_an_answer_with_offsets_in_order(packet in octets_like_ip()) {
            if let Ok(inner) = Inner::parse(&packet) {
                prop_assert!(inner.header_len <= inner.transport);
                prop_assert!(inner.transport <= inner.total_len);
                prop_assert!(inner.transport <= packet.len());
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
