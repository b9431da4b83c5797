//! The routes of packets to an address.

use std::io;
use std::net::{IpAddr, SocketAddr};

use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::io::Errno;

use super::netlink::{Error, Netlink, Result};
use super::zone::{self, ShownHost};

const PROTOCOL_UDP: u8 = 17;

/// The route of packets to an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Index of the egress device.
    pub oif: u32,
    /// The router, if the address is not on the link itself; may be IPv6 for an IPv4 address.
    pub gateway: Option<IpAddr>,
    /// The source address of the packets.
    pub source: IpAddr,
    /// MTU in octets that is configured for the route; if there is none, the device's MTU applies. A path MTU that the
    /// kernel has learned from ICMP is not included, because anybody can send ICMP errors.
    pub mtu: Option<u32>,
    /// Whether the address is one of this host's own: packets never leave it.
    pub local: bool,
}

/// The result of a look-up.
struct Found {
    route: Route,
    /// Whether it expires, as routes with a learned path MTU do.
    expires: bool,
}

/// UDP datagrams, with the properties that routes and rules can distinguish. Their user is this process's (`uidrange`
/// of ip-rule(8)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Destination.
    pub to: IpAddr,
    /// Own address, if it is fixed.
    pub from: Option<IpAddr>,
    /// Own port and the peer's; 0: not known.
    pub ports: [u16; 2],
    /// Mark of the socket (SO_MARK); 0: none.
    pub mark: u32,
    /// Index of the device that their socket is bound to (SO_BINDTODEVICE), if it is bound. For a VRF, or a device in
    /// one, the kernel uses the VRF's table. For a link-local address, the device is its zone.
    pub device: Option<u32>,
}

impl Flow {
    /// Packets to an address, from the own address `from` if that is given.
    pub fn new(to: IpAddr, from: Option<IpAddr>) -> Self {
        Self { to, from: from.filter(|from| !from.is_unspecified()), ports: [0; 2], mark: 0, device: None }
    }

    /// Datagrams from the socket that is bound to `from`, whose address and port may be unspecified. Datagrams between
    /// link-local addresses leave through the device of these addresses.
    pub fn of_socket(from: SocketAddr, to: SocketAddr, mark: u32) -> Self {
        let device = zone::of(to).or(zone::of(from));
        Self { ports: [from.port(), to.port()], mark, device, ..Self::new(to.ip(), Some(from.ip())) }
    }
}

impl Netlink {
    /// Asks the kernel for the route to `peer`, for packets from the own address `from` if that is given.
    ///
    /// # Errors
    /// As [`Netlink::route_of`].
    pub async fn route(&self, peer: IpAddr, from: Option<IpAddr>) -> Result<Route> {
        self.route_of(Flow::new(peer, from)).await
    }

    /// Asks the kernel for the route that datagrams take. The answer does not include later changes by a firewall
    /// (`type route hook output` of nftables).
    ///
    /// # Errors
    /// As [`Self::route`].
    pub async fn route_of(&self, flow: Flow) -> Result<Route> {
        let (peer, from) = (flow.to, flow.from);
        let mut route = self.look_up(flow).await;
        // A route that expires may have a path MTU from an ICMP error, so ask for the configured route.
        if let Ok(Found { route: Route { mtu: mtu @ Some(_), .. }, expires: true }) = &mut route
            && let Ok(configured) = self.ask(flow, RouteFlags::FibMatch).await
        {
            *mtu = mtu_of(&configured);
        }
        let route = route.map(|found| found.route);
        // If an address is not ours, IPv4 reports that the network is unreachable, and IPv6 finds a route anyway.
        if let Some(from) = from.filter(|from| route.is_err() || from.is_ipv6())
            && !self
                .look_up(Flow { device: flow.device, ..Flow::new(from, None) })
                .await
                .is_ok_and(|found| found.route.local)
        {
            let shown = |ip| ShownHost(ip, flow.device);
            return Err(Error::NotOurAddress { peer: shown(peer), from: shown(from) });
        }
        route
    }

