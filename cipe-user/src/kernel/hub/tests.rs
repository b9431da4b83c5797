use std::net::Ipv4Addr;

use rtnetlink::LinkVeth;

use super::*;
use crate::kernel::addresses::AddressConfiguration;
use crate::kernel::device::TunnelDevice;
use crate::kernel::device::tests::dead_alias;
use crate::kernel::testnet::in_namespace;

fn wanted(n: u8) -> TunnelDevice {
    TunnelDevice {
        name: None,
        prefix: "cipcb".to_owned(),
        ethernet: false,
        mac: [0x1E, 0, 0, 0, 0, n],
        local: Ipv4Addr::new(10, 9, n, 1).into(),
        peer: Ipv4Addr::new(10, 9, n, 2).into(),
        mtu: 1442,
        owner: std::process::id(),
        configuration: AddressConfiguration::default(),
    }
}

async fn hidden_name(netlink: &Netlink, hub: &Hub) -> String {
    netlink.card(hub.hidden_index).await.unwrap().name
}

/// Makes a hub look like that of a dead engine.
async fn kill_engine_of(netlink: &Netlink, hub: &Hub) {
    netlink.set_attribute(&hidden_name(netlink, hub).await, dead_alias(&alias_for(hub.framing))).await;
}

/// As on kernels before 6.2, which send no echo of the new device.
#[test]
fn what_the_kernel_made_is_found_without_its_telling() {
    in_namespace(|netlink| async move {
        let first = netlink.make_hub(Framing::SingleFrames, 1).await.unwrap();
        assert_eq!(netlink.unfinished().await.unwrap(), None);
        let pair = netlink.make_pair(vec![LinkAttribute::IfName(NAME_TEMPLATE.to_owned())], 1).await.unwrap();
        assert_eq!(netlink.unfinished().await.unwrap(), Some(pair));
        let second = netlink.make_hub(Framing::SingleFrames, 1).await.unwrap();
        let device = netlink.make(&first, &wanted(1)).await.unwrap();
        netlink.make(&first, &wanted(2)).await.unwrap();
        assert_eq!(netlink.on_hub(&first, wanted(1).mac).await.unwrap().unwrap().ifindex, device.index);
        assert_eq!(netlink.on_hub(&second, wanted(1).mac).await.unwrap(), None);
    });
}

#[test]
fn a_hub_is_up_silent_and_takes_the_largest_frames() {
    in_namespace(|netlink| async move {
        let hub = netlink.make_hub(Framing::Superframes, 4).await.unwrap();
        assert_eq!((hub.name.as_str(), hidden_name(&netlink, &hub).await.as_str()), ("cipehub0", "cipehub0x"));
        for link in netlink.links().await.unwrap() {
            let card = Card::from_message(&link).unwrap();
            if card.name == "lo" {
                continue;
            }
            let flags = link.header.flags;
            assert!(flags.contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Noarp), "{flags}");
            assert!(!flags.contains(LinkFlags::Multicast), "{flags}");
            assert_eq!(card.mtu, MTU);
            assert_eq!(netlink.card(card.ifindex).await.unwrap().receive_queues, 4);
            let switch = |name| std::fs::read_to_string(format!("/proc/sys/net/{name}")).unwrap();
            assert_eq!(switch(format!("ipv6/conf/{}/disable_ipv6", card.name)), "1\n");
            assert_eq!(switch(format!("ipv4/conf/{}/rp_filter", card.name)), "1\n");
        }
    });
}

#[test]
fn the_name_of_the_hidden_end_may_be_in_use_by_anybody() {
    in_namespace(|netlink| async move {
        netlink.handle.link().add(LinkVeth::new("cipehub0x", "foreign").build()).execute().await.unwrap();
        let hub = netlink.make_hub(Framing::SingleFrames, 1).await.unwrap();
        assert!(hidden_name(&netlink, &hub).await.starts_with("cx"));
        let device = netlink.make(&hub, &wanted(1)).await.unwrap();
        kill_engine_of(&netlink, &hub).await;
        assert_eq!(netlink.inherit(&[]).await.unwrap().hubs, std::slice::from_ref(&hub));
        netlink.remove(&device).await.unwrap();
        netlink.remove_hub(&hub).await.unwrap();
        assert_eq!(netlink.names().await, ["lo", "foreign", "cipehub0x"]);
    });
}

