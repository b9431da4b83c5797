use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::link::LinkFlags;

use super::*;
use crate::kernel::addresses::AddressConfiguration;
use crate::kernel::device::tests::dead_alias;
use crate::kernel::testnet::in_namespace;

fn wanted() -> TunnelDevice {
    TunnelDevice {
        name: None,
        prefix: "cipdb".to_owned(),
        ethernet: true,
        mac: [0x1E, 0, 0, 0, 0, 9],
        local: Ipv4Addr::UNSPECIFIED.into(),
        peer: Ipv4Addr::UNSPECIFIED.into(),
        mtu: 1428,
        owner: std::process::id(),
        configuration: AddressConfiguration::default(),
    }
}

#[test]
fn a_device_is_an_ethernet_card_and_its_hidden_end_is_silent() {
    in_namespace(|netlink| async move {
        let (pair, device) = netlink.make_ethernet(&wanted(), 1).await.unwrap();
        assert_eq!((device.name.as_str(), pair.framing), ("cipdb0", Framing::Ethernet));
        for link in netlink.links().await.unwrap() {
            let (flags, card) = (link.header.flags, Card::from_message(&link).unwrap());
            match card.name.as_str() {
                "cipdb0" => {
                    assert!(flags.contains(LinkFlags::Up | LinkFlags::Broadcast | LinkFlags::Multicast), "{flags}");
                    assert!(!flags.contains(LinkFlags::Noarp), "{flags}");
                    assert_eq!((card.mtu, card.mac), (1428, Some([0x1E, 0, 0, 0, 0, 9])));
                }
                "cipdb0x" => {
                    assert!(flags.contains(LinkFlags::Up | LinkFlags::Noarp), "{flags}");
                    assert!(!flags.contains(LinkFlags::Multicast), "{flags}");
                }
                other => assert_eq!(other, "lo"),
            }
        }
        netlink.remove(&device).await.unwrap();
        netlink.remove_hub(&pair).await.unwrap();
        assert_eq!(netlink.names().await, ["lo"]);
    });
}

#[test]
fn a_name_that_is_taken_is_refused_and_nothing_is_left() {
    in_namespace(|netlink| async move {
        let named = TunnelDevice { name: Some("cipdb7".to_owned()), ..wanted() };
        netlink.make_ethernet(&named, 1).await.unwrap();
        let error = netlink.make_ethernet(&named, 1).await.unwrap_err().to_string();
        assert!(error.contains("cipdb7: a network device of this name exists"), "{error}");
        assert_eq!(netlink.names().await.len(), 3);
    });
}

#[test]
fn what_a_dead_engine_left_is_taken_over_or_swept_by_its_owners_fate() {
    in_namespace(|netlink| async move {
        let local = IpAddr::from([10, 9, 0, 1]);
        let (pair, device) = netlink.make_ethernet(&TunnelDevice { local, ..wanted() }, 1).await.unwrap();
        let (other, _) = netlink.make_ethernet(&wanted(), 1).await.unwrap();
        for pair in [&pair, &other] {
            let hidden = netlink.card(pair.hidden_index).await.unwrap().name;
            netlink.set_attribute(&hidden, dead_alias("cipe hub of Ethernet frames")).await;
        }
        netlink.set_attribute(&other.name, dead_alias("cipe tunnel")).await;
        let inheritance = netlink.inherit(&[]).await.unwrap();
        assert_eq!((inheritance.swept, &inheritance.hubs[..]), (vec![other.name], std::slice::from_ref(&pair)));
        let named = TunnelDevice { name: Some(device.name.clone()), mtu: 1300, ..wanted() };
        let pairs = [&pair];
        assert_eq!(netlink.adopt_ethernet("cipdb0", &named, &pairs).await.unwrap(), Some((0, device.clone())));
        assert_eq!(netlink.card(device.index).await.unwrap().mtu, 1300);
        assert_eq!(netlink.adopt_ethernet("cipdb8", &named, &pairs).await.unwrap(), None);
        // A living daemon's device cannot be adopted.
        let foreign = TunnelDevice { owner: std::process::id() + 1, ..named };
        assert_eq!(netlink.adopt_ethernet("cipdb0", &foreign, &pairs).await.unwrap(), None);
    });
}
