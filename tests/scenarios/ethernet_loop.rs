//! Carriers that a bridge leads into Ethernet tunnels (protocol 4): no packet loops, with any tags, nor through several
//! tunnels; each packet is counted, and the log has one line. A tunnel inside an Ethernet tunnel is no loop.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::bridge::{self, BRIDGE, Port, host};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::{checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process, traffic};

const PINGS: usize = 20;

/// Makes a route in `table` by which a bridge sends to the other end of the tunnel that is its port.
fn lead_through(net: &Topology, bridge: &str, device: &str, table: &str) -> Result<()> {
    let gw = net.gw(Side::A);
    // Each bridge has its own network, whose router is that other end.
    let [own, router] = ["1", "2"].map(|host| format!("10.230.{table}.{host}"));
    let mac = net.gw(Side::B).mac(device)?.map(|octet| format!("{octet:02x}")).join(":");
    gw.ip(&["addr", "add", &format!("{own}/24"), "dev", bridge])?;
    gw.ip(&["neigh", "replace", &router, "lladdr", &mac, "dev", bridge, "nud", "permanent"])?;
    let output = gw.command("bridge").args(["fdb", "replace", &mac, "dev", device, "master", "static"]).output()?;
    ensure!(output.status.success(), "bridge fdb: {}", String::from_utf8_lossy(&output.stderr));
    gw.ip(&["route", "add", "default", "via", &router, "dev", bridge, "table", table])?;
    Ok(())
}

/// Pings until an answer comes.
fn wait_for_ping(from: &Namespace, to: Ipv4Addr, gateways: &[&Gateway]) -> Result<()> {
    let deadline = Instant::now() + process::patient(SOON);
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    while ping::run(from, to, &one)?.received() == 0 {
        let logs = || gateways.iter().map(|gateway| format!("{:?}\n{}", gateway.status(), gateway.log().text()));
        ensure!(Instant::now() < deadline, "no answer from {to}\n{}", logs().collect::<String>());
    }
    Ok(())
}

/// Packets that a tunnel has encrypted.
fn sealed(status: &Status) -> u64 {
    ["sent", "control-sent"].iter().map(|verdict| status.count(verdict)).sum()
}

fn told(gateway: &Gateway) -> usize {
    gateway.log().text().lines().filter(|line| line.contains("looped route")).count()
}

/// No ARP: each host has a permanent entry for the other.
fn introduce(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let mac = net.lan(side.other()).mac("eth0")?.map(|octet| format!("{octet:02x}")).join(":");
        let other = host(side.other()).to_string();
        net.lan(side).ip(&["neigh", "replace", &other, "lladdr", &mac, "dev", "eth0", "nud", "permanent"])?;
    }
    Ok(())
}

#[test]
fn nothing_goes_round_through_a_bridge() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        bridge::join_lans(&net)?;
        introduce(&net)?;
        let pair = Pair::start(&net, Daemon::EthernetBlowfish, |_, options| {
            options.without("ipaddr").without("ptpaddr").set("carrier", door)
        })?;
        for side in [Side::A, Side::B] {
            bridge::join(net.gw(side), "cipdb0")?;
        }
        let (gw, lan) = (net.gw(Side::A), net.lan(Side::A));
        wait_for_ping(lan, host(Side::B), &[&pair.a])?;
        wait_for_ping(net.lan(Side::B), host(Side::A), &[&pair.b])?;
        lead_through(&net, BRIDGE, "cipdb0", "100")?;
        let rule = ["ipproto", "udp", "dport", "5000-30000", "lookup", "100"];
        let (status, device) = (pair.a.status()?, gw.counters("cipdb0")?);
        gw.ip(&[&["rule", "add", "pref", "100"][..], &rule].concat())?;
        let deadline = Instant::now() + process::patient(SOON);
        let mut pings = 0;
        while told(&pair.a) == 0 {
            ensure!(Instant::now() < deadline, "{door}: the loop was not noticed:\n{}", pair.a.log().text());
            let one = Plan { timeout: Duration::from_millis(50), ..Plan::count(1) };
            ping::run(lan, host(Side::B), &one)?;
            pings += 1;
        }
        // From here on every packet returns: the TC program drops all encrypted datagrams, data and control.
        let due = status.count("route-loop") + 1;
        let before = pair.a.wait_for_status("the first loops", |now| now.count("route-loop") >= due)?;
        let plan = Plan { window: PINGS, timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
        ensure!(ping::run(lan, host(Side::B), &plan)?.received() == 0, "{door}: an answer");
        // Each received frame is encrypted once, and the program drops each datagram.
        let once = |now: &Status| -> Result<bool> {
            let taken = gw.counters("cipdb0")?.tx_packets - device.tx_packets;
            let looped = now.count("route-loop") - before.count("route-loop");
            Ok(taken == now.count("sent") - status.count("sent")
                && looped == sealed(now) - sealed(&before)
                && looped >= PINGS as u64)
        };
        let after = pair.a.wait_for_status("each packet once", |now| once(now).unwrap_or(false))?;
        // A few frames are the hosts' own, as ARP is.
        let taken = after.count("sent") - status.count("sent");
        ensure!(taken < (pings + PINGS + 8) as u64, "{door}: {taken} for {pings} and {PINGS} pings: {after:?}");
        let line = pair.a.wait_for_line("of the loop", |line| line.contains("looped route"))?;
        ensure!(line.text.contains("10.200.0.2:6789") && line.text.contains("bridge"), "{}", line.text);
        gw.ip(&[&["rule", "del", "pref", "100"][..], &rule].concat())?;
        wait_for_ping(lan, host(Side::B), &[&pair.a])?;
        assert_eq!(told(&pair.a), 1, "{door}: {}", pair.a.log().text());
    }
    Ok(())
}