#[test]
fn a_hub_is_in_use_while_a_device_stands_on_it() {
    in_namespace(|netlink| async move {
        let hub = netlink.make_hub(Framing::Superframes, 1).await.unwrap();
        let other = netlink.make_hub(Framing::Superframes, 1).await.unwrap();
        let device = netlink.make(&hub, &wanted(1)).await.unwrap();
        assert!(netlink.is_in_use(&hub).await.unwrap());
        assert!(!netlink.is_in_use(&other).await.unwrap());
        netlink.remove(&device).await.unwrap();
        assert!(!netlink.is_in_use(&hub).await.unwrap());
    });
}

#[test]
fn a_hub_takes_its_devices_along() {
    in_namespace(|netlink| async move {
        let before = netlink.names().await;
        let hub = netlink.make_hub(Framing::Superframes, 1).await.unwrap();
        for n in 0..3 {
            netlink.make(&hub, &wanted(n)).await.unwrap();
        }
        netlink.remove_hub(&hub).await.unwrap();
        assert_eq!(netlink.names().await, before);
        netlink.remove_hub(&hub).await.unwrap();
    });
}

#[test]
fn what_a_dead_engine_left_without_a_living_owner_is_swept_and_nothing_else() {
    in_namespace(|netlink| async move {
        // A dead engine's hub with four devices: of a dead daemon, of a living daemon, of an operator, and an
        // unfinished one.
        let half_dead = netlink.make_hub(Framing::SingleFrames, 1).await.unwrap();
        for n in 0..4 {
            netlink.make(&half_dead, &wanted(n)).await.unwrap();
        }
        netlink.set_attribute("cipcb0", dead_alias("cipe tunnel")).await;
        netlink.set_attribute("cipcb2", LinkAttribute::IfAlias("uplink to Berlin".to_owned())).await;
        netlink.set_attribute("cipcb3", LinkAttribute::IfAlias(String::new())).await;
        kill_engine_of(&netlink, &half_dead).await;
        // A hub without devices, an unfinished one, and a hub of a living engine without devices.
        let dead = netlink.make_hub(Framing::Superframes, 1).await.unwrap();
        netlink.make(&dead, &wanted(4)).await.unwrap();
        netlink.set_attribute("cipcb4", dead_alias("cipe tunnel")).await;
        kill_engine_of(&netlink, &dead).await;
        netlink.handle.link().add(LinkVeth::new("cipehub7", "cx4194305.0").build()).execute().await.unwrap();
        let alive = netlink.make_hub(Framing::Superframes, 1).await.unwrap();
        // Foreign devices that look alike.
        netlink.handle.link().add(LinkVeth::new("cipehub8", "cipehub8x").build()).execute().await.unwrap();

        let Inheritance { mut swept, hubs, waiting } = netlink.inherit(&[]).await.unwrap();
        swept.sort_unstable();
        assert_eq!(swept, ["cipcb0", "cipcb3", "cipcb4"]);
        let [Waiting { device, hub, .. }] = &waiting[..] else { panic!("{waiting:?}") };
        assert_eq!((&device.name[..], *hub, waiting[0].is_leftover()), ("cipcb1", half_dead.index, false));
        assert_eq!(hubs, [half_dead]);
        let mut names = netlink.names().await;
        names.sort_unstable();
        let alive = alive.name;
        let hubs = ["cipehub0", "cipehub0x", &alive, &format!("{alive}x"), "cipehub8", "cipehub8x"];
        assert_eq!(names, [&["cipcb1", "cipcb2"][..], &hubs, &["lo"]].concat());
        // The new engine owns it: a third engine would not touch it.
        assert_eq!(netlink.inherit(&[]).await.unwrap().hubs, []);
    });
}
