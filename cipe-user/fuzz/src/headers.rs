//! Everything that reads or changes inner packets: any octets get a result, changes keep the length, and what is read once is what
//! each reader would find by itself.

use std::net::IpAddr;

use cipe_user::engine::lan;
use cipe_user::inner::fragment::Fragments;
use cipe_user::inner::headers::{Headers, IpVersion, NO_NEXT_HEADER, Part};
use cipe_user::inner::too_big::TooBigMessage;
use cipe_user::inner::{checksum, ecn, ethernet, ip, mss, nested};

/// Runs one input: TOS and MTU, then the packet.
pub fn run(input: &[u8]) {
    let Some(([tos, high, low], packet)) = input.split_first_chunk() else { return };
    let mtu = usize::from(u16::from_be_bytes([*high, *low]));
    let headers = Headers::parse(packet).ok();
    assert_eq!(headers.map(|headers| Seen::by_headers(packet, &headers)), Seen::by_itself(packet));
    if let Ok(headers) = ip::check(packet) {
        assert_eq!(headers.total(), packet.len());
    }
    if let Some(headers) = headers {
        assert!(headers.header() <= headers.transport() && headers.transport() <= headers.total());
        read_by(packet, &headers, mtu);
        let mut changed = packet.to_vec();
        let mut after = headers;
        let _ = ecn::decapsulate(&mut changed, &mut after, *tos);
        assert_eq!(Headers::parse(&changed), Ok(after));
        checksum::complete(&mut changed, &headers);
        nested::complete_inside(&mut changed, &headers);
        mss::clamp(&mut changed, &headers, mtu);
        assert_eq!(Headers::parse(&changed), Ok(after), "no later stage changes what was read");
    }
    nested::complete_hidden(&mut packet.to_vec());
    in_a_frame(packet);
}

fn read_by(packet: &[u8], headers: &Headers, mtu: usize) {
    let _ = (TooBigMessage::too_big(packet, headers, mtu), headers.flow(packet));
    assert!(lan::plain(packet, headers).is_none_or(|addresses| Some(addresses) == headers.addresses(packet)));
    let Ok(mut fragments) = Fragments::new(packet, headers, mtu) else { return };
    let mut buffer = vec![0; packet.len() + 64];
    let mut octets = 0;
    while let Some(len) = fragments.cut(&mut buffer) {
        assert!(len <= mtu);
        octets += len;
    }
    assert!(octets >= headers.total());
}

/// The same octets as a frame.
fn in_a_frame(frame: &[u8]) {
    let read = ethernet::read(frame);
    assert_eq!(read.is_some(), frame.len() >= ethernet::ETHERNET);
    let _ = (ethernet::is_surely_frame(frame, read.as_ref()), ethernet::is_bare_ip(frame, read.as_ref()));
    if let Some((packet, headers)) = read.as_ref().and_then(|read| read.packet(frame)) {
        assert_eq!((Headers::parse(packet), headers.total() <= packet.len()), (Ok(*headers), true));
    }
    let Some(header) = ethernet::link_header(frame) else { return };
    let ip = frame.get(header..).map(Headers::parse).and_then(Result::ok);
    if let Some(ip) = ip.filter(|ip| ip.total() <= frame.len() - header) {
        assert_eq!(ethernet::read_before(frame, header, ip), read);
    }
}

/// What the stages want to know of a packet, each read from its octets where RFC 791 and RFC 8200 have it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    version: u8,
    tos: u8,
    ttl: u8,
    dont_fragment: bool,
    total: usize,
    addresses: (IpAddr, IpAddr),
    /// Where UDP begins, if it is there, also in the first fragment of a larger packet.
    udp: Option<usize>,
    is_fragment: bool,
}

impl Seen {
    fn by_headers(packet: &[u8], headers: &Headers) -> Self {
        let is_udp = headers.protocol == 17 && headers.part != Part::Later;
        Self {
            version: if headers.version == IpVersion::V4 { 4 } else { 6 },
            tos: headers.tos,
            ttl: headers.ttl,
            dont_fragment: headers.dont_fragment,
            total: headers.total(),
            addresses: headers.addresses(packet).expect("the IP header is whole"),
            udp: is_udp.then_some(headers.transport()),
            is_fragment: headers.part != Part::Whole,
        }
    }

    fn by_itself(packet: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(usize::from(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?)));
        match packet.first()? >> 4 {
            4 => {
                let (header, total) = (usize::from(packet[0] & 0xF) * 4, number(2)?);
                let addresses: &[u8; 8] = packet.get(12..)?.first_chunk()?;
                if header < 20 || header > total || header > packet.len() {
                    return None;
                }
                let [a, b, c, d, e, f, g, h] = *addresses;
                let field = number(6)?;
                Some(Self {
                    version: 4,
                    tos: packet[1],
                    ttl: packet[8],
                    dont_fragment: field & 0x4000 != 0,
                    total,
                    addresses: ([a, b, c, d].into(), [e, f, g, h].into()),
                    udp: (packet[9] == 17 && field & 0x1FFF == 0).then_some(header),
                    is_fragment: field & 0x3FFF != 0,
                })
            }
            6 => {
                let source: &[u8; 16] = packet.get(8..)?.first_chunk()?;
                let destination: &[u8; 16] = packet.get(24..)?.first_chunk()?;
                let total = 40 + number(4)?;
                let (protocol, at, fragment) = behind(packet, total).unwrap_or((NO_NEXT_HEADER, 40, None));
                let begins = fragment.is_none_or(|offset| offset == 0);
                Some(Self {
                    version: 6,
                    tos: (number(0)? >> 4) as u8,
                    ttl: packet[7],
                    dont_fragment: true,
                    total,
                    addresses: ((*source).into(), (*destination).into()),
                    udp: (protocol == 17 && begins).then_some(at),
                    is_fragment: fragment.is_some(),
                })
            }
            _ => None,
        }
    }
}

/// Protocol and offset behind hop-by-hop and destination options of IPv6, and the offset that a fragment header has, at which the
/// walk ends.
fn behind(packet: &[u8], total: usize) -> Option<(u8, usize, Option<u16>)> {
    let (mut protocol, mut at) = (packet[6], 40);
    let fits = |at: usize| (at <= packet.len().min(total)).then_some(at);
    for _ in 0..8 {
        match protocol {
            44 => {
                let fragment: &[u8; 8] = packet.get(at..)?.first_chunk()?;
                let offset = u16::from_be_bytes([fragment[2], fragment[3]]) >> 3;
                return Some((fragment[0], fits(at + 8)?, Some(offset)));
            }
            0 | 60 => {
                let [next, words]: &[u8; 2] = packet.get(at..)?.first_chunk()?;
                (protocol, at) = (*next, fits(at + 8 + 8 * usize::from(*words))?);
            }
            _ => break,
        }
    }
    Some((protocol, at, None))
}
