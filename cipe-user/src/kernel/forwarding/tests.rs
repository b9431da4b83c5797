use netlink_packet_route::rule::{RuleAction, RuleAttribute};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};

use super::*;
use crate::kernel::testnet::{Other, in_namespace, until};

const HERE: [u8; 4] = [192, 0, 2, 1];
const THERE: [u8; 4] = [192, 0, 2, 2];

fn egress(picture: &Picture, address: [u8; 4]) -> Option<DeviceRoute> {
    match picture.routes.longest(address.into()) {
        Some(PrefixTarget::Out(out)) => Some(*out),
        _ => None,
    }
}

#[test]
fn routes_are_seen_as_they_come_and_go() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let ifindex = netlink.index("wire0").await;
        let mut pictures = follow(&netlink).await.unwrap();
        let far = [203, 0, 113, 9];
        let near = Some(DeviceRoute { ifindex, gateway: None, mtu: None });
        until(&mut pictures, |picture| egress(picture, THERE) == near).await;
        assert_eq!(egress(&pictures.borrow(), HERE), None, "our own address");

        netlink.add_route([203, 0, 113, 0], 24, THERE).await;
        let routed = Some(DeviceRoute { ifindex, gateway: Some(IpAddr::from(THERE)), mtu: None });
        until(&mut pictures, |picture| egress(picture, far) == routed).await;
        netlink.delete_route([203, 0, 113, 0], 24).await;
        until(&mut pictures, |picture| egress(picture, far).is_none()).await;

        netlink.set_up("wire0", false).await;
        until(&mut pictures, |picture| egress(picture, THERE).is_none()).await;
    });
}

#[test]
fn neighbours_are_seen_while_they_can_be_sent_to() {
    in_namespace(|netlink| async move {
        let other = Other::new();
        netlink.cable("wire0", HERE, &other, "far0", THERE).await;
        let ifindex = netlink.index("wire0").await;
        let mac = other.run(|netlink| async move { netlink.card_named("far0").await.unwrap().mac }).await;
        let mut pictures = follow(&netlink).await.unwrap();
        let key = (ifindex, IpAddr::from(THERE));
        netlink.use_neighbour(ifindex, THERE.into()).await.unwrap();
        let known = move |picture: &Picture| picture.neighbours.get(&key).map(|near| near.mac);
        until(&mut pictures, |picture| known(picture) == mac).await;
        // Entries from before the start are known as well.
        assert_eq!(known(&follow(&netlink).await.unwrap().borrow()), mac);
        netlink.set_up("wire0", false).await;
        until(&mut pictures, |picture| known(picture).is_none()).await;
    });
}

#[test]
fn rules_of_an_operator_are_seen() {
    in_namespace(|netlink| async move {
        let mut pictures = follow(&netlink).await.unwrap();
        assert_eq!(pictures.borrow().ruled, [false; 2], "a new namespace has the usual ones");
        let mut rule = RuleMessage::default();
        rule.header.family = AddressFamily::Inet;
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![RuleAttribute::FwMark(7), RuleAttribute::Table(100)];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        netlink.request(String::new, RouteNetlinkMessage::NewRule(rule.clone()), flags).await.unwrap();
        until(&mut pictures, |picture| picture.ruled == [true, false]).await;
        netlink.request(String::new, RouteNetlinkMessage::DelRule(rule), NLM_F_ACK).await.unwrap();
        until(&mut pictures, |picture| picture.ruled == [false; 2]).await;
    });
}
