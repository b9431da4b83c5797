//! Guard routes in network namespaces of their own.

use std::net::{Ipv4Addr, Ipv6Addr};

use rtnetlink::{LinkVeth, RouteMessageBuilder, RouteNextHopBuilder};

use super::*;
use crate::kernel::testnet::{DEADLINE, in_namespace};

const MAIN: u32 = 254;

fn v4(to: [u8; 4], bits: u8) -> Destination {
    Destination { to: (to.into(), bits), from: None, table: MAIN, tos: 0 }
}

fn v6(to: &str, bits: u8) -> Destination {
    Destination { to: (to.parse().unwrap(), bits), from: None, table: MAIN, tos: 0 }
}

/// Two devices, up; runs the test with their indexes.
fn with_devices<F: Future<Output = ()>>(test: impl FnOnce(Netlink, u32, u32) -> F + Send + 'static) {
    in_namespace(|netlink| async move {
        for (name, other_end) in [("tun0", "far0"), ("wire0", "far1")] {
            netlink.handle.link().add(LinkVeth::new(name, other_end).build()).execute().await.unwrap();
            netlink.set_up(other_end, true).await;
            netlink.set_up(name, true).await;
        }
        let (tunnel, wire) = (netlink.index("tun0").await, netlink.index("wire0").await);
        test(netlink, tunnel, wire).await;
    });
}

impl Netlink {
    async fn lead(&self, to: Destination, index: u32, metric: u32) {
        match to.to.0 {
            IpAddr::V4(address) => {
                let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, to.to.1);
                let route = route.output_interface(index).table_id(to.table).priority(metric).build();
                self.handle.route().add(route).replace().execute().await.unwrap();
            }
            IpAddr::V6(address) => {
                let route = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(address, to.to.1);
                let route = route.output_interface(index).table_id(to.table).priority(metric).build();
                self.handle.route().add(route).replace().execute().await.unwrap();
            }
        }
    }

    async fn withdraw(&self, to: Destination, index: u32, metric: u32) {
        let IpAddr::V4(address) = to.to.0 else { panic!("of IPv4") };
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(address, to.to.1);
        let route = route.output_interface(index).table_id(to.table).priority(metric).build();
        self.handle.route().del(route).execute().await.unwrap();
    }
}

/// Changes from now on until `count` have come.
async fn changes(routes: &mut DeviceRoutes, count: usize) -> Vec<RouteChange> {
    let mut all = Vec::new();
    let collected = tokio::time::timeout(DEADLINE, async {
        while all.len() < count {
            routes.changed().await.unwrap();
            all.extend(routes.take().await.unwrap());
        }
    });
    assert!(collected.await.is_ok(), "{all:?}");
    all
}

#[test]
fn a_guard_route_decides_when_the_route_has_gone_with_its_device() {
    with_devices(|netlink, tunnel, wire| async move {
        netlink.add_address("wire0", [192, 0, 2, 1].into(), 24).await;
        netlink.lead(v4([0, 0, 0, 0], 0), wire, 0).await;
        let private = v4([10, 9, 0, 0], 16);
        netlink.lead(private, tunnel, 100).await;
        netlink.add_guard_route(&private).await.unwrap();
        // One that is there already is as good.
        netlink.add_guard_route(&private).await.unwrap();
        let to = [10, 9, 1, 1].into();
        assert_eq!(netlink.route(to, None).await.unwrap().oif, tunnel);
        netlink.delete_named("tun0").await;
        let error = netlink.route(to, None).await.unwrap_err().to_string();
        assert!(error.contains("No route to host"), "{error}");
        assert_eq!(netlink.guard_routes().await.unwrap(), [private]);
        netlink.remove_guard_route(&private).await.unwrap();
        netlink.remove_guard_route(&private).await.unwrap();
        assert_eq!(netlink.route(to, None).await.unwrap().oif, wire);
    });
}

