//! Errors to the sender of a packet that is too large and must not be fragmented: ICMP "fragmentation needed" with the
//! MTU of the next hop (RFC 1191, section 4), and ICMPv6 "packet too big" (RFC 4443, section 3.2).
//!
//! Only the ICMP message is written, because a raw ICMP socket takes it so. The kernel adds the IP header and chooses
//! the source address by the route to the sender, as for its own errors. It also computes the ICMPv6 checksum, which
//! covers the addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use arrayvec::ArrayVec;

use crate::inner::checksum::Sum;
use crate::inner::headers::{Headers, IpVersion, Part};
use crate::inner::ip::{IPV6, LEAST_MTU};

/// Octets of the ICMP header before the quoted packet, in either version.
const HEADER: usize = 8;
/// Maximum quoted octets in ICMP: what fits an IP packet of 576 octets (RFC 1812, section 4.3.2.3).
const QUOTE_V4: usize = 576 - 20 - HEADER;
/// Maximum quoted octets in ICMPv6: what fits an IP packet of 1280 octets (RFC 4443, section 2.4 c).
const QUOTE_V6: usize = 1280 - 40 - HEADER;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const PACKET_TOO_BIG: u8 = 2;

/// An ICMP error for the sender of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TooBigMessage {
    /// The sender of the packet, who gets the error.
    pub to: IpAddr,
    /// The message from its ICMP type on. In ICMPv6 the checksum is zero.
    pub octets: ArrayVec<u8, { HEADER + QUOTE_V6 }>,
}

impl TooBigMessage {
    /// Says that `packet`, whose headers were read before, is larger than `mtu` octets. The slice may end before the packet does.
    ///
    /// `None` for packets that no error may answer: ICMP errors, fragments but the first, those to several hosts, those
    /// not from a single one (RFC 1122, section 3.2.2; RFC 4443, section 2.4 e, which lets multicast packets be answered
    /// by "packet too big"); nor for an `mtu` that no link has.
    pub fn too_big(packet: &[u8], headers: &Headers, mtu: usize) -> Option<Self> {
        let mtu = u16::try_from(mtu).ok().filter(|mtu| usize::from(*mtu) >= LEAST_MTU)?;
        let may_be_answered = match headers.addresses(packet)? {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                is_one_host(from) && is_one_host(to) && answerable_v4(packet, headers)
            }
            (IpAddr::V6(from), IpAddr::V6(_)) => is_one_host_v6(from) && answerable_v6(packet)?,
            _ => false,
        };
        if !may_be_answered {
            return None;
        }
        let [high, low] = mtu.to_be_bytes();
        let mut octets = ArrayVec::new();
        let (header, room) = match headers.version {
            IpVersion::V4 => ([UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0, high, low], QUOTE_V4),
            IpVersion::V6 => ([PACKET_TOO_BIG, 0, 0, 0, 0, 0, high, low], QUOTE_V6),
        };
        let quoted = packet.len().min(headers.total()).min(room);
        octets.extend(header);
        octets.extend(packet[..quoted].iter().copied());
        if headers.version == IpVersion::V4 {
            let mut sum = Sum::default();
            sum.add(&octets);
            octets[2..4].copy_from_slice(&sum.checksum());
        }
        Some(Self { to: headers.addresses(packet)?.0, octets })
    }
}

/// The kernel knows the directed broadcast addresses of its own networks, and refuses to send to them.
fn is_one_host(address: Ipv4Addr) -> bool {
    // 0.0.0.0/8 is "this network", 240.0.0.0/4 is reserved and holds the limited broadcast.
    !matches!(address.octets()[0], 0 | 127 | 224..)
}

fn is_one_host_v6(address: Ipv6Addr) -> bool {
    !address.is_unspecified() && !address.is_loopback() && !address.is_multicast()
}

fn answerable_v4(packet: &[u8], headers: &Headers) -> bool {
    // Queries and replies may be answered. A message of an unknown type may be an error, so it is not answered.
    let query = |kind: &u8| matches!(kind, 0 | 8..=10 | 13..=18);
    let is_query = || packet.get(headers.transport()).is_some_and(query);
    headers.part != Part::Later && (headers.protocol != ICMP || is_query())
}

/// Offset of the field that says what follows the IPv6 header.
const NEXT_HEADER: usize = 6;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// Walks all extension headers to see whether an ICMPv6 error is behind them; `None` if they are cut off.
fn answerable_v6(packet: &[u8]) -> Option<bool> {
    let (mut next, mut at) = (*packet.get(NEXT_HEADER)?, IPV6);
    while matches!(next, HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS) {
        let extension: &[u8; 8] = packet.get(at..)?.first_chunk()?;
        let words = usize::from(extension[1]);
        at += match next {
            FRAGMENT if u16::from_be_bytes([extension[2], extension[3]]) & 0xFFF8 != 0 => return Some(false),
            FRAGMENT => 8,
            AUTHENTICATION => (words + 2) * 4,
            _ => (words + 1) * 8,
        };
        next = extension[0];
    }
    // Types from 128 on are informational, but a redirect (137) counts as an error here.
    Some(next != ICMPV6 || packet.get(at).is_some_and(|kind| *kind >= 128 && *kind != 137))
}

#[cfg(test)]
mod tests;
