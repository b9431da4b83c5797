use std::net::Ipv4Addr;

use netlink_packet_route::link::LinkAttribute;

use super::*;
use crate::kernel::testnet::{Other, in_namespace, until};

/// No polling, except for neighbours that do not answer: the test sees only what the kernel reports.
const NO_POLLING: NextHopTiming = NextHopTiming { refresh: Duration::from_secs(3600), retry: Duration::from_secs(1) };
/// Short, so that a test does not wait long for changes that the kernel does not report.
const SHORT_INTERVALS: NextHopTiming =
    NextHopTiming { refresh: Duration::from_millis(200), retry: Duration::from_millis(100) };
const HERE: [u8; 4] = [192, 0, 2, 1];
const THERE: [u8; 4] = [192, 0, 2, 2];
const HERE2: [u8; 4] = [198, 51, 100, 1];
const THERE2: [u8; 4] = [198, 51, 100, 2];
const FAR: [u8; 4] = [203, 0, 113, 9];
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

fn ip(octets: [u8; 4]) -> IpAddr {
    Ipv4Addr::from(octets).into()
}

fn resolved(state: &NextHopState) -> bool {
    matches!(state, NextHopState::Found(hop) if hop.destination_mac.is_some())
}

fn goes_to(state: &NextHopState, mac: Option<[u8; 6]>) -> bool {
    matches!(state, NextHopState::Found(hop) if hop.destination_mac == mac)
}

async fn mac_of(other: &Other, name: &'static str) -> Option<[u8; 6]> {
    other.run(move |netlink| async move { netlink.card_named(name).await.unwrap().mac }).await
}

#[test]
fn a_peer_on_the_link_is_resolved() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let running =
            |state: &NextHopState| resolved(state) && matches!(state, NextHopState::Found(hop) if hop.running);
        let state = until(&mut hops.watch(Flow::new(ip(THERE), None)), running).await;
        let card = netlink.card_named("wire0").await.unwrap();
        let expected = NextHop {
            ifindex: card.ifindex,
            source: ip(HERE),
            source_mac: card.mac,
            destination_mac: mac_of(&other, "far0").await,
            mtu: 1500,
            running: true,
            local: false,
        };
        assert_eq!(state, NextHopState::Found(expected));
    });
}

#[test]
fn an_ipv6_peer_is_resolved() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let (here, there) = ("2001:db8::1".parse().unwrap(), "2001:db8::2".parse().unwrap());
        netlink.add_address("wire0", here, 64).await;
        other.run(move |netlink| async move { netlink.add_address("far0", there, 64).await }).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        // The own address cannot be used before duplicate address detection has finished.
        let state = until(&mut hops.watch(Flow::new(there, Some(here))), resolved).await;
        assert!(goes_to(&state, mac_of(&other, "far0").await));
    });
}

#[test]
fn a_peer_behind_a_router_goes_to_the_router() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        netlink.add_route(FAR, 32, THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let state = until(&mut hops.watch(Flow::new(ip(FAR), Some(ip(HERE)))), resolved).await;
        assert!(goes_to(&state, mac_of(&other, "far0").await));
    });
}

#[test]
fn a_changed_address_of_the_neighbour_is_followed() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, resolved).await;
        // A router that replaces another announces its address by a gratuitous ARP when it comes up.
        other
            .run(|netlink| async move {
                std::fs::write("/proc/sys/net/ipv4/conf/far0/arp_notify", "1").unwrap();
                netlink.set_up("far0", false).await;
                netlink.set_attribute("far0", LinkAttribute::Address(MAC.to_vec())).await;
                netlink.set_up("far0", true).await;
            })
            .await;
        until(&mut watch, |state| goes_to(state, Some(MAC))).await;
    });
}

#[test]
fn a_route_that_moves_to_another_card_is_followed() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        netlink.cable("wire1", HERE2, &other, "far1", THERE2).await;
        netlink.add_route(FAR, 32, THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(FAR), None));
        until(&mut watch, resolved).await;
        netlink.add_route(FAR, 32, THERE2).await;
        let mac = mac_of(&other, "far1").await;
        let NextHopState::Found(hop) = until(&mut watch, |state| goes_to(state, mac)).await else { unreachable!() };
        assert_eq!((hop.ifindex, hop.source), (netlink.index("wire1").await, ip(HERE2)));
    });
}

#[test]
fn a_route_that_goes_and_comes_back_is_followed() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        netlink.add_route(FAR, 32, THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(FAR), None));
        until(&mut watch, resolved).await;
        netlink.delete_route(FAR, 32).await;
        let NextHopState::Unreachable(reason) = until(&mut watch, |state| !resolved(state)).await else { panic!() };
        let words = "no carrier route to 203.0.113.9: Network is unreachable (os error 101); \
                     add a route or check the carrier device";
        assert_eq!(&*reason, words);
        netlink.add_route(FAR, 32, THERE).await;
        until(&mut watch, resolved).await;
    });
}

#[test]
fn a_card_that_goes_down_and_up_is_followed() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, resolved).await;
        netlink.set_up("wire0", false).await;
        until(&mut watch, |state| matches!(state, NextHopState::Unreachable(_))).await;
        netlink.set_up("wire0", true).await;
        until(&mut watch, resolved).await;
        netlink.delete_named("wire0").await;
        until(&mut watch, |state| matches!(state, NextHopState::Unreachable(_))).await;
    });
}

