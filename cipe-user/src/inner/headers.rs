//! One look at an inner packet that yields where its transport header stands and to which flow it belongs.
//!
//! Total: any octets give an answer, none a panic.

use cipe_common::Verdict;

use crate::inner::ip::Inner;

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
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What the headers of an inner packet say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The IP header; its `total` is at least [`Headers::transport`].
    pub ip: Inner,
    /// Whether it is a fragment of a larger packet, so that its transport header or payload is elsewhere.
    pub fragment: bool,
    /// Number of the protocol that stands at [`Headers::transport`].
    pub protocol: u8,
    /// Offset of the transport header, or of the first IPv6 extension header that is neither hop-by-hop nor
    /// destination options. In a fragment, of what follows the fragment header.
    pub transport: usize,
    /// The same number for every packet of a flow: a hash of addresses, protocol and, where it has them, ports. All
    /// fragments have the number of their addresses and protocol alone, since only the first has ports.
    pub flow: u32,
}

impl Headers {
    /// Reads the headers at the start of `packet`. The slice may end before the packet does, as the first piece of a
    /// superframe, or after it; whoever needs it whole compares the total length.
    ///
    /// # Errors
    /// [`Verdict::PrivateNotIp`] where the version is neither 4 nor 6, [`Verdict::PrivateMalformed`] where the headers
    /// are cut off or contradict themselves.
    pub fn parse(packet: &[u8]) -> Result<Self, Verdict> {
        if !packet.first().is_some_and(|first| matches!(first >> 4, 4 | 6)) {
            return Err(Verdict::PrivateNotIp);
        }
        let read = || {
            let ip = Inner::parse(packet)?;
            if ip.source.is_ipv4() { Some(Self::in_v4(packet, ip)) } else { Self::in_v6(packet, ip) }
        };
        read().ok_or(Verdict::PrivateMalformed)
    }

    fn in_v4(packet: &[u8], ip: Inner) -> Self {
        let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3FFF != 0;
        let ports = ports(packet, ip.header, ip.protocol, fragment);
        let flow = flow_hash(&packet[12..20], ip.protocol, ports);
        Self { ip, fragment, protocol: ip.protocol, transport: ip.header, flow }
    }

    fn in_v6(packet: &[u8], ip: Inner) -> Option<Self> {
        let mut protocol = ip.protocol;
        let mut transport = ip.header;
        let mut fragment = false;
        for _ in 0..MAX_EXTENSIONS {
            // Routing and authentication headers change what a checksum covers, so they count as the payload.
            if fragment || !matches!(protocol, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) {
                break;
            }
            let extension: &[u8; 2] = packet.get(transport..)?.first_chunk()?;
            fragment = protocol == FRAGMENT;
            protocol = extension[0];
            transport += if fragment { 8 } else { (usize::from(extension[1]) + 1) * 8 };
            if transport > packet.len() || transport > ip.total {
                return None;
            }
        }
        let ports = ports(packet, transport, protocol, fragment);
        Some(Self { ip, fragment, protocol, transport, flow: flow_hash(&packet[8..40], protocol, ports) })
    }

    /// IP version.
    pub fn version(&self) -> IpVersion {
        if self.ip.source.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 }
    }

    /// Octets from the transport header to the end of the packet.
    pub fn transport_len(&self) -> usize {
        self.ip.total - self.transport
    }
}

fn ports(packet: &[u8], transport: usize, protocol: u8, fragment: bool) -> u32 {
    let has_ports = !fragment && matches!(protocol, TCP | UDP | SCTP);
    let ports = packet.get(transport..).and_then(|transport| transport.first_chunk());
    if has_ports { ports.map_or(0, |ports| u32::from_be_bytes(*ports)) } else { 0 }
}

/// Spreads well rather than withstands attack: whoever picks the flows to collide slows down only those flows.
fn flow_hash(addresses: &[u8], protocol: u8, ports: u32) -> u32 {
    // Fractional digits of pi: odd enough numbers with no structure.
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
        assert_eq!((headers.version(), headers.fragment), (IpVersion::V4, false));
        assert_eq!((headers.protocol, headers.transport, headers.transport_len()), (TCP, 20, 20));
        let headers = Headers::parse(&v6(UDP, &[0; 8])).unwrap();
        assert_eq!((headers.version(), headers.fragment), (IpVersion::V6, false));
        assert_eq!((headers.protocol, headers.transport, headers.transport_len()), (UDP, 40, 8));
    }

    #[test]
    fn ipv6_options_are_skipped_and_other_extensions_are_the_payload() {
        let options = [DESTINATION_OPTIONS, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, TCP, 0, 0, 0, 0, 0, 0, 0];
        let headers = Headers::parse(&v6(HOP_BY_HOP, &options)).unwrap();
        assert_eq!((headers.protocol, headers.transport, headers.fragment), (TCP, 64, false));
        let routing = Headers::parse(&v6(43, &[TCP, 0, 0, 0, 0, 0, 0, 0])).unwrap();
        assert_eq!((routing.protocol, routing.transport), (43, 40));
    }

    #[test]
    fn fragments_are_recognized() {
        for fragmentation in [[0x20, 0], [0, 1], [0x3F, 0xFF]] {
            let mut packet = V4_TCP;
            packet[6..8].copy_from_slice(&fragmentation);
            assert!(Headers::parse(&packet).unwrap().fragment);
        }
        let headers = Headers::parse(&v6(FRAGMENT, &[UDP, 0xFF, 0, 1, 0, 0, 0, 0, 1, 2, 3, 4])).unwrap();
        assert_eq!((headers.fragment, headers.protocol, headers.transport), (true, UDP, 48));
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
        assert_eq!(Headers::parse(&v6(HOP_BY_HOP, &[TCP, 1, 0, 0, 0, 0, 0, 0])), malformed);
        assert_eq!(Headers::parse(&v6(HOP_BY_HOP, &[TCP])), malformed);
    }

    #[test]
    fn other_versions_are_not_ip() {
        for packet in [&[][..], &[0x05; 40], &[0x55; 40], &[0xF4; 40]] {
            assert_eq!(Headers::parse(packet), Err(Verdict::PrivateNotIp));
        }
    }

    #[test]
    fn a_flow_is_told_by_addresses_protocol_and_ports_only() {
        let flow = |packet: &[u8]| Headers::parse(packet).unwrap().flow;
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
            buckets[(Headers::parse(&packet).unwrap().flow % 16) as usize] += 1;
        }
        assert!(buckets.iter().all(|bucket| (180..=340).contains(bucket)), "{buckets:?}");
    }

    proptest! {
        #[test]
        fn any_octets_give_an_answer_with_offsets_in_order(packet in octets_like_ip()) {
            if let Ok(headers) = Headers::parse(&packet) {
                prop_assert!(headers.ip.header <= headers.transport);
                prop_assert!(headers.transport <= headers.ip.total);
                prop_assert!(headers.transport <= packet.len());
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
