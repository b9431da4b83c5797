//! The examples of the classic HOWTO under our names: two joined Ethernets, a mobile host, a tunnel from every station of an
//! Ethernet to a gateway, several tunnels on one gateway.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::{Namespace, ip};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::original::another_address;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};

/// Pings until an answer comes.
fn wait_for_ping(from: &Namespace, to: Ipv4Addr, logs: &[&Gateway]) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    while ping::run(from, to, &one)?.received() == 0 {
        if Instant::now() > deadline {
            let logs: String =
                logs.iter().map(|gateway| format!("{:?}\n{}", gateway.status(), gateway.log().text())).collect();
            bail!("{}: no answer from {to}\n{logs}", from.name());
        }
    }
    Ok(())
}

#[test]
fn two_ethernets_are_joined() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    for side in [Side::A, Side::B] {
        let other = side.other();
        // A host of the other Ethernet, its gateway there, and the gateway's end of the tunnel.
        for to in [other.host(), other.gateway(), other.tunnel()] {
            let report = ping::run(net.lan(side), to, &Plan::count(5))?;
            assert_eq!(report.received(), 5, "from {side:?} to {to}");
        }
        assert_eq!(ping::run(net.gw(side), other.tunnel(), &Plan::count(5))?.received(), 5, "from gateway {side:?}");
    }
    Ok(())
}

/// The gateway learns the address of its mobile host, which dials in again from another address.
#[test]
fn a_mobile_host_dials_in_from_anywhere() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    let mut gateway = Gateway::start(&net, Side::A, Daemon::Blowfish, &Options::of(Side::A).set("peer", "0.0.0.0:0"))?;
    gateway.wait_up()?;
    let first = format!("{}:{PORT}", Side::B.carrier());
    let second = another_address(&net, Side::B)?.to_string();
    for (dials, me) in [&first, &second, &first].into_iter().enumerate() {
        let mut host = Gateway::start(&net, Side::B, Daemon::Blowfish, &Options::of(Side::B).set("me", me))?;
        host.wait_up()?;
        wait_for_ping(net.lan(Side::B), Side::A.host(), &[&gateway, &host])?;
        wait_for_ping(net.lan(Side::A), Side::B.host(), &[&gateway, &host])?;
        // The log has the first two moves of a minute.
        if dials < 2 {
            let line = format!("new peer {me}");
            gateway.wait_for_lines(1, &format!("with {line:?}"), |told| told.contains(&line))?;
        }
        let report = ping::run(net.lan(Side::B), Side::A.host(), &Plan::count(50))?;
        assert_eq!(report.received(), 50);
        host.stop()?;
    }
    Ok(())
}

/// A station on the gateway's carrier network.
struct Station {
    here: Gateway,
    there: Gateway,
    /// Declared after the daemons, so that it is dropped last.
    host: Namespace,
    number: u8,
}

impl Station {
    fn inner(number: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 204, 1, number)
    }
}

/// Address of the gateway in every tunnel.
const HUB: Ipv4Addr = Ipv4Addr::new(10, 204, 0, 1);

fn cable(one: (&Namespace, &str), other: (&Namespace, &str)) -> Result<()> {
    let names = (one.0.name(), other.0.name());
    ip(&["link", "add", one.1, "netns", names.0, "type", "veth", "peer", "name", other.1, "netns", names.1])?;
    for (namespace, device) in [one, other] {
        namespace.ip(&["link", "set", device, "up"])?;
    }
    Ok(())
}

