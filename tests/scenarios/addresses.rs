//! Changes of carrier addresses: our own address, the route to the peer, and the address of the peer's name.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;

/// Another address of a gateway in the carrier's network.
fn another(side: Side) -> Ipv4Addr {
    let [a, b, c, d] = side.carrier().octets();
    Ipv4Addr::new(a, b, c, d + 20)
}

/// Replaces the address of a gateway by another one.
fn change_address(net: &Topology, side: Side, from: Ipv4Addr, to: Ipv4Addr) -> Result<()> {
    let gateway = net.gw(side);
    gateway.ip(&["addr", "del", &format!("{from}/24"), "dev", "wire0"])?;
    gateway.ip(&["addr", "add", &format!("{to}/24"), "dev", "wire0"])?;
    Ok(())
}

fn wait_for_ping(net: &Topology, from: Side, gateways: [&Gateway; 2]) -> Result<()> {
    let (deadline, one) =
        (Instant::now() + process::patient(SOON), Plan { timeout: Duration::from_millis(500), ..Plan::count(1) });
    while ping::run(net.lan(from), from.other().host(), &one)?.received() == 0 {
        if Instant::now() > deadline {
            bail!("no answer\n{}\n{}", gateways[0].log().text(), gateways[1].log().text());
        }
    }
    Ok(())
}

/// The log has the classic daemon's line, scripts get the address, and the peer's pings arrive although our end has nothing to
/// send.
#[test]
fn with_dynip_the_own_address_is_followed_and_the_peer_hears_of_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in ["auto", "xdp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let told = net.directory().join("told");
        let script = net.directory().join("ip-down");
        std::fs::write(&script, format!("#!/bin/sh\necho \"$2 $CIPE_ME\" >{}\n", told.display()))?;
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
            match side {
                Side::A => options.flag("dynip").set("ipdown", script.display()),
                Side::B => options,
            }
            .set("carrier", carrier)
        })?;
        pair.wait_for_keys(&net)?;
        for (from, to) in [(Side::A.carrier(), another(Side::A)), (another(Side::A), Side::A.carrier())] {
            change_address(&net, Side::A, from, to)?;
            let me = SocketAddr::from((to, PORT));
            pair.a.wait_for_line("of the address", |line| line.ends_with(&format!("changing my address: {me}")))?;
            pair.b.wait_for_line("of the new peer", |line| line.ends_with(&format!("new peer {me}")))?;
            wait_for_ping(&net, Side::B, [&pair.a, &pair.b])?;
            wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
        }
        assert!(pair.a.stop()?.success());
        let me = SocketAddr::from((Side::A.carrier(), PORT));
        assert_eq!(std::fs::read_to_string(&told)?, format!("{me} {me}\n"));
    }
    Ok(())
}

/// Without the address nothing leaves until it is back, and the log reports why.
#[test]
fn without_dynip_a_lost_address_is_waited_for() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("maxerr", -1))?;
    pair.wait_for_keys(&net)?;
    change_address(&net, Side::A, Side::A.carrier(), another(Side::A))?;
    pair.a.wait_for_line("of the lost address", |line| line.contains("10.200.0.1") && line.contains("dynip"))?;
    let before = pair.a.status()?;
    let plan = Plan { timeout: Duration::from_millis(200), ..Plan::count(3) };
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0);
    let after = pair
        .a
        .wait_for_status("the pings dropped", |status| status.count("no-route") >= before.count("no-route") + 3)?;
    assert_eq!(after.count("sent"), before.count("sent"), "{after:?}");
    change_address(&net, Side::A, another(Side::A), Side::A.carrier())?;
    wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
    assert!(!pair.a.log().text().contains("changing my address"), "{}", pair.a.log().text());
    Ok(())
}

