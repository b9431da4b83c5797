//! Which way packets to an address go.

use std::io;
use std::net::IpAddr;

use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteType, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::netlink::{Error, Netlink, Result};

/// The way of packets to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Index of the device that they leave by.
    pub oif: u32,
    /// The router, if the address is not on the link itself; may be IPv6 for an IPv4 address.
    pub gateway: Option<IpAddr>,
    /// The source address that they get.
    pub source: IpAddr,
    /// Path MTU in octets, if the route has one of its own (configured or learned); the device's counts else.
    pub mtu: Option<u32>,
    /// The address is one of this host's own: packets never leave it.
    pub local: bool,
}

impl Netlink {
    /// Asks the kernel for the route to `peer`, for packets from the own address `from` if that is given.
    ///
    /// # Errors
    /// There is no route, or `from` is not an address of this host.
    pub async fn route(&self, peer: IpAddr, from: Option<IpAddr>) -> Result<Route> {
        let from = from.filter(|from| !from.is_unspecified());
        let mut message = RouteMessage::default();
        let (family, bits) = match peer {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.address_family = family;
        message.header.destination_prefix_length = bits;
        message.attributes.push(RouteAttribute::Destination(peer.into()));
        if let Some(from) = from {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(from.into()));
        }
        let what = || format!("cannot look up the carrier route to {peer}");
        let answers = self.request(what, RouteNetlinkMessage::GetRoute(message), 0).await;
        let answers = answers.map_err(|error| refusal(error, peer, from))?;
        let route = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        let route = route.ok_or_else(|| Error::Answer(what()))?;
        match route.header.kind {
            RouteType::Unicast
            | RouteType::Local
            | RouteType::Broadcast
            | RouteType::Multicast
            | RouteType::Anycast => {}
            // IPv6 answers with a route that refuses.
            kind => return Err(no_route(peer, unreachable(kind))),
        }
        parse(&route, from).ok_or_else(|| Error::Answer(what()))
    }
}

fn refusal(error: Error, peer: IpAddr, from: Option<IpAddr>) -> Error {
    let Error::Refused { source, .. } = &error else { return error };
    let errno = source.raw_os_error().map(Errno::from_raw_os_error);
    match (errno, from) {
        (Some(Errno::INVAL), Some(from)) => Error::NotOurAddress { peer, from },
        (Some(Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS | Errno::INVAL | Errno::NETDOWN), _) => {
            no_route(peer, errno.unwrap_or(Errno::NETUNREACH))
        }
        _ => error,
    }
}

fn unreachable(kind: RouteType) -> Errno {
    match kind {
        RouteType::Prohibit => Errno::ACCESS,
        RouteType::BlackHole => Errno::INVAL,
        _ => Errno::NETUNREACH,
    }
}

fn no_route(peer: IpAddr, errno: Errno) -> Error {
    // What the kernel says of a black hole ("Invalid argument") misleads.
    let source = match errno {
        Errno::INVAL => io::Error::other("a blackhole route"),
        Errno::ACCESS => io::Error::other("a prohibit route"),
        errno => errno.into(),
    };
    Error::NoRoute { peer, source }
}

fn parse(message: &RouteMessage, from: Option<IpAddr>) -> Option<Route> {
    let local = message.header.kind == RouteType::Local;
    let (mut oif, mut gateway, mut source, mut mtu) = (None, None, from, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Metrics(metrics) => {
                mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    Some(Route { oif: oif?, gateway, source: source?, mtu, local })
}

/// The IP address in a route attribute.
pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}
