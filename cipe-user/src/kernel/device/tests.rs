use std::net::{Ipv4Addr, Ipv6Addr};

use futures_util::future::join_all;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;

mod offloads;
mod silence;

use super::*;
use crate::kernel::addresses::AddressConfiguration;
use crate::kernel::hub::Framing;
use crate::kernel::links::LinkChange;
use crate::kernel::testnet::{DEADLINE, Other, in_namespace};

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 1));
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 9, 0, 2));

fn wanted() -> TunnelDevice {
    TunnelDevice {
        name: None,
        prefix: "cipcb".to_owned(),
        ethernet: false,
        local: LOCAL,
        peer: PEER,
        mac: [0x1E, 0, 0, 0, 0, 7],
        mtu: 1442,
        configuration: AddressConfiguration::default(),
        owner: std::process::id(),
    }
}

/// The `n`th device; each has its own address.
fn nth(n: u8) -> TunnelDevice {
    TunnelDevice { mac: [0x1E, 0, 0, 0, 1, n], ..wanted() }
}

async fn hub(netlink: &Netlink) -> Hub {
    netlink.make_hub(Framing::Superframes, 1).await.unwrap()
}

fn named(name: &str) -> TunnelDevice {
    TunnelDevice { name: Some(name.to_owned()), ..wanted() }
}

/// The alias of a device whose process has died.
pub(in crate::kernel) fn dead_alias(what: &str) -> LinkAttribute {
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap();
    LinkAttribute::IfAlias(format!("{what}, pid 4194305 start=1 {}", namespace.display()))
}

/// Addresses of a device: own, other end, bits.
async fn addresses(netlink: &Netlink, index: u32) -> Vec<(IpAddr, IpAddr, u8)> {
    let mut found = Vec::new();
    let mut stream = Box::pin(netlink.handle.address().get().set_link_index_filter(index).execute());
    while let Some(message) = stream.next().await {
        let message = message.unwrap();
        let (mut local, mut other) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(address) => local = Some(*address),
                AddressAttribute::Address(address) => other = Some(*address),
                _ => {}
            }
        }
        found.push((local.or(other).unwrap(), other.unwrap(), message.header.prefix_len));
    }
    found
}

async fn link(netlink: &Netlink, index: u32) -> LinkMessage {
    netlink.links().await.unwrap().into_iter().find(|link| link.header.index == index).unwrap()
}

#[test]
fn a_tunnel_device_is_up_and_point_to_point() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        let device = netlink.make(&hub, &wanted()).await.unwrap();
        assert_eq!((device.name.as_str(), device.mac), ("cipcb0", wanted().mac));
        assert_eq!(addresses(&netlink, device.index).await, [(LOCAL, PEER, 32)]);
        let route = netlink.route(PEER, None).await.unwrap();
        assert_eq!((route.oif, route.source), (device.index, LOCAL));
        let link = link(&netlink, device.index).await;
        let flags = link.header.flags;
        assert!(flags.contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Noarp), "{flags}");
        assert!(!flags.contains(LinkFlags::Multicast), "{flags}");
        let card = Card::from_message(&link).unwrap();
        assert_eq!((card.mac, card.mtu), (Some(device.mac), 1442));
    });
}

#[test]
fn an_ipv6_tunnel_device_has_no_address_but_its_own() {
    in_namespace(|netlink| async move {
        let (local, peer): (Ipv6Addr, Ipv6Addr) = ("fd00::1".parse().unwrap(), "fd00::2".parse().unwrap());
        let wanted = TunnelDevice { local: local.into(), peer: peer.into(), ..wanted() };
        let device = netlink.make(&hub(&netlink).await, &wanted).await.unwrap();
        assert_eq!(addresses(&netlink, device.index).await, [(local.into(), peer.into(), 128)]);
        assert_eq!(netlink.route(peer.into(), None).await.unwrap().oif, device.index);
    });
}

#[test]
fn a_tunnel_device_may_be_too_small_for_ipv6_and_have_no_peer_yet() {
    in_namespace(|netlink| async move {
        let wanted = TunnelDevice { mtu: 576, peer: Ipv4Addr::UNSPECIFIED.into(), ..wanted() };
        let device = netlink.make(&hub(&netlink).await, &wanted).await.unwrap();
        assert_eq!(addresses(&netlink, device.index).await, [(LOCAL, LOCAL, 32)]);
    });
}

#[test]
fn the_next_free_name_is_taken() {
    in_namespace(|netlink| async move {
        let (netlink, hub) = (&netlink, &hub(&netlink).await);
        let devices = join_all((0..3).map(|n| async move { netlink.make(hub, &nth(n)).await.unwrap() })).await;
        let mut names: Vec<_> = devices.iter().map(|device| device.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["cipcb0", "cipcb1", "cipcb2"]);
        let middle = devices.iter().find(|device| device.name == "cipcb1").unwrap();
        netlink.remove(middle).await.unwrap();
        assert_eq!(netlink.make(hub, &nth(3)).await.unwrap().name, "cipcb1");
    });
}

#[test]
fn a_taken_or_impossible_name_is_one_clear_line() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        netlink.make(&hub, &named("cipcb0")).await.unwrap();
        let before = netlink.names().await;
        let taken = netlink.make(&hub, &TunnelDevice { mac: nth(1).mac, ..named("cipcb0") }).await.unwrap_err();
        assert_eq!(
            taken.to_string(),
            "cipcb0: a network device of this name exists; choose another or leave the name out for the next free one"
        );
        for name in ["", "a b", "a/b", "cipcb%d", "sixteen-letters-"] {
            let error = netlink.make(&hub, &named(name)).await.unwrap_err();
            assert!(matches!(error, Error::NameInvalid(_)), "{error}");
        }
        assert_eq!(netlink.names().await, before);
    });
}