/// When the route to the peer changes to another card, datagrams follow, and none leaves by the old one. A standby gateway gets
/// the address that it shares with another one only when it takes over. Before that the address cannot be bound, unless the
/// kernel is set to allow it; or a service manager waits for the daemon.
#[test]
fn an_address_that_comes_later_is_waited_for() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let standby = SocketAddr::from((another(Side::A), PORT));
    for by_kernel in [true, false] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let notified = net.directory().join("notified");
        let _systemd = UnixDatagram::bind(&notified)?;
        let environment = [("NOTIFY_SOCKET", notified.to_str().context("ASCII")?)];
        let environment = if by_kernel { &[][..] } else { &environment };
        net.gw(Side::A).sysctl("net.ipv4.ip_nonlocal_bind", if by_kernel { "1" } else { "0" })?;
        let options = Options::of(Side::A).set("me", standby).set("maxerr", -1);
        let routes = [Side::B.lan()];
        let gateway = (net.gw(Side::A), "A");
        let mut ours = Gateway::start_with(&net, gateway, &routes, Daemon::Blowfish, &options, environment)?;
        ours.wait_up()?;
        let options = Options::of(Side::B).set("peer", standby);
        let mut peer = Gateway::start(&net, Side::B, Daemon::Blowfish, &options)?;
        peer.wait_up()?;
        ours.wait_for_line("of what is missing", |line| line.contains("is not an address of this host"))?;
        net.gw(Side::A).ip(&["addr", "add", &format!("{}/24", standby.ip()), "dev", "wire0"])?;
        wait_for_ping(&net, Side::A, [&ours, &peer])?;
        wait_for_ping(&net, Side::B, [&ours, &peer])?;
    }
    Ok(())
}

#[test]
fn a_carrier_route_that_changes_is_followed_to_another_card() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let (a, b) = (net.gw(Side::A), net.gw(Side::B));
    cipe_tests::namespace::ip(&[
        "link",
        "add",
        "wire1",
        "netns",
        a.name(),
        "type",
        "veth",
        "peer",
        "name",
        "wire1",
        "netns",
        b.name(),
    ])?;
    for (gateway, other) in [(a, Side::B), (b, Side::A)] {
        gateway.ip(&["link", "set", "wire1", "up"])?;
        gateway.sysctl("net.ipv4.conf.wire1.rp_filter", "0")?;
        // A host answers ARP for an address on any of its cards.
        gateway.ip(&["route", "add", &other.carrier().to_string(), "dev", "wire0", "metric", "10"])?;
    }
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    for (card, route) in [("wire1", "add"), ("wire0", "del")] {
        for (gateway, other) in [(a, Side::B), (b, Side::A)] {
            gateway.ip(&["route", route, &other.carrier().to_string(), "dev", "wire1"])?;
        }
        let on_card = |status: &cipe_tests::status::Status| status.doors.iter().any(|door| door.starts_with(card));
        pair.a.wait_for_status("the other card in use", on_card)?;
        pair.b.wait_for_status("the other card in use", on_card)?;
        wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
        let counted = |card| a.counters(card).map(|counters| counters.rx_packets);
        let before = [counted("wire0")?, counted("wire1")?];
        let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(20))?;
        assert_eq!(report.received(), 20);
        let after = [counted("wire0")?, counted("wire1")?];
        let more = [after[0] - before[0], after[1] - before[1]];
        let expected = usize::from(card == "wire1");
        assert!(more[expected] >= 20 && more[1 - expected] < 20, "{card}: {more:?}");
    }
    Ok(())
}

/// The restarted end knows neither the peer's address nor the key of its packets: it asks at their source address, and learns
/// from the answer.
#[test]
fn a_gateway_that_learns_its_peer_is_restarted_and_finds_it_again() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let learning = |options: Options| options.set("peer", "0.0.0.0:0").set("tokxc", 1);
    let mut pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => options.set("tokxc", 1),
        Side::B => learning(options),
    })?;
    for _ in 0..3 {
        pair.wait_for_keys(&net)?;
        // Without a message to the peer, as after a power failure.
        let engine = pair.b.engine_pid().context("B has an engine")?;
        pair.b.kill()?;
        process::signal(engine, Signal::KILL)?;
        process::wait_gone(engine, SOON)?;
        pair.b = Gateway::start(&net, Side::B, Daemon::Blowfish, &learning(Options::of(Side::B)))?;
        pair.b.wait_up()?;
        wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
    }
    Ok(())
}