/// Starts the two ends of a station's tunnel, between carrier addresses of the same network.
fn tunnel(net: &Topology, host: Namespace, number: u8, [hub, station]: [Ipv4Addr; 2]) -> Result<Station> {
    let port = 7000 + u16::from(number);
    let common = |options: Options| options.set("key", KEY).set("cttl", 64).flag("debug");
    let there = common(Options::new())
        .set("ipaddr", HUB)
        .set("ptpaddr", Station::inner(number))
        .set("me", format!("{hub}:{port}"))
        .set("peer", "0.0.0.0:0");
    let here = common(Options::new())
        .set("ipaddr", Station::inner(number))
        .set("ptpaddr", HUB)
        .set("me", format!("{station}:{PORT}"))
        .set("peer", format!("{hub}:{port}"));
    let daemon = if number.is_multiple_of(2) { Daemon::Blowfish } else { Daemon::Idea };
    let mut there = Gateway::start_in(net, (net.gw(Side::A), "A"), &[], daemon, &there)?;
    there.wait_up()?;
    let everything = ["10.204.0.0/16".to_owned()];
    let mut here = Gateway::start_in(net, (&host, &format!("S{number}")), &everything, daemon, &here)?;
    here.wait_up()?;
    Ok(Station { host, here, there, number })
}

/// Every station reaches every other one through the gateway; a tunnel that ends does not end another.
fn all_reach_each_other(mut stations: Vec<Station>) -> Result<()> {
    for station in &stations {
        wait_for_ping(&station.host, HUB, &[&station.here, &station.there])?;
    }
    let engine = stations[0].there.engine_pid().context("the gateway has an engine")?;
    for from in &stations {
        for to in stations.iter().filter(|to| to.number != from.number) {
            let report = ping::run(&from.host, Station::inner(to.number), &Plan::count(3))?;
            assert_eq!(report.received(), 3, "from {} to {}", from.number, to.number);
        }
        assert_eq!(from.there.status()?.count("bad-crc"), 0);
    }
    let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let (first, last) = (&stations[0], &stations[stations.len() - 1]);
    let got = traffic::tcp_transfer(&first.host, (&last.host, Station::inner(last.number)), &octets)?;
    assert!(got == octets);

    let gone = stations.remove(0);
    assert!(gone.there.stop()?.success());
    for from in &stations {
        for to in stations.iter().filter(|to| to.number != from.number) {
            let report = ping::run(&from.host, Station::inner(to.number), &Plan::count(3))?;
            assert_eq!(report.received(), 3, "from {} to {}, without {}", from.number, to.number, gone.number);
        }
        assert_eq!(from.there.engine_pid(), Some(engine), "all share one engine");
    }
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    assert_eq!(ping::run(&gone.host, HUB, &one)?.received(), 0);
    Ok(())
}

#[test]
fn every_station_of_an_ethernet_has_a_tunnel_to_the_gateway() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let (gateway, ether) = (net.gw(Side::A), Namespace::new("ether")?);
    ether.ip(&["link", "add", "br0", "type", "bridge"])?;
    ether.ip(&["link", "set", "br0", "up"])?;
    cable((gateway, "eth1"), (&ether, "p0"))?;
    ether.ip(&["link", "set", "p0", "master", "br0"])?;
    let hub = Ipv4Addr::new(10, 203, 0, 1);
    gateway.ip(&["addr", "add", &format!("{hub}/24"), "dev", "eth1"])?;
    let mut stations = Vec::new();
    for number in 1..=4 {
        let host = Namespace::new(&format!("st{number}"))?;
        let port = format!("p{number}");
        cable((&host, "eth0"), (&ether, &port))?;
        ether.ip(&["link", "set", &port, "master", "br0"])?;
        let address = Ipv4Addr::new(10, 203, 0, 10 + number);
        host.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        stations.push(tunnel(&net, host, number, [hub, address])?);
    }
    all_reach_each_other(stations)
}

#[test]
fn several_tunnels_share_a_gateway_on_several_cards() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let gateway = net.gw(Side::A);
    let mut stations = Vec::new();
    for number in 1..=3 {
        let host = Namespace::new(&format!("st{number}"))?;
        let card = format!("eth{number}");
        cable((gateway, &card), (&host, "eth0"))?;
        let [hub, address] = [1, 2].map(|end| Ipv4Addr::new(10, 203, number, end));
        gateway.ip(&["addr", "add", &format!("{hub}/24"), "dev", &card])?;
        host.ip(&["addr", "add", &format!("{address}/24"), "dev", "eth0"])?;
        stations.push(tunnel(&net, host, number, [hub, address])?);
    }
    all_reach_each_other(stations)
}