#[test]
fn two_devices_of_a_hub_never_have_the_same_address() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        netlink.make(&hub, &wanted()).await.unwrap();
        let before = netlink.names().await;
        netlink.make(&hub, &wanted()).await.unwrap_err();
        assert_eq!(netlink.names().await, before);
    });
}

#[test]
fn a_refused_mtu_or_address_leaves_nothing_behind() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        let before = netlink.names().await;
        let error = netlink.make(&hub, &TunnelDevice { mtu: 20, ..wanted() }).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "cipcbN: cannot make it with MTU 20 on cipehub0: Invalid argument (os error 22) \
             (mtu less than device minimum)"
        );
        let wrong = TunnelDevice { local: Ipv6Addr::LOCALHOST.into(), ..wanted() };
        let error = netlink.make(&hub, &wrong).await.unwrap_err();
        assert!(error.to_string().starts_with("cipcb0: cannot set the address ::1 peer 10.9.0.2: "), "{error}");
        assert_eq!(netlink.names().await, before);
    });
}

#[test]
fn fifty_makes_and_removes_leave_nothing() {
    in_namespace(|netlink| async move {
        let before = netlink.names().await;
        let hub = hub(&netlink).await;
        for _ in 0..50 {
            let device = netlink.make(&hub, &wanted()).await.unwrap();
            assert_eq!(device.name, "cipcb0");
            netlink.remove(&device).await.unwrap();
        }
        netlink.remove_hub(&hub).await.unwrap();
        assert_eq!(netlink.names().await, before);
    });
}

#[test]
fn several_are_removed_together_wherever_they_are_and_nothing_else() {
    in_namespace(|netlink| async move {
        let (hub, other) = (hub(&netlink).await, Other::new());
        let mut devices = Vec::new();
        for n in 0..6 {
            devices.push(netlink.make(&hub, &nth(n)).await.unwrap());
        }
        netlink.move_to("cipcb1", &other).await;
        netlink.delete_named("cipcb2").await;
        let going: Vec<&Device> = devices[..5].iter().collect();
        netlink.remove_all(&going).await.unwrap();
        assert_eq!(netlink.names().await, ["lo", "cipehub0x", "cipehub0", "cipcb5"]);
        assert_eq!(other.run(|netlink| async move { netlink.names().await }).await, ["lo"]);
        netlink.remove_all(&going).await.unwrap();
        netlink.remove_all(&[]).await.unwrap();
    });
}

#[test]
fn removing_what_is_gone_is_no_error() {
    in_namespace(|netlink| async move {
        let device = netlink.make(&hub(&netlink).await, &wanted()).await.unwrap();
        netlink.delete_named(&device.name).await;
        netlink.remove(&device).await.unwrap();
    });
}

#[test]
fn a_device_that_was_moved_to_another_namespace_is_removed_too() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        let before = netlink.names().await;
        let other = Other::new();
        let device = netlink.make(&hub, &wanted()).await.unwrap();
        netlink.move_to(&device.name, &other).await;
        netlink.remove(&device).await.unwrap();
        assert_eq!(netlink.names().await, before);
        assert_eq!(other.run(|netlink| async move { netlink.names().await }).await, ["lo"]);
    });
}

#[test]
fn what_a_dead_engine_left_can_be_adopted() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        let made = netlink.make(&hub, &wanted()).await.unwrap();
        let adopt = async |name: &str, wanted: &TunnelDevice| netlink.adopt(name, wanted, &[&hub]).await.unwrap();
        let other = TunnelDevice { owner: std::os::unix::process::parent_id(), ..nth(1) };
        assert_eq!(adopt("cipcb0", &other).await, None, "its owner is another, and lives");
        assert_eq!(adopt("cipcb0", &nth(1)).await, Some((0, made.clone())), "its owner asks");
        netlink.set_attribute(&made.name, dead_alias(ALIAS)).await;
        assert_eq!(adopt("cipcb1", &other).await, None, "no such device");
        assert_eq!(netlink.adopt("cipcb0", &other, &[]).await.unwrap(), None, "on no hub of ours");
        let other = TunnelDevice { mtu: 1400, ..other };
        assert_eq!(adopt("cipcb0", &other).await, Some((0, made.clone())), "its owner is gone");
        assert_eq!(netlink.card(made.index).await.unwrap().mtu, 1400);
        assert_eq!(addresses(&netlink, made.index).await, [(LOCAL, PEER, 32)]);
        assert_eq!(adopt("cipcb0", &wanted()).await, None, "its new owner lives");
    });
}

#[test]
fn what_happens_to_a_device_is_told() {
    in_namespace(|netlink| async move {
        let device = netlink.make(&hub(&netlink).await, &wanted()).await.unwrap();
        let mut events = netlink.watch_links().await.unwrap();
        let mut next = async |change| loop {
            let event = tokio::time::timeout(DEADLINE, events.recv()).await.unwrap().unwrap();
            if event.ifindex == device.index && event.change == change {
                return event.name;
            }
        };
        netlink.set_up("cipcb0", false).await;
        assert_eq!(next(LinkChange::Down).await, "cipcb0");
        netlink.set_attribute("cipcb0", LinkAttribute::IfName("tunnel".to_owned())).await;
        assert_eq!(next(LinkChange::Renamed).await, "tunnel");
        netlink.set_up("tunnel", true).await;
        assert_eq!(next(LinkChange::Up).await, "tunnel");
        netlink.remove(&device).await.unwrap();
        assert_eq!(next(LinkChange::Deleted).await, "tunnel");
    });
}