/// A peer on a line whose address changes now and then, found by its name.
#[test]
fn a_peer_given_by_name_is_looked_up_again_when_it_does_not_answer() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    // The trigger: an unanswered key exchange, or an unanswered ping.
    for options_of_a in [&[("tokey", "1")][..], &[("ping", "1"), ("toping", "1")]] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let hosts = |address: Ipv4Addr| {
            net.gw(Side::A).set_etc("hosts", &format!("127.0.0.1 localhost\n{address} gw-b.test\n"))
        };
        hosts(Side::B.carrier())?;
        let mut pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
            Side::A => options_of_a
                .iter()
                .fold(options, |options, (name, value)| options.set(name, value))
                .set("peer", format!("gw-b.test:{PORT}"))
                .set("tokxc", 1)
                .set("maxerr", -1),
            // The peer itself never sends from its new address.
            Side::B => options.set("peer", "0.0.0.0:0"),
        })?;
        pair.wait_for_keys(&net)?;
        assert!(pair.b.stop()?.success());
        change_address(&net, Side::B, Side::B.carrier(), another(Side::B))?;
        hosts(another(Side::B))?;
        let me = SocketAddr::new(IpAddr::V4(another(Side::B)), PORT);
        let options = Options::of(Side::B).set("peer", "0.0.0.0:0").set("me", me);
        pair.b = Gateway::start(&net, Side::B, Daemon::Blowfish, &options)?;
        pair.b.wait_up()?;
        wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
        pair.a.wait_for_line("of the name", |line| line.contains(&format!("gw-b.test:{PORT} is at {me} now")))?;
        pair.a.wait_for_line("of the new peer", |line| line.ends_with(&format!("new peer {me}")))?;
    }
    Ok(())
}

/// The peer's host loses its IPv6 address, or gets one: the tunnel needs another socket and another own address.
#[test]
fn a_name_that_leads_to_the_other_ip_version_is_followed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        net.gw(side).sysctl("net.ipv6.conf.wire0.disable_ipv6", "0")?;
        let address = format!("2001:db8::{}/64", if side == Side::A { 1 } else { 2 });
        net.gw(side).ip(&["addr", "add", &address, "dev", "wire0", "nodad"])?;
    }
    let hosts =
        |address: &str| net.gw(Side::A).set_etc("hosts", &format!("127.0.0.1 localhost\n{address} gw-b.test\n"));
    hosts("2001:db8::2")?;
    let options_of_b = |me: &str, peer: &str| Options::of(Side::B).set("me", me).set("peer", peer);
    let mut pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => options
            .without("me")
            .set("peer", format!("gw-b.test:{PORT}"))
            .set("ping", 1)
            .set("toping", 1)
            .set("tokxc", 1)
            .set("maxerr", -1),
        Side::B => options_of_b(&format!("[2001:db8::2]:{PORT}"), "[::]:0"),
    })?;
    pair.wait_for_keys(&net)?;
    assert!(pair.b.stop()?.success());
    hosts(&Side::B.carrier().to_string())?;
    pair.b = Gateway::start(
        &net,
        Side::B,
        Daemon::Blowfish,
        &options_of_b(&format!("{}:{PORT}", Side::B.carrier()), "0.0.0.0:0"),
    )?;
    pair.b.wait_up()?;
    pair.a.wait_for_line("of the name", |line| line.contains("the tunnel starts over with IPv4"))?;
    // ip-up has run again, with the route.
    wait_for_ping(&net, Side::A, [&pair.a, &pair.b])?;
    Ok(())
}

/// At boot: the daemon starts before the network is up.
#[test]
fn a_network_that_comes_later_is_taken_up() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let own = format!("{}/24", Side::A.carrier());
    for me in [Some(format!("0.0.0.0:{PORT}")), Some(format!(":{PORT}")), None] {
        net.gw(Side::A).ip(&["addr", "del", &own, "dev", "wire0"])?;
        let options = match &me {
            Some(me) => Options::of(Side::A).set("me", me),
            None => Options::of(Side::A).without("me"),
        };
        let mut a = Gateway::start(&net, Side::A, Daemon::Blowfish, &options)?;
        a.wait_up()?;
        let mut b = Gateway::start(&net, Side::B, Daemon::Blowfish, &Options::of(Side::B).set("peer", "0.0.0.0:0"))?;
        b.wait_up()?;
        net.gw(Side::A).ip(&["addr", "add", &own, "dev", "wire0"])?;
        a.wait_for_line("of the address", |line| line.contains(&format!("my address is {}:", Side::A.carrier())))?;
        wait_for_ping(&net, Side::A, [&a, &b])?;
    }
    Ok(())
}
