//! Carrier routes that lead into tunnels: no packet loops, with any routes and rules, each packet is counted, and the log has
//! one line. Rules on ports, users and marks, and a route through another tunnel, are no loop and must work.

use std::net::Ipv4Addr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Packets for the peer that have been counted.
fn outward(status: &Status) -> u64 {
    ["sent", "route-loop", "no-route", "no-send-key"].iter().map(|verdict| status.count(verdict)).sum()
}

fn told(gateway: &Gateway) -> usize {
    gateway.log().text().lines().filter(|line| line.contains("looped route")).count()
}

#[test]
fn a_carrier_route_into_the_tunnel_is_dropped_counted_and_told_once() -> Result<()> {
    const PINGS: usize = 50;
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;
    let peer = Side::B.carrier().to_string();
    for round in 1..=2 {
        let (start, device_at_start) = (pair.a.status()?, net.gw(Side::A).counters("cipcb0")?);
        net.gw(Side::A).ip(&["route", "add", &peer, "dev", "cipcb0"])?;
        let deadline = Instant::now() + patient(SOON);
        while told(&pair.a) < round {
            if Instant::now() > deadline {
                bail!("the loop was not noticed:\n{}", pair.a.log().text());
            }
            let one = Plan { timeout: Duration::from_millis(50), ..Plan::count(1) };
            ping::run(net.lan(Side::A), Side::B.host(), &one)?;
        }
        // The last of these pings may still be in flight.
        let device = net.gw(Side::A).counters("cipcb0")?;
        let due = outward(&start) + device.tx_packets - device_at_start.tx_packets;
        let before = pair.a.wait_for_status("all of these counted", |status| outward(status) >= due)?;
        let plan = Plan { window: PINGS, timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0);
        let due = before.count("route-loop") + PINGS as u64;
        let after = pair.a.wait_for_status("every ping counted", |status| status.count("route-loop") >= due)?;
        let device_after = net.gw(Side::A).counters("cipcb0")?;
        assert_eq!(after.count("route-loop"), due, "{after:?}");
        assert_eq!(after.count("sent"), before.count("sent"), "{after:?}");
        // Only the pings entered the tunnel device.
        assert_eq!(device_after.tx_packets - device.tx_packets, PINGS as u64);
        assert_eq!(told(&pair.a), round, "{}", pair.a.log().text());
        assert!(after.count("route-loop") > start.count("route-loop"));

        net.gw(Side::A).ip(&["route", "del", &peer, "dev", "cipcb0"])?;
        pair.wait_for_keys(&net)?;
        let deadline = Instant::now() + patient(SOON);
        let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
        while ping::run(net.lan(Side::A), Side::B.host(), &one)?.received() == 0 {
            if Instant::now() > deadline {
                bail!("the right route was not taken again:\n{}\n{:?}", pair.a.log().text(), pair.a.status()?);
            }
        }
    }
    Ok(())
}

/// Pings until an answer comes.
fn wait_for_ping(from: &Namespace, to: Ipv4Addr, gateways: &[&Gateway]) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    while ping::run(from, to, &one)?.received() == 0 {
        let logs = || gateways.iter().map(|gateway| format!("{:?}\n{}", gateway.status(), gateway.log().text()));
        ensure!(Instant::now() < deadline, "no answer from {to}\n{}", logs().collect::<String>());
    }
    Ok(())
}

/// Options of one end of a tunnel between addresses of another one.
fn inner(side: Side) -> Options {
    let address = |side: Side| Ipv4Addr::new(10, 202, 0, if side == Side::A { 1 } else { 2 });
    Options::new()
        .set("ipaddr", address(side))
        .set("ptpaddr", address(side.other()))
        .set("me", format!("{}:6790", side.tunnel()))
        .set("peer", format!("{}:6790", side.other().tunnel()))
        .set("key", KEY)
        .set("mtu", 1300)
        .set("cttl", 64)
        .flag("debug")
}