/// A frame of UDP to a port of the peer's carrier address.
fn datagram(tags: &[u8], port: u16) -> Vec<u8> {
    let payload = pattern(9, 120);
    let mut packet = vec![0x45, 0, 0, 0, 0, 7, 0, 0, 64, 17, 0, 0];
    packet.extend(Side::A.carrier().octets());
    packet.extend(Side::B.carrier().octets());
    packet[2..4].copy_from_slice(&(28 + payload.len() as u16).to_be_bytes());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([PORT.to_be_bytes(), port.to_be_bytes(), (8 + payload.len() as u16).to_be_bytes(), [0, 0]].concat());
    packet.extend(payload);
    [&[2, 0, 0, 0, 0, 0x99, 2, 0, 0, 0, 0, 0x77][..], tags, &[0x08, 0x00], &packet].concat()
}

#[test]
fn its_own_datagram_is_known_behind_tags() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    bridge::join_lans(&net)?;
    let pair = Pair::start(&net, Daemon::EthernetIdea, |_, options| options.without("ipaddr").without("ptpaddr"))?;
    for side in [Side::A, Side::B] {
        bridge::join(net.gw(side), "cipdi0")?;
    }
    wait_for_ping(net.lan(Side::A), host(Side::B), &[&pair.a])?;
    let ports = [Port::new(net.gw(Side::A), "port0")?, Port::new(net.gw(Side::B), "port0")?];
    for (at, tags) in [&[][..], &[0x81, 0, 0, 5], &[0x88, 0xA8, 0, 9, 0x81, 0, 0, 5]].into_iter().enumerate() {
        ports[0].send(&datagram(tags, PORT))?;
        let due = at as u64 + 1;
        pair.a.wait_for_status("the loop", |status| status.count("route-loop") == due)?;
        let other = datagram(tags, PORT + 1);
        ports[0].send(&other)?;
        // The own one was sent before and would have arrived before.
        let came = ports[1].wait_for(SOON, |came| came == other || came == datagram(tags, PORT))?;
        ensure!(came.as_ref() == Some(&other), "{came:?}");
        pair.a.wait_for_status("no more", |status| status.count("route-loop") == due)?;
    }
    Ok(())
}

/// The second tunnel between the gateways, from port 6790 to port 6790.
fn second(net: &Topology, daemon: Daemon) -> Result<[Gateway; 2]> {
    let start = |side: Side| {
        let name = format!("{}", side.letter());
        let address = |side: Side| Ipv4Addr::new(10, 203, 0, if side == Side::A { 1 } else { 2 });
        let options = Options::of(side)
            .set("ipaddr", address(side))
            .set("ptpaddr", address(side.other()))
            .set("me", format!("{}:6790", side.carrier()))
            .set("peer", format!("{}:6790", side.other().carrier()));
        Gateway::start_in(net, (net.gw(side), &name), &[], daemon, &options)
    };
    let mut both = [start(Side::A)?, start(Side::B)?];
    for gateway in &mut both {
        gateway.wait_up()?;
    }
    Ok(both)
}

