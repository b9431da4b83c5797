//! The destinations of the kernel's routes, from netlink messages.
//!
//! Only simple unicast routes are known. All others (several next hops, next hop objects, encapsulation, a TOS, other
//! types) become [`PrefixTarget::Elsewhere`], and the kernel forwards their packets.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::AddressFamily;
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};

use super::prefix::{Prefix, PrefixMap};
use crate::kernel::routes::{self, priority, table};

/// `RT_TABLE_LOCAL`, `RT_TABLE_MAIN` and `RT_TABLE_DEFAULT`.
const LOCAL: u32 = 255;
const MAIN: u32 = RouteHeader::RT_TABLE_MAIN as u32;
const DEFAULT: u32 = 253;

/// The destination of a prefix's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixTarget {
    /// Out through this device.
    Out(DeviceRoute),
    /// To this host, to nobody, or by a route that is not simple.
    Elsewhere,
}

/// A route out of this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRoute {
    /// Index of the device.
    pub ifindex: u32,
    /// The router, if the addresses are not on the link itself; may be IPv6 for IPv4 addresses.
    pub gateway: Option<IpAddr>,
    /// Maximum packet size in octets, if the route sets it.
    pub mtu: Option<u32>,
}

/// A route of the main table, for comparison with others of its prefix.
struct Candidate {
    priority: u32,
    leads: PrefixTarget,
}

/// Combines the routes of the tables `local` and `main`; valid if there are only the usual rules.
pub(super) fn collect(messages: &[RouteMessage]) -> PrefixMap<PrefixTarget> {
    let of = |wanted| messages.iter().filter(move |message| is_plain_family(message) && table(message) == wanted);
    // The kernel looks in the local table first: its routes have priority over longer ones of the main table.
    let local = of(LOCAL).filter_map(prefix).chain(NEVER_FORWARDED.iter().map(|(ip, bits)| Prefix::new(*ip, *bits)));
    let local: PrefixMap<()> = local.map(|prefix| (prefix, ())).collect();
    let mut main: HashMap<Prefix, Candidate> = HashMap::new();
    for message in of(MAIN) {
        let Some(prefix) = prefix(message) else { continue };
        let new = Candidate { priority: priority(message), leads: leads(message) };
        let known = main.entry(prefix).or_insert(Candidate { priority: u32::MAX, leads: PrefixTarget::Elsewhere });
        // The kernel compares a TOS before the priority; routes of equal priority share the packets.
        if message.header.tos != 0 {
            *known = Candidate { priority: 0, leads: PrefixTarget::Elsewhere };
        } else if new.priority < known.priority {
            *known = new;
        } else if new.priority == known.priority && new.leads != known.leads {
            known.leads = PrefixTarget::Elsewhere;
        }
    }
    let main = main.into_iter().map(|(prefix, found)| match local.around(prefix).next() {
        Some(()) => (prefix, PrefixTarget::Elsewhere),
        None => (prefix, found.leads),
    });
    main.chain(local.iter().map(|(prefix, ())| (*prefix, PrefixTarget::Elsewhere))).collect()
}

/// Addresses that never mean a remote host, in any table.
const NEVER_FORWARDED: [(IpAddr, u8); 7] = [
    (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8),
    (IpAddr::V4(Ipv4Addr::LOCALHOST), 8),
    (IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    (IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 3),
    (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 96),
    (IpAddr::V6(Ipv6Addr::new(0xFE80, 0, 0, 0, 0, 0, 0, 0)), 10),
    (IpAddr::V6(Ipv6Addr::new(0xFF00, 0, 0, 0, 0, 0, 0, 0)), 8),
];

fn is_plain_family(message: &RouteMessage) -> bool {
    let ip = matches!(message.header.address_family, AddressFamily::Inet | AddressFamily::Inet6);
    ip && !message.header.flags.contains(RouteFlags::Cloned)
}

fn prefix(message: &RouteMessage) -> Option<Prefix> {
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => Some(routes::ip(address)),
        _ => None,
    });
    let bits = message.header.destination_prefix_length;
    let any = match message.header.address_family {
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    // A default route has no destination.
    destination.unwrap_or((bits == 0).then_some(any)).map(|address| Prefix::new(address, bits))
}

fn leads(message: &RouteMessage) -> PrefixTarget {
    let dead = RouteFlags::Dead | RouteFlags::Linkdown | RouteFlags::Unresolved;
    if message.header.kind != RouteType::Unicast
        || message.header.source_prefix_length != 0
        || message.header.flags.intersects(dead)
    {
        return PrefixTarget::Elsewhere;
    }
    let (mut oif, mut gateway, mut mtu) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(address) => gateway = routes::ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(_)
            | RouteAttribute::NhId(_)
            | RouteAttribute::Encap(_)
            | RouteAttribute::EncapType(_)
            | RouteAttribute::Source(_)
            | RouteAttribute::NewDestination(_) => return PrefixTarget::Elsewhere,
            _ => {}
        }
    }
    oif.map_or(PrefixTarget::Elsewhere, |ifindex| PrefixTarget::Out(DeviceRoute { ifindex, gateway, mtu }))
}

/// Whether a rule is one of the default rules: all packets, by the tables `local`, `main` and `default`.
pub(super) fn is_usual(rule: &RuleMessage) -> bool {
    let header = &rule.header;
    let (mut priority, mut table) = (0, header.table.into());
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Table(value) => table = *value,
            // The kernel's values for "nothing is suppressed".
            RuleAttribute::SuppressPrefixLen(u32::MAX) | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            RuleAttribute::Protocol(_) => {}
            _ => return false,
        }
    }
    let plain = header.dst_len == 0 && header.src_len == 0 && header.tos == 0 && header.action == RuleAction::ToTable;
    plain && matches!((priority, table), (0, LOCAL) | (32_766, MAIN) | (32_767, DEFAULT))
}

/// Whether an IP version has routes by source, so that prefixes of destinations alone do not decide.
pub(super) fn goes_by_source(messages: &[RouteMessage], family: AddressFamily) -> bool {
    messages.iter().any(|message| message.header.address_family == family && message.header.source_prefix_length != 0)
}

#[cfg(test)]
mod tests;
