//! Carriers between link-local addresses, which have no meaning without their device.

use std::fs;
use std::net::Ipv6Addr;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::{self, Namespace};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process, traffic};
use rustix::process::Signal;

/// The MTU inside, over a carrier of 1500 octets.
const MTU: usize = 1422;

/// fe80::1 and fe80::2, as people number their routers; the same on each of their devices.
fn host(side: Side) -> Ipv6Addr {
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, if side == Side::A { 1 } else { 2 })
}

/// The address as operators write it, with the zone by name.
fn at(host: Ipv6Addr, device: &str) -> String {
    format!("[{host}%{device}]:{PORT}")
}

fn add_address(gateway: &Namespace, host: Ipv6Addr, device: &str) -> Result<()> {
    gateway.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0")?;
    gateway.ip(&["-6", "addr", "add", &format!("{host}/64"), "dev", device, "nodad"])?;
    Ok(())
}

/// A network whose gateways have the same link-local address on the carrier and in their LAN.
fn network() -> Result<Topology> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        for device in ["wire0", "lan0"] {
            add_address(net.gw(side), host(side), device)?;
        }
    }
    Ok(net)
}

fn over(device: &str, side: Side, options: Options) -> Options {
    options.set("me", at(host(side), device)).set("peer", at(host(side.other()), device))
}

/// Index of a device, which is its zone by number.
fn index(namespace: &Namespace, device: &str) -> Result<u32> {
    let text = namespace.ip(&["-o", "link", "show", "dev", device])?;
    Ok(text.split(':').next().context("an index")?.trim().parse()?)
}

fn wait_for_ping(net: &Topology, gateways: [&Gateway; 2]) -> Result<()> {
    let deadline = Instant::now() + process::patient(SOON);
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    for from in [Side::A, Side::B] {
        while ping::run(net.lan(from), from.other().host(), &one)?.received() == 0 {
            if Instant::now() > deadline {
                bail!("no answer\n{}\n{}", gateways[0].log().text(), gateways[1].log().text());
            }
        }
    }
    Ok(())
}

/// Carrier addresses in `cipe show`, as text and as JSON.
fn shown(gateway: &Gateway) -> Result<[String; 4]> {
    let json = gateway.cipe(&["show", "--json"]).output()?.stdout;
    let json: serde_json::Value = serde_json::from_slice(&json)?;
    let text = gateway.cipe(&["show"]).output()?.stdout;
    let text = String::from_utf8(text)?;
    let line =
        |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let member = |name: &str| json[0][name].as_str().unwrap_or_default().to_owned();
    Ok([line("me "), line("peer "), member("me"), member("peer")])
}

#[test]
fn traffic_passes_by_each_door_and_every_word_names_the_zone() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        let net = network()?;
        let told = net.directory().join("told");
        let script = net.directory().join("ip-down");
        let words = "$2 $me $peer $CIPE_ME $CIPE_PEER";
        fs::write(&script, format!("#!/bin/sh\necho \"{words}\" >{}\n", told.display()))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o700))?;
        let number = index(net.gw(Side::B), "wire0")?;
        let options = |side, options: Options| {
            let options = over("wire0", side, options).set("carrier", door).set("ipdown", script.display());
            match side {
                Side::A => options,
                // The zone by number has the same meaning.
                Side::B => options.set("me", format!("[{}%{number}]:{PORT}", host(side))),
            }
        };
        let Pair { a, b } = Pair::start(&net, Daemon::Blowfish, options)?;
        let (me, peer) = (at(host(Side::A), "wire0"), at(host(Side::B), "wire0"));
        a.wait_for_line("of the start", |line| line.contains(&format!(" on {me}, peer {peer}")))?;
        let pair = Pair { a, b };
        pair.wait_for_keys(&net)?;
        let plan = Plan::sizes((ping::HEADERS..=MTU).step_by(7).collect());
        for from in [Side::A, Side::B] {
            let report = ping::run(net.lan(from), from.other().host(), &plan)?;
            assert_eq!((report.received(), report.damaged), (report.sent, 0), "{door}: lost: {:?}", report.lost);
            let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
            let to = (net.lan(from.other()), from.other().host());
            assert!(traffic::tcp_transfer(net.lan(from), to, &octets)? == octets, "{door}: from {from:?}");
        }
        for side in [Side::A, Side::B] {
            let expected = [at(host(side), "wire0"), at(host(side.other()), "wire0")];
            assert_eq!(shown(pair.of(side))?, [expected.clone(), expected].concat()[..], "{door}");
            // An address without the zone would count as another peer.
            assert!(!pair.of(side).log().text().contains("new peer"), "{door}: {}", pair.of(side).log().text());
            let status = pair.of(side).status()?;
            let by_xdp = status.doors.iter().any(|note| note.starts_with("wire0: native XDP"));
            assert_eq!(by_xdp, door == "xdp", "{:?}", status.doors);
        }
        // After a restart an engine has the same addresses, and a daemon the same peer.
        let engine = pair.b.engine_pid().context("an engine")?;
        process::signal(engine, Signal::KILL)?;
        pair.b.wait_for_line("of the next engine", |line| line.contains("the engine is back"))?;
        wait_for_ping(&net, [&pair.a, &pair.b])?;
        let Pair { mut a, b } = pair;
        assert!(a.stop()?.success());
        let told = fs::read_to_string(&told)?;
        assert_eq!(told, format!("{me} {me} {peer} {me} {peer}\n"), "{door}");
        a = Gateway::start(&net, Side::A, Daemon::Blowfish, &options(Side::A, Options::of(Side::A)))?;
        a.wait_up()?;
        wait_for_ping(&net, [&a, &b])?;
    }
    Ok(())
}