#[test]
fn a_lost_cable_and_a_new_mtu_are_told() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, resolved).await;
        netlink.set_attribute("wire0", LinkAttribute::Mtu(1400)).await;
        until(&mut watch, |state| matches!(state, NextHopState::Found(hop) if hop.mtu == 1400)).await;
        other.run(|netlink| async move { netlink.set_up("far0", false).await }).await;
        until(&mut watch, |state| matches!(state, NextHopState::Found(hop) if !hop.running)).await;
    });
}

#[test]
fn a_neighbour_that_falls_silent_and_comes_back_is_followed() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        // The kernel's own interval is half a minute.
        for (switch, value) in [("base_reachable_time_ms", "100"), ("delay_first_probe_time", "0")] {
            std::fs::write(format!("/proc/sys/net/ipv4/neigh/wire0/{switch}"), value).unwrap();
        }
        std::fs::write("/proc/sys/net/ipv4/neigh/wire0/retrans_time_ms", "50").unwrap();
        let hops = NextHops::new(&netlink, SHORT_INTERVALS).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, resolved).await;
        other.run(|netlink| async move { netlink.set_arp("far0", false).await }).await;
        until(&mut watch, |state| goes_to(state, None)).await;
        other.run(|netlink| async move { netlink.set_arp("far0", true).await }).await;
        until(&mut watch, resolved).await;
    });
}

#[test]
fn a_flushed_neighbour_is_asked_for_again() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let never = Duration::from_secs(3600);
        let hops = NextHops::new(&netlink, NextHopTiming { refresh: never, retry: never }).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, resolved).await;
        watch.mark_unchanged();
        netlink.set_arp("wire0", false).await;
        netlink.set_arp("wire0", true).await;
        until(&mut watch, |state| goes_to(state, None)).await;
        until(&mut watch, resolved).await;
    });
}

#[test]
fn nothing_is_missed_when_notifications_are_lost() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        netlink.cable("wire1", HERE2, &other, "far1", THERE2).await;
        netlink.add_route(FAR, 32, THERE).await;
        // A stream that loses every notification; the test decides when it reports that.
        let (lose, mut lost) = mpsc::unbounded_channel();
        let events = futures_util::stream::poll_fn(move |context| lost.poll_recv(context));
        let hops = NextHops::with_events(&netlink, events, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(FAR), None));
        let mac = mac_of(&other, "far0").await;
        until(&mut watch, |state| goes_to(state, mac)).await;
        netlink.add_route(FAR, 32, THERE2).await;
        lose.send(NetlinkEvent::Lost).unwrap();
        let mac = mac_of(&other, "far1").await;
        until(&mut watch, |state| goes_to(state, mac)).await;
    });
}

#[test]
fn a_neighbour_set_by_hand_stays_as_it_is() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let index = netlink.index("wire0").await;
        let neighbours = netlink.handle.neighbours();
        neighbours.add(index, ip(THERE)).link_layer_address(&MAC).execute().await.unwrap();
        let hops = NextHops::new(&netlink, SHORT_INTERVALS).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), None));
        until(&mut watch, |state| goes_to(state, Some(MAC))).await;
        // A second peer over the same neighbour, and a refresh, use it again.
        netlink.add_route(FAR, 32, THERE).await;
        until(&mut hops.watch(Flow::new(ip(FAR), None)), |state| goes_to(state, Some(MAC))).await;
        netlink.set_attribute("wire0", LinkAttribute::Mtu(1400)).await;
        until(&mut watch, |state| matches!(state, NextHopState::Found(hop) if hop.mtu == 1400)).await;
        let entry = netlink.neighbour(index, ip(THERE)).await.unwrap().unwrap();
        assert!(entry.fixed, "{entry:?}");
    });
}

#[test]
fn an_own_address_as_peer_is_known_as_local() {
    in_namespace(|netlink| async move {
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(Ipv4Addr::LOCALHOST.into(), None));
        until(&mut watch, |state| matches!(state, NextHopState::Found(hop) if hop.local)).await;
    });
}

#[test]
fn an_own_address_that_appears_later_makes_its_peers_reachable() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let later = [192, 0, 2, 77];
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let mut watch = hops.watch(Flow::new(ip(THERE), Some(ip(later))));
        let NextHopState::Unreachable(reason) = until(&mut watch, |state| *state != NextHopState::Unknown).await else {
            panic!()
        };
        assert_eq!(
            &*reason,
            "no carrier route to 192.0.2.2 from 192.0.2.77: 192.0.2.77 is not an address of this host; bring it back, or \
             follow changes with `dynip`"
        );
        netlink.add_address("wire0", ip(later), 24).await;
        until(&mut watch, |state| matches!(state, NextHopState::Found(hop) if hop.source == ip(later))).await;
    });
}

#[test]
fn ten_thousand_peers_move_together() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        netlink.cable("wire1", HERE2, &other, "far1", THERE2).await;
        netlink.add_route([10, 0, 0, 0], 8, THERE).await;
        let hops = NextHops::new(&netlink, NO_POLLING).await.unwrap();
        let peer = |number: u16| Ipv4Addr::from(0x0A00_0000 + u32::from(number)).into();
        let mut watches: Vec<_> = (1..=10_000).map(|number| hops.watch(Flow::new(peer(number), None))).collect();
        for watch in &mut watches {
            until(watch, resolved).await;
        }
        netlink.add_route([10, 0, 0, 0], 8, THERE2).await;
        let mac = mac_of(&other, "far1").await;
        for watch in &mut watches {
            until(watch, |state| goes_to(state, mac)).await;
        }
    });
}