#[test]
fn a_tunnel_inside_a_tunnel_is_no_loop() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["auto", "xdp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", door))?;
        pair.wait_for_keys(&net)?;
        let start = |side: Side| {
            let name = format!("{}", side.letter());
            Gateway::start_in(&net, (net.gw(side), &name), &[], Daemon::Idea, &inner(side))
        };
        let (mut a, mut b) = (start(Side::A)?, start(Side::B)?);
        a.wait_up()?;
        b.wait_up()?;
        wait_for_ping(net.gw(Side::A), Ipv4Addr::new(10, 202, 0, 2), &[&a, &b, &pair.a])?;
        let octets = cipe_tests::net::pattern(3, 2_000_000);
        let to = (net.gw(Side::B), Ipv4Addr::new(10, 202, 0, 2));
        ensure!(cipe_tests::traffic::tcp_transfer(net.gw(Side::A), to, &octets)? == octets, "other octets");
        for gateway in [&a, &b, &pair.a, &pair.b] {
            assert_eq!((told(gateway), gateway.status()?.count("route-loop")), (0, 0), "{}", gateway.log().text());
        }
    }
    Ok(())
}

/// Whether nftables can mark packets here; if not, prints that.
fn has_nft() -> bool {
    let found =
        Command::new("nft").arg("--version").stdout(Stdio::null()).status().is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: a mark by the firewall: there is no `nft` here");
    }
    found
}

/// Marks the carrier's datagrams after the look-up of their route.
const MARKING: &str = "add table ip m; add chain ip m o { type route hook output priority mangle; }; \
                       add rule ip m o udp sport 6789 meta mark set 7";

#[test]
fn everything_goes_into_the_tunnel_but_what_a_rule_excepts() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let cases: [(&str, &str, &str, Option<&str>); 6] = [
        ("source", "from 10.200.0.1", "auto", None),
        ("ports", "ipproto udp sport 6789", "auto", None),
        ("ports, by the socket", "ipproto udp dport 6789", "udp", None),
        ("user", "uidrange 0-0 ipproto udp", "auto", None),
        ("mark of the option", "fwmark 0x2a", "xdp", Some("0x2a")),
        ("mark of the firewall", "fwmark 7", "auto", None),
    ];
    for (what, rule, door, mark) in cases {
        if what.contains("firewall") && !has_nft() {
            continue;
        }
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| {
            let options = options.set("carrier", door);
            mark.map_or(options.clone(), |mark| options.set("mark", mark))
        })?;
        pair.wait_for_keys(&net)?;
        let gw = net.gw(Side::A);
        if what.contains("firewall") {
            let marked = gw.command("nft").arg(MARKING).output()?;
            ensure!(marked.status.success(), "nft: {}", String::from_utf8_lossy(&marked.stderr));
        }
        gw.ip(&["route", "add", "default", "dev", "cipcb0", "table", "100"])?;
        let add = |pref: &str, rule: &str, table: &str| {
            let words = ["rule", "add", "pref", pref].into_iter().chain(rule.split(' ')).chain(["lookup", table]);
            gw.ip(&words.collect::<Vec<_>>())
        };
        add("100", rule, "main")?;
        add("150", "to 10.201.0.0/24", "main")?;
        add("151", "to 10.210.1.0/24", "main")?;
        add("200", "from all", "100")?;
        let before = pair.a.status()?.count("delivered");
        wait_for_ping(gw, Side::B.tunnel(), &[&pair.a])?;
        let plan = Plan { timeout: Duration::from_secs(10), ..Plan::count(20) };
        assert_eq!(
            ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(),
            20,
            "{what}: {:?}",
            pair.a.status()?
        );
        let status = pair.a.wait_for_status("answers", |status| status.count("delivered") >= before + 21)?;
        assert_eq!(status.count("route-loop"), 0, "{what}: {status:?}");
        assert_eq!(told(&pair.a), 0, "{what}: {}", pair.a.log().text());
    }
    Ok(())
}