#[test]
fn routes_are_told_of_that_are_there_come_and_are_removed() {
    with_devices(|netlink, tunnel, wire| async move {
        let (first, second) = (v4([10, 9, 0, 0], 16), v4([10, 8, 0, 0], 16));
        let third = Destination { table: 1000, ..v4([0, 0, 0, 0], 0) };
        netlink.lead(first, tunnel, 0).await;
        netlink.lead(second, wire, 0).await;
        let mut routes = DeviceRoutes::follow(&netlink, tunnel).unwrap();
        assert_eq!(changes(&mut routes, 1).await, [RouteChange::Led(first)]);
        netlink.lead(third, tunnel, 0).await;
        netlink.lead(v6("2001:db8::", 32), tunnel, 0).await;
        netlink.lead(v6("fe80:1::", 64), tunnel, 0).await;
        netlink.lead(second, tunnel, 7).await;
        let expected = [third, v6("2001:db8::", 32), second].map(RouteChange::Led);
        assert_eq!(changes(&mut routes, 3).await, expected);
        // The last of several to one destination.
        netlink.lead(first, tunnel, 5).await;
        netlink.withdraw(first, tunnel, 0).await;
        netlink.withdraw(second, tunnel, 7).await;
        assert_eq!(changes(&mut routes, 1).await, [RouteChange::Withdrawn(second)]);
        // One that is replaced by a route elsewhere.
        netlink.lead(first, wire, 5).await;
        assert_eq!(changes(&mut routes, 1).await, [RouteChange::Withdrawn(first)]);
    });
}

#[test]
fn the_kernel_lists_only_the_routes_that_are_asked_for() {
    with_devices(|netlink, tunnel, wire| async move {
        for third in 0..100 {
            netlink.lead(v4([10, 9, third, 0], 24), wire, 0).await;
            netlink.lead(v6(&format!("2001:db8:{third}::"), 48), wire, 0).await;
        }
        netlink.lead(v4([10, 8, 0, 0], 16), tunnel, 0).await;
        netlink.add_guard_route(&v4([10, 8, 0, 0], 16)).await.unwrap();
        let private = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix([10, 7, 0, 0].into(), 16);
        let hops = [wire, tunnel].map(|index| RouteNextHopBuilder::new_ipv4().interface(index).build());
        netlink.handle.route().add(private.multipath(hops.into()).build()).execute().await.unwrap();
        let listed = async |pattern: &RouteMessage| {
            let routes = netlink.routes_like(pattern).await.unwrap();
            let v4 = routes.iter().filter(|route| route.header.address_family == AddressFamily::Inet);
            // Those of addresses and multicast, which the kernel adds, aside.
            v4.filter(|route| table(route) == MAIN)
                .filter_map(Leading::from_message)
                .map(|led| led.destination)
                .collect()
        };
        let mut into = RouteMessage::default();
        into.attributes.push(RouteAttribute::Oif(tunnel));
        let mut seen: Vec<_> = listed(&into).await;
        seen.sort_unstable();
        assert_eq!(seen, [v4([10, 7, 0, 0], 16), v4([10, 8, 0, 0], 16)]);
        let mut guards = RouteMessage::default();
        guards.header.protocol = RouteProtocol::Other(PROTOCOL);
        assert_eq!(listed(&guards).await, [v4([10, 8, 0, 0], 16)]);
    });
}

#[test]
fn routes_that_go_with_the_device_are_not_withdrawn() {
    with_devices(|netlink, tunnel, wire| async move {
        let guarded = [v4([10, 9, 0, 0], 16), v6("2001:db8::", 32)];
        let mut routes = DeviceRoutes::follow(&netlink, tunnel).unwrap();
        for destination in guarded {
            netlink.lead(destination, tunnel, 0).await;
        }
        assert_eq!(changes(&mut routes, 2).await, guarded.map(RouteChange::Led));
        netlink.set_up("tun0", false).await;
        netlink.set_up("tun0", true).await;
        netlink.delete_named("tun0").await;
        // What comes after all that: a device gets its name and its index again.
        let mut again = LinkVeth::new("tun0", "far0").build();
        again.header.index = tunnel;
        netlink.handle.link().add(again).execute().await.unwrap();
        netlink.set_up("tun0", true).await;
        netlink.lead(guarded[0], wire, 9).await;
        netlink.lead(guarded[0], tunnel, 0).await;
        assert_eq!(changes(&mut routes, 1).await, [RouteChange::Led(guarded[0])]);
        let nothing = tokio::time::timeout(Duration::ZERO, routes.changed()).await;
        assert!(nothing.is_err(), "{:?}", routes.take().await);
    });
}