#[test]
fn a_peer_that_is_learned_or_moves_keeps_its_zone() -> Result<()> {
    const ELSEWHERE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x77);
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp", "auto"] {
        let net = network()?;
        add_address(net.gw(Side::A), ELSEWHERE, "wire0")?;
        let change = |side, options: Options| match side {
            Side::A => over("wire0", side, options).set("carrier", door),
            Side::B => over("wire0", side, options).set("carrier", door).set("peer", "[::]:0"),
        };
        let Pair { a, b } = Pair::start(&net, Daemon::Blowfish, change)?;
        wait_for_ping(&net, [&a, &b])?;
        let first = at(host(Side::A), "wire0");
        b.wait_for_lines(1, "of the peer", |line| line.contains("new peer"))?;
        b.wait_for_line("of the peer", |line| line.ends_with(&format!("new peer {first}")))?;
        assert_eq!(shown(&b)?[1], first, "{door}");
        assert!(a.stop()?.success());
        // The system picks one of the device's addresses.
        net.gw(Side::A).ip(&["-6", "addr", "del", &format!("{}/64", host(Side::A)), "dev", "wire0"])?;
        net.gw(Side::A).ip(&["-6", "addr", "flush", "dev", "wire0"])?;
        add_address(net.gw(Side::A), ELSEWHERE, "wire0")?;
        let options = change(Side::A, Options::of(Side::A)).without("me");
        // Then its socket is not bound to a device, and the datagrams are the same.
        let options = if door == "xdp" { options.flag("dynip") } else { options };
        let mut a = Gateway::start(&net, Side::A, Daemon::Blowfish, &options)?;
        a.wait_up()?;
        wait_for_ping(&net, [&a, &b])?;
        let picked = format!("[{ELSEWHERE}%wire0]:");
        assert!(shown(&a)?.iter().step_by(2).all(|me| me.starts_with(&picked)), "{door}: {:?}", shown(&a)?);
        b.wait_for_lines(2, "of the peer", |line| line.contains("new peer"))?;
        b.wait_for_line("of the peer", |line| line.contains(&format!("new peer {picked}")))?;
    }
    Ok(())
}

/// Another cable between the gateways, with the same link-local addresses.
fn another_cable(net: &Topology, device: &str) -> Result<()> {
    let (a, b) = (net.gw(Side::A), net.gw(Side::B));
    let ends = ["link", "add", device, "netns", a.name(), "type", "veth", "peer", "name", device, "netns", b.name()];
    namespace::ip(&ends)?;
    for side in [Side::A, Side::B] {
        net.gw(side).ip(&["link", "set", device, "up"])?;
        add_address(net.gw(side), host(side), device)?;
    }
    Ok(())
}

#[test]
fn tunnels_of_two_devices_share_address_and_port() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        let net = network()?;
        another_cable(&net, "wire1")?;
        let pair =
            Pair::start(&net, Daemon::Blowfish, |side, options| over("wire0", side, options).set("carrier", door))?;
        let mut others = Vec::new();
        for (side, name) in [(Side::A, "A"), (Side::B, "B")] {
            let address = |side| if side == Side::A { "10.202.0.1" } else { "10.202.0.2" };
            let options = over("wire1", side, Options::of(side)).set("carrier", door);
            let options = options.set("ipaddr", address(side)).set("ptpaddr", address(side.other()));
            let mut gateway = Gateway::start_in(&net, (net.gw(side), name), &[], Daemon::Blowfish, &options)?;
            gateway.wait_up()?;
            others.push(gateway);
        }
        pair.wait_for_keys(&net)?;
        let to = "10.202.0.2".parse()?;
        let answers = ping::wait_for_answer(net.gw(Side::A), to, Duration::from_millis(200), SOON)?;
        ensure!(answers, "{door}: {}", others[0].log().text());
        let plan = Plan::count(50);
        assert_eq!(ping::run(net.gw(Side::A), to, &plan)?.received(), 50, "{door}");
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 50, "{door}");
        for gateway in [&pair.a, &pair.b, &others[0], &others[1]] {
            let status = gateway.status()?;
            assert_eq!(status.count("bad-crc") + status.count("no-receive-key"), 0, "{door}: {status:?}");
        }
    }
    Ok(())
}

/// A PPP line or a card on USB returns under its name as another device.
#[test]
fn a_device_that_comes_back_under_its_name_is_the_zone_again() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        let net = network()?;
        another_cable(&net, "wire1")?;
        let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
            over("wire1", side, options).set("carrier", door).set("maxerr", -1)
        })?;
        pair.wait_for_keys(&net)?;
        let before = index(net.gw(Side::A), "wire1")?;
        net.gw(Side::A).ip(&["link", "del", "wire1"])?;
        pair.a.wait_for_status("no way", |status| status.doors.iter().all(|door| !door.contains("native XDP")))?;
        another_cable(&net, "wire1")?;
        assert_ne!(index(net.gw(Side::A), "wire1")?, before);
        wait_for_ping(&net, [&pair.a, &pair.b])?;
        for side in [Side::A, Side::B] {
            let expected = [at(host(side), "wire1"), at(host(side.other()), "wire1")];
            assert_eq!(shown(pair.of(side))?, [expected.clone(), expected].concat()[..], "{door}");
        }
        // The tunnel also works under a new name of the device.
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["link", "set", "wire1", "down"])?;
            net.gw(side).ip(&["link", "set", "wire1", "name", "wire2"])?;
            net.gw(side).ip(&["link", "set", "wire2", "up"])?;
            add_address(net.gw(side), host(side), "wire2")?;
        }
        wait_for_ping(&net, [&pair.a, &pair.b])?;
        assert_eq!(shown(&pair.a)?[0], at(host(Side::A), "wire2"), "{door}");
    }
    Ok(())
}
