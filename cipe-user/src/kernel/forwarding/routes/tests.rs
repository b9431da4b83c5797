use std::net::Ipv4Addr;

use netlink_packet_route::rule::RuleAttribute;

use super::*;

const TUNNEL: u32 = 9;
const LAN: u32 = 7;

/// A unicast route of the main table; the tests change it.
fn route(prefix: &str, oif: u32) -> RouteMessage {
    let (address, bits) = prefix.split_once('/').unwrap();
    let address: IpAddr = address.parse().unwrap();
    let mut route = RouteMessage::default();
    route.header.address_family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    route.header.destination_prefix_length = bits.parse().unwrap();
    route.header.table = MAIN as u8;
    route.header.kind = RouteType::Unicast;
    if route.header.destination_prefix_length > 0 {
        route.attributes.push(RouteAttribute::Destination(address.into()));
    }
    route.attributes.push(RouteAttribute::Oif(oif));
    route
}

fn with(mut route: RouteMessage, attribute: RouteAttribute) -> RouteMessage {
    route.attributes.push(attribute);
    route
}

fn leads_to(routes: &PrefixMap<PrefixTarget>, address: &str) -> Option<u32> {
    match routes.longest(address.parse().unwrap()) {
        Some(PrefixTarget::Out(out)) => Some(out.ifindex),
        _ => None,
    }
}

#[test]
fn longer_prefixes_win_whatever_they_lead_to() {
    let mut nowhere = route("10.2.3.0/24", TUNNEL);
    nowhere.header.kind = RouteType::BlackHole;
    let routes = collect(&[route("0.0.0.0/0", TUNNEL), route("10.1.0.0/16", LAN), nowhere, route("2001:db8::/32", 3)]);
    for (address, expected) in [
        ("192.0.2.1", Some(TUNNEL)),
        ("10.1.2.3", Some(LAN)),
        ("10.2.3.4", None),
        ("10.2.4.4", Some(TUNNEL)),
        ("2001:db8::1", Some(3)),
        ("2001:db9::1", None),
        ("127.0.0.1", None),
        ("224.0.0.251", None),
        ("255.255.255.255", None),
        ("169.254.1.1", None),
        ("0.1.2.3", None),
    ] {
        assert_eq!(leads_to(&routes, address), expected, "{address}");
    }
}

#[test]
fn the_local_table_wins_over_longer_prefixes_of_the_main_one() {
    let mut local = route("10.5.0.0/16", 1);
    local.header.table = LOCAL as u8;
    local.header.kind = RouteType::Local;
    let routes = collect(&[route("10.0.0.0/8", TUNNEL), route("10.5.6.0/24", TUNNEL), local]);
    assert_eq!(leads_to(&routes, "10.5.6.7"), None);
    assert_eq!(leads_to(&routes, "10.6.6.7"), Some(TUNNEL));
}

#[test]
fn the_lowest_metric_wins_and_equals_share() {
    let prefix = "10.2.0.0/16";
    let metric = |oif, metric| with(route(prefix, oif), RouteAttribute::Priority(metric));
    assert_eq!(leads_to(&collect(&[metric(LAN, 20), metric(TUNNEL, 10)]), "10.2.0.1"), Some(TUNNEL));
    assert_eq!(leads_to(&collect(&[metric(TUNNEL, 10), metric(LAN, 20)]), "10.2.0.1"), Some(TUNNEL));
    assert_eq!(leads_to(&collect(&[metric(TUNNEL, 10), metric(LAN, 10)]), "10.2.0.1"), None);
    assert_eq!(leads_to(&collect(&[metric(TUNNEL, 10), metric(TUNNEL, 10)]), "10.2.0.1"), Some(TUNNEL));
}

#[test]
fn a_route_that_is_not_plain_is_left_to_the_kernel() {
    let plain = || route("10.2.0.0/16", TUNNEL);
    let changed = |change: fn(&mut RouteMessage)| {
        let mut route = plain();
        change(&mut route);
        route
    };
    for (what, route) in [
        ("a TOS", changed(|route| route.header.tos = 8)),
        ("a dead one", changed(|route| route.header.flags = RouteFlags::Dead)),
        ("no carrier", changed(|route| route.header.flags = RouteFlags::Linkdown)),
        ("unreachable", changed(|route| route.header.kind = RouteType::Unreachable)),
        ("NAT", changed(|route| route.header.kind = RouteType::Nat)),
        ("several next hops", with(plain(), RouteAttribute::MultiPath(Vec::new()))),
        ("a next hop object", with(plain(), RouteAttribute::NhId(4))),
        ("no device", changed(|route| route.attributes.truncate(1))),
    ] {
        assert_eq!(leads_to(&collect(std::slice::from_ref(&route)), "10.2.0.1"), None, "{what}");
        // Nor may a simple route of a lower metric decide for a prefix with a TOS.
        let beside = collect(&[route.clone(), with(plain(), RouteAttribute::Priority(0))]);
        assert!(route.header.tos == 0 || leads_to(&beside, "10.2.0.1").is_none(), "{what}");
    }
    for other in [LOCAL + 1, 100, DEFAULT] {
        let elsewhere = with(changed(|route| route.header.table = 0), RouteAttribute::Table(other));
        assert_eq!(leads_to(&collect(&[elsewhere]), "10.2.0.1"), None, "table {other}");
    }
}

#[test]
fn gateway_and_mtu_are_told() {
    let router: IpAddr = Ipv4Addr::new(10, 1, 0, 9).into();
    let route = with(route("10.2.0.0/16", LAN), RouteAttribute::Gateway(router.into()));
    let route = with(route, RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]));
    let expected = PrefixTarget::Out(DeviceRoute { ifindex: LAN, gateway: Some(router), mtu: Some(1300) });
    assert_eq!(collect(&[route]).longest("10.2.0.1".parse().unwrap()), Some(&expected));
}

fn rule(priority: u32, table: u8) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.table = table;
    rule.header.action = RuleAction::ToTable;
    rule.attributes.push(RuleAttribute::Priority(priority));
    rule
}

#[test]
fn only_the_rules_that_every_system_has_are_usual() {
    for (priority, table) in [(0, LOCAL), (32_766, MAIN), (32_767, DEFAULT)] {
        let mut usual = rule(priority, table as u8);
        usual.attributes.push(RuleAttribute::Table(table));
        usual.attributes.push(RuleAttribute::SuppressPrefixLen(u32::MAX));
        assert!(is_usual(&usual), "{priority}");
        usual.attributes.push(RuleAttribute::FwMark(1));
        assert!(!is_usual(&usual));
    }
    let mut by_source = rule(32_766, MAIN as u8);
    by_source.header.src_len = 24;
    let mut goes_nowhere = rule(32_766, MAIN as u8);
    goes_nowhere.header.action = RuleAction::Unreachable;
    for unusual in [rule(100, 100), rule(0, MAIN as u8), rule(32_766, 100), by_source, goes_nowhere] {
        assert!(!is_usual(&unusual));
    }
}