/// Each of two tunnels leads through the other, the first through a bridge.
#[test]
fn nothing_goes_round_through_two_tunnels() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (first, other) in [(Daemon::EthernetBlowfish, Daemon::EthernetIdea), (Daemon::Blowfish, Daemon::EthernetIdea)] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let pair = Pair::start(&net, first, |_, options| options)?;
        let [a, b] = second(&net, other)?;
        let gw = net.gw(Side::A);
        let over_second = Ipv4Addr::new(10, 203, 0, 2);
        wait_for_ping(gw, Side::B.tunnel(), &[&pair.a, &pair.b])?;
        wait_for_ping(gw, over_second, &[&a, &b])?;
        let devices = [first.device(), other.device()];
        for (table, device, port) in [("101", devices[0], "6790"), ("102", devices[1], "6789")] {
            if device.starts_with("cipd") {
                let bridge = format!("br{table}");
                gw.ip(&["link", "add", &bridge, "type", "bridge", "stp_state", "0", "forward_delay", "0"])?;
                gw.sysctl(&format!("net.ipv6.conf.{bridge}.disable_ipv6"), "1")?;
                gw.ip(&["link", "set", &bridge, "up"])?;
                gw.ip(&["link", "set", device, "master", &bridge])?;
                // The bridge has the address now.
                let addresses: serde_json::Value =
                    serde_json::from_str(&gw.ip(&["-j", "addr", "show", "dev", device])?)?;
                let local = addresses[0]["addr_info"][0]["local"].as_str().context("it has an address")?.to_owned();
                let peer = if table == "101" { Side::B.tunnel() } else { over_second }.to_string();
                gw.ip(&["addr", "flush", "dev", device])?;
                gw.ip(&["addr", "add", &local, "peer", &peer, "dev", &bridge])?;
                let mac = net.gw(Side::B).mac(device)?.map(|octet| format!("{octet:02x}")).join(":");
                gw.ip(&["neigh", "replace", &peer, "lladdr", &mac, "dev", &bridge, "nud", "permanent"])?;
                lead_through(&net, &bridge, device, table)?;
            } else {
                gw.ip(&["route", "add", "default", "dev", device, "table", table])?;
            }
            let to = if table == "101" { Side::B.tunnel() } else { over_second };
            wait_for_ping(gw, to, &[&pair.a, &a])?;
            gw.ip(&["rule", "add", "pref", table, "ipproto", "udp", "dport", port, "lookup", table])?;
        }
        let count = || -> Result<u64> { Ok(gw.counters(devices[0])?.tx_packets + gw.counters(devices[1])?.tx_packets) };
        let (start, sealed_at_start) = (count()?, sealed(&pair.a.status()?) + sealed(&a.status()?));
        let plan = Plan { window: PINGS, timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
        for to in [Side::B.tunnel(), over_second] {
            ensure!(ping::run(gw, to, &plan)?.received() == 0, "{first:?}: an answer from {to}");
        }
        for gateway in [&pair.a, &a] {
            gateway.wait_for_line("of the loop", |line| line.contains("looped route") && line.contains("round"))?;
        }
        let (taken, statuses) = (count()? - start, [pair.a.status()?, a.status()?]);
        let sent = statuses.iter().map(sealed).sum::<u64>() - sealed_at_start;
        // Both tunnels encrypt each ping, and it returns once; in addition there are a few messages of the tunnels and of the
        // hosts.
        let pings = 2 * PINGS as u64;
        ensure!(taken < 3 * pings + 100 && sent < 2 * pings + 100, "{taken} taken, {sent} sealed: {statuses:?}");
        for status in &statuses {
            ensure!(status.count("route-loop") >= PINGS as u64, "{first:?}: {status:?}");
        }
        gw.ip(&["rule", "del", "pref", "101"])?;
        // The first one leads through the second, which leads out.
        wait_for_ping(gw, over_second, &[&a, &b]).context("the second")?;
        wait_for_ping(gw, Side::B.tunnel(), &[&pair.a, &pair.b]).context("the first, through the second")?;
    }
    Ok(())
}

#[test]
fn a_tunnel_inside_an_ethernet_tunnel_is_no_loop() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::EthernetBlowfish, |_, options| options.set("mask", "255.255.255.0"))?;
    wait_for_ping(net.gw(Side::A), Side::B.tunnel(), &[&pair.a])?;
    let inner = |side: Side| {
        let address = |side: Side| Ipv4Addr::new(10, 204, 0, if side == Side::A { 1 } else { 2 });
        let options = Options::of(side)
            .set("ipaddr", address(side))
            .set("ptpaddr", address(side.other()))
            .set("me", format!("{}:6790", side.tunnel()))
            .set("peer", format!("{}:6790", side.other().tunnel()))
            .set("mtu", 1300)
            .set("cttl", 64);
        Gateway::start_in(&net, (net.gw(side), &format!("{}", side.letter())), &[], Daemon::Idea, &options)
    };
    let (mut a, mut b) = (inner(Side::A)?, inner(Side::B)?);
    a.wait_up()?;
    b.wait_up()?;
    let to = Ipv4Addr::new(10, 204, 0, 2);
    wait_for_ping(net.gw(Side::A), to, &[&a, &b, &pair.a])?;
    let octets = pattern(3, 2_000_000);
    ensure!(traffic::tcp_transfer(net.gw(Side::A), (net.gw(Side::B), to), &octets)? == octets, "other octets");
    for gateway in [&a, &b, &pair.a, &pair.b] {
        assert_eq!((told(gateway), gateway.status()?.count("route-loop")), (0, 0), "{}", gateway.log().text());
    }
    Ok(())
}