    async fn look_up(&self, flow: Flow) -> Result<Found> {
        let peer = ShownHost(flow.to, flow.device);
        let route = self.ask(flow, RouteFlags::empty()).await?;
        match route.header.kind {
            // IPv6 answers with a route of a refusing type.
            RouteType::Unreachable => Err(no_route(peer, Errno::NETUNREACH)),
            RouteType::Prohibit => Err(no_route(peer, Errno::ACCESS)),
            RouteType::BlackHole => Err(no_route(peer, Errno::INVAL)),
            _ => parse(&route, flow.from).ok_or_else(|| Error::Answer(what(peer))),
        }
    }

    /// Asks the kernel for the route of a flow.
    async fn ask(&self, flow: Flow, flags: RouteFlags) -> Result<RouteMessage> {
        let Flow { to, from, ports: [own_port, port], mark, device } = flow;
        let peer = ShownHost(to, device);
        let mut message = RouteMessage::default();
        let (family, bits) = match to {
            IpAddr::V4(_) => (AddressFamily::Inet, 32),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.address_family = family;
        message.header.flags = flags;
        message.header.destination_prefix_length = bits;
        message.attributes.push(RouteAttribute::Destination(to.into()));
        if let Some(from) = from {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(from.into()));
        }
        if own_port != 0 || port != 0 {
            message.attributes.push(RouteAttribute::IpProto(PROTOCOL_UDP));
        }
        message.attributes.extend((own_port != 0).then_some(RouteAttribute::Sport(own_port)));
        message.attributes.extend((port != 0).then_some(RouteAttribute::Dport(port)));
        message.attributes.extend(device.map(RouteAttribute::Oif));
        message.attributes.extend((mark != 0).then_some(RouteAttribute::Mark(mark)));
        let answers = self.request(|| what(peer), RouteNetlinkMessage::GetRoute(message), 0).await;
        let answers = answers.map_err(|error| refusal(error, peer))?;
        let route = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        });
        route.ok_or_else(|| Error::Answer(what(peer)))
    }
}

/// The request, for errors.
fn what(peer: ShownHost) -> String {
    format!("cannot look up the carrier route to {peer}")
}

fn refusal(error: Error, peer: ShownHost) -> Error {
    match error.errno().map(Errno::from_raw_os_error) {
        Some(errno @ (Errno::NETUNREACH | Errno::HOSTUNREACH | Errno::ACCESS | Errno::INVAL | Errno::NETDOWN)) => {
            no_route(peer, errno)
        }
        _ => error,
    }
}

fn no_route(peer: ShownHost, errno: Errno) -> Error {
    // The kernel's message for these errors ("Invalid argument") is misleading.
    let cause = match errno {
        Errno::INVAL => io::Error::other("a blackhole route"),
        Errno::ACCESS => io::Error::other("a prohibit route"),
        errno => errno.into(),
    };
    Error::NoRoute { peer, cause }
}

fn parse(message: &RouteMessage, from: Option<IpAddr>) -> Option<Found> {
    let local = message.header.kind == RouteType::Local;
    let (mut oif, mut gateway, mut source, mut expires) = (None, None, from, false);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => gateway = Some((*address).into()),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::CacheInfo(cache) => expires = cache.expires != 0,
            _ => {}
        }
    }
    let route = Route { oif: oif?, gateway, source: source?, mtu: mtu_of(message), local };
    Some(Found { route, expires })
}

/// Returns the MTU among the metrics of a route, in octets.
fn mtu_of(message: &RouteMessage) -> Option<u32> {
    let metrics = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Metrics(metrics) => Some(metrics),
        _ => None,
    })?;
    metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// The IP address in a route attribute.
pub(super) fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// The table of a route.
pub(super) fn table(message: &RouteMessage) -> u32 {
    let attribute = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Table(table) => Some(*table),
        _ => None,
    });
    attribute.unwrap_or(message.header.table.into())
}