/// Rules on ports lead the carrier into the tunnel: a look-up without ports would not show the loop.
#[test]
fn nothing_goes_round_by_a_rule_on_ports() -> Result<()> {
    const PINGS: usize = 20;
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["auto", "xdp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", door))?;
        pair.wait_for_keys(&net)?;
        let gw = net.gw(Side::A);
        gw.ip(&["route", "add", "default", "dev", "cipcb0", "table", "100"])?;
        let before = gw.counters("cipcb0")?;
        let rule = ["ipproto", "udp", "dport", "5000-30000", "lookup", "100"];
        gw.ip(&[&["rule", "add", "pref", "100"][..], &rule].concat())?;
        let deadline = Instant::now() + patient(SOON);
        let mut pings = 0;
        while told(&pair.a) == 0 {
            ensure!(Instant::now() < deadline, "{door}: the loop was not noticed:\n{}", pair.a.log().text());
            let one = Plan { timeout: Duration::from_millis(50), ..Plan::count(1) };
            ping::run(net.lan(Side::A), Side::B.host(), &one)?;
            pings += 1;
        }
        let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0, "{door}");
        let due = PINGS as u64;
        let status = pair.a.wait_for_status("the loops", |status| status.count("route-loop") >= due)?;
        let after = gw.counters("cipcb0")?;
        assert_eq!(after.tx_packets - before.tx_packets, (pings + PINGS) as u64, "{door}: {status:?}");
        let line = pair.a.wait_for_line("of the loop", |line| line.contains("looped route"))?;
        ensure!(line.text.contains("10.200.0.2:6789") && line.text.contains("ip rule"), "{}", line.text);
        gw.ip(&[&["rule", "del", "pref", "100"][..], &rule].concat())?;
        wait_for_ping(net.lan(Side::A), Side::B.host(), &[&pair.a])?;
        assert_eq!(told(&pair.a), 1, "{door}: {}", pair.a.log().text());
    }
    Ok(())
}

/// Each of two tunnels leads through the other.
#[test]
fn nothing_goes_round_through_two_tunnels() -> Result<()> {
    const PINGS: usize = 20;
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let second = |side: Side| {
        let name = format!("{}", side.letter());
        let options = Options::of(side)
            .set("ipaddr", Ipv4Addr::new(10, 203, 0, if side == Side::A { 1 } else { 2 }))
            .set("ptpaddr", Ipv4Addr::new(10, 203, 0, if side == Side::A { 2 } else { 1 }))
            .set("me", format!("{}:6790", side.carrier()))
            .set("peer", format!("{}:6790", side.other().carrier()));
        Gateway::start_in(&net, (net.gw(side), &name), &[], Daemon::Idea, &options)
    };
    let (mut a, mut b) = (second(Side::A)?, second(Side::B)?);
    a.wait_up()?;
    b.wait_up()?;
    let (gw, over_second) = (net.gw(Side::A), Ipv4Addr::new(10, 203, 0, 2));
    wait_for_ping(gw, over_second, &[&a, &b])?;
    for (table, device, port) in [("101", "cipci0", "6789"), ("102", "cipcb0", "6790")] {
        gw.ip(&["route", "add", "default", "dev", device, "table", table])?;
        gw.ip(&["rule", "add", "pref", table, "ipproto", "udp", "dport", port, "lookup", table])?;
    }
    for gateway in [&pair.a, &a] {
        gateway.wait_for_line("of the loop", |line| line.contains("looped route") && line.contains("round"))?;
    }
    let before = [gw.counters("cipcb0")?, gw.counters("cipci0")?];
    let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
    for to in [Side::B.tunnel(), over_second] {
        assert_eq!(ping::run(gw, to, &plan)?.received(), 0, "{to}");
    }
    let after = [gw.counters("cipcb0")?, gw.counters("cipci0")?];
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(after.tx_packets - before.tx_packets, PINGS as u64);
    }
    gw.ip(&["rule", "del", "pref", "102"])?;
    // The first one leads through the second, which leads out.
    wait_for_ping(gw, over_second, &[&a, &b]).context("the second")?;
    wait_for_ping(gw, Side::B.tunnel(), &[&pair.a, &pair.b]).context("the first, through the second")?;
    Ok(())
}