/// The metric of a route.
pub(super) fn priority(message: &RouteMessage) -> u32 {
    let priority = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(priority) => Some(*priority),
        _ => None,
    });
    priority.unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::kernel::testnet::{Other, in_namespace};

    const HERE: [u8; 4] = [192, 0, 2, 1];
    const THERE: [u8; 4] = [192, 0, 2, 2];

    fn ip(octets: [u8; 4]) -> IpAddr {
        Ipv4Addr::from(octets).into()
    }

    #[test]
    fn a_route_names_device_gateway_and_source() {
        in_namespace(|netlink| async move {
            let other = Other::new();
            netlink.cable("wire0", HERE, &other, "far0", THERE).await;
            netlink.add_route([203, 0, 113, 0], 24, THERE).await;
            let oif = netlink.index("wire0").await;
            let source = ip(HERE);
            let on_link = Route { oif, gateway: None, source, mtu: None, local: false };
            assert_eq!(netlink.route(ip(THERE), None).await.unwrap(), on_link);
            let behind = Route { gateway: Some(ip(THERE)), ..on_link };
            assert_eq!(netlink.route(ip([203, 0, 113, 9]), Some(source)).await.unwrap(), behind);
        });
    }

    #[test]
    fn a_device_has_a_route_of_its_own() {
        in_namespace(|netlink| async move {
            let other = Other::new();
            netlink.cable("wire0", HERE, &other, "far0", THERE).await;
            netlink.cable("wire1", [198, 51, 100, 1], &other, "far1", [198, 51, 100, 2]).await;
            let (one, two) = (netlink.index("wire0").await, netlink.index("wire1").await);
            netlink.add_route([0, 0, 0, 0], 0, THERE).await;
            let far = ip([203, 0, 113, 9]);
            let by = |device| Flow { device, ..Flow::new(far, None) };
            assert_eq!(netlink.route_of(by(None)).await.unwrap().oif, one);
            assert_eq!(netlink.route_of(by(Some(one))).await.unwrap().gateway, Some(ip(THERE)));
            // Without a route through the device, the kernel assumes that the address is on its link.
            let route = netlink.route_of(by(Some(two))).await.unwrap();
            assert_eq!((route.oif, route.gateway, route.source), (two, None, ip([198, 51, 100, 1])));
            assert!(netlink.route_of(by(Some(9999))).await.is_err());
        });
    }

    #[test]
    fn an_ipv6_source_that_is_not_ours_is_refused() {
        in_namespace(|netlink| async move {
            let own = Ipv6Addr::LOCALHOST.into();
            netlink.route(own, Some(own)).await.unwrap();
            let error = netlink.route(own, Some("2001:db8::77".parse().unwrap())).await.unwrap_err();
            assert!(matches!(error, Error::NotOurAddress { .. }), "{error}");
        });
    }

    #[test]
    fn link_local_addresses_are_looked_up_at_their_device() {
        in_namespace(|netlink| async move {
            // The loopback device has the same index in each network namespace.
            let at = |text: &str| text.parse().unwrap();
            let flow = Flow::of_socket(at("[fe80::77%1]:6789"), at("[fe80::2%1]:6790"), 0);
            assert_eq!((flow.device, flow.ports), (Some(1), [6789, 6790]));
            assert_eq!(Flow::of_socket(at("[::]:6789"), at("[fe80::2%1]:6790"), 0).device, Some(1));
            assert_eq!(Flow::of_socket(at("[fe80::77%1]:6789"), at("[2001:db8::2]:6790"), 0).device, Some(1));
            assert_eq!(Flow::of_socket(at("[2001:db8::1]:6789"), at("[2001:db8::2]:6790"), 0).device, None);
            let error = netlink.route_of(flow).await.unwrap_err().to_string();
            let expected =
                "no carrier route to fe80::2%lo from fe80::77%lo: fe80::77%lo is not an address of this host";
            assert!(error.starts_with(expected), "{error}");
        });
    }

    #[test]
    fn an_own_address_is_local() {
        in_namespace(|netlink| async move {
            let route = netlink.route(Ipv4Addr::LOCALHOST.into(), None).await.unwrap();
            assert!(route.local);
        });
    }

    #[test]
    fn no_route_says_so() {
        in_namespace(|netlink| async move {
            for peer in ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()] {
                let error = netlink.route(peer, None).await.unwrap_err().to_string();
                let expected = format!(
                    "no carrier route to {peer}: Network is unreachable (os error 101); \
                     add a route or check the carrier device"
                );
                assert_eq!(error, expected);
            }
        });
    }
}
