//! Carriers other than a cable: VLAN, QinQ, bond, bridge, macvlan, ipvlan, VXLAN, VRF, WireGuard. A kind that this kernel has
//! no module for is skipped, with the reason printed.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cipe_tests::exercise::{Device, Line, changes_are_borne, everything_passes};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::may_make_namespaces;
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};

/// The carrier device, on top of `wire0`.
const UPPER: &str = "upper0";

/// Its address.
fn end(side: Side) -> Ipv4Addr {
    match side {
        Side::A => Ipv4Addr::new(10, 202, 0, 1),
        Side::B => Ipv4Addr::new(10, 202, 0, 2),
    }
}

fn over_upper(side: Side, options: Options) -> Options {
    let address = |side| SocketAddr::from((end(side), PORT));
    options.set("me", address(side)).set("peer", address(side.other()))
}

fn ip(namespace: &Namespace, words: &str) -> Result<()> {
    namespace.ip(&words.split_whitespace().collect::<Vec<_>>()).map(drop)
}

/// Makes `upper0` by these commands of `ip`; `false` if this kernel does not support the first.
fn make(namespace: &Namespace, side: Side, commands: &[&str]) -> Result<bool> {
    for (number, words) in commands.iter().enumerate() {
        let words =
            words.replace("OURS", &side.carrier().to_string()).replace("THEIRS", &side.other().carrier().to_string());
        match ip(namespace, &words) {
            Err(error) if number == 0 => {
                eprintln!("skipped: this kernel cannot do `ip {words}`: {error:#}");
                return Ok(false);
            }
            result => result?,
        }
    }
    namespace.sysctl(&format!("net.ipv6.conf.{UPPER}.disable_ipv6"), "1")?;
    ip(namespace, &format!("addr add {}/24 dev {UPPER}", end(side)))?;
    ip(namespace, &format!("link set {UPPER} up"))?;
    Ok(true)
}

fn mtu_of(namespace: &Namespace, device: &str) -> Result<usize> {
    let links: Vec<serde_json::Value> = serde_json::from_str(&namespace.ip(&["-j", "link", "show", "dev", device])?)?;
    links.first().and_then(|link| link["mtu"].as_u64()).map(|mtu| mtu as usize).context("a device has an MTU")
}

/// Tests a carrier of a kind, by each door that it supports.
fn carries(kind: &str, commands: &[&str]) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in ["auto", "udp", "xdp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        for side in [Side::A, Side::B] {
            if !make(net.gw(side), side, commands)? {
                return Ok(());
            }
        }
        let offload = if carrier == "xdp" { Offload::Off } else { Offload::On };
        for side in [Side::A, Side::B] {
            // Superframes must not arrive, since generic XDP cannot read them.
            if let Err(error) = offload.apply(net.gw(side), UPPER).and_then(|()| offload.apply(net.gw(side), "wire0")) {
                eprintln!("{kind}: offloads stay as they are: {error:#}");
            }
        }
        let mtu = mtu_of(net.gw(Side::A), UPPER)?;
        let pair = Pair::start(&net, Daemon::Idea, |side, options| over_upper(side, options).set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        let tell = |what: &str| format!("{kind}, carrier {carrier}, {what}");
        everything_passes(&net, Line::Sound).with_context(|| tell("as it was made"))?;
        changes_are_borne(&net, &pair, Device { name: UPPER, mtu }).with_context(|| tell("after changes"))?;
        let doors = pair.a.status()?.doors;
        println!("{kind} | carrier {carrier} | passes | {}", doors.join(", "));
    }
    Ok(())
}

#[test]
fn a_vlan_carries() -> Result<()> {
    carries("VLAN", &["link add link wire0 name upper0 type vlan id 7"])
}

#[test]
fn a_vlan_in_a_vlan_carries() -> Result<()> {
    carries(
        "QinQ",
        &[
            "link add link wire0 name outer0 type vlan proto 802.1ad id 100",
            "link set outer0 up",
            "link add link outer0 name upper0 type vlan id 7",
        ],
    )
}

#[test]
fn a_bond_carries() -> Result<()> {
    carries(
        "bond",
        &[
            "link add upper0 type bond mode active-backup miimon 100",
            "link set wire0 down",
            "link set wire0 master upper0",
        ],
    )
}

#[test]
fn a_bridge_carries() -> Result<()> {
    carries("bridge", &["link add upper0 type bridge", "link set wire0 master upper0"])
}

#[test]
fn a_macvlan_carries() -> Result<()> {
    carries("macvlan", &["link add link wire0 name upper0 type macvlan mode bridge"])
}

#[test]
fn an_ipvlan_carries() -> Result<()> {
    carries("ipvlan", &["link add link wire0 name upper0 type ipvlan mode l2"])
}

#[test]
fn a_vxlan_carries() -> Result<()> {
    carries("VXLAN", &["link add upper0 type vxlan id 7 local OURS remote THEIRS dstport 4789"])
}

/// Private keys of WireGuard, for side A and side B. Not secrets.
const WIREGUARD: [&str; 2] =
    ["SDNl4tJYDdnVEgNp4Nu3Gbt0WTzJVMmnSWaTPYOGnXE=", "uIy/Pn6UcbhcQCyKw9hXzb5/Vqs4o3R9zXRCRzxGxno="];

#[test]
fn a_wireguard_carries() -> Result<()> {
    let wg = |namespace: &Namespace, words: &[&str]| -> Result<String> {
        let output = namespace.command("wg").args(words).output()?;
        ensure!(output.status.success(), "wg {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    if !may_make_namespaces() {
        return Ok(());
    }
    if Command::new("wg").arg("--version").output().is_err() {
        eprintln!("skipped: no wg (package wireguard-tools)");
        return Ok(());
    }
    for carrier in ["auto", "udp"] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let mut public = Vec::new();
        for (side, private) in [Side::A, Side::B].into_iter().zip(WIREGUARD) {
            if !make(net.gw(side), side, &["link add upper0 type wireguard"])? {
                return Ok(());
            }
            let file = net.directory().join(format!("wg-{}", side.letter()));
            std::fs::write(&file, private)?;
            let file = file.display().to_string();
            wg(net.gw(side), &["set", UPPER, "listen-port", "51820", "private-key", &file])?;
            public.push(wg(net.gw(side), &["show", UPPER, "public-key"])?);
        }
        for (side, key) in [(Side::A, &public[1]), (Side::B, &public[0])] {
            let endpoint = format!("{}:51820", side.other().carrier());
            wg(net.gw(side), &["set", UPPER, "peer", key, "allowed-ips", "10.202.0.0/24", "endpoint", &endpoint])?;
        }
        let mtu = mtu_of(net.gw(Side::A), UPPER)?;
        let pair = Pair::start(&net, Daemon::Idea, |side, options| over_upper(side, options).set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        everything_passes(&net, Line::Sound).with_context(|| format!("WireGuard, carrier {carrier}"))?;
        changes_are_borne(&net, &pair, Device { name: UPPER, mtu })?;
        println!("WireGuard | carrier {carrier} | passes | {}", pair.a.status()?.doors.join(", "));
    }
    Ok(())
}

/// The carrier's card is in a VRF: its routes are in a separate table, which only sockets bound to the device use.
#[test]
fn a_vrf_carries_with_carrier_device() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (device, carrier) in [("vrf0", "auto"), ("vrf0", "xdp"), ("wire0", "udp")] {
        let offload = if carrier == "xdp" { Offload::Off } else { Offload::On };
        let net = Topology::new(Carrier::Direct, offload)?;
        for side in [Side::A, Side::B] {
            let gateway = net.gw(side);
            if let Err(error) = ip(gateway, "link add vrf0 type vrf table 77") {
                eprintln!("skipped: this kernel has no VRF: {error:#}");
                return Ok(());
            }
            ip(gateway, "link set vrf0 up")?;
            ip(gateway, "link set wire0 master vrf0")?;
        }
        let pair = Pair::start(&net, Daemon::Idea, |_, options| {
            options.set("carrier", carrier).set("carrier-device", device)
        })?;
        pair.wait_for_keys(&net)?;
        everything_passes(&net, Line::Sound).with_context(|| format!("VRF, {device}, carrier {carrier}"))?;
        changes_are_borne(&net, &pair, Device { name: "wire0", mtu: 1500 })?;
        println!("VRF, carrier-device {device} | carrier {carrier} | passes | {}", pair.a.status()?.doors.join(", "));
    }
    Ok(())
}

/// Two paths to the peer: the routes lead over one card, and `carrier-device` over the other.
#[test]
fn carrier_device_takes_the_card_that_it_names() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in ["udp", "xdp"] {
        let offload = if carrier == "xdp" { Offload::Off } else { Offload::On };
        let net = Topology::new(Carrier::Direct, offload)?;
        let (a, b) = (net.gw(Side::A), net.gw(Side::B));
        ip(a, &format!("link add wire1 type veth peer name wire1 netns {}", b.name()))?;
        for (side, address) in [(Side::A, "10.203.0.1"), (Side::B, "10.203.0.2")] {
            ip(net.gw(side), &format!("addr add {address}/24 dev wire1"))?;
            ip(net.gw(side), "link set wire1 up")?;
            offload.apply(net.gw(side), "wire1")?;
            // Both cards reach the peer's address; the plain route leads over wire0.
            let (peer, via) = (side.other().carrier(), if side == Side::A { "10.203.0.2" } else { "10.203.0.1" });
            ip(net.gw(side), &format!("route add {peer}/32 via {via} dev wire1 metric 9"))?;
            ip(net.gw(side), &format!("route add {peer}/32 dev wire0 metric 1"))?;
        }
        let start = |device: &str| {
            Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", carrier).set("carrier-device", device))
        };
        for device in ["wire0", "wire1"] {
            let pair = start(device)?;
            pair.wait_for_keys(&net)?;
            everything_passes(&net, Line::Sound).with_context(|| format!("{device}, carrier {carrier}"))?;
            let of_device = |status: &Status| status.doors.iter().any(|door| door.starts_with(&format!("{device}:")));
            pair.a.wait_for_status(device, of_device)?;
            // A datagram by the other card is not for the tunnel.
            if carrier == "udp" {
                let other = if device == "wire0" { "wire1" } else { "wire0" };
                let before = net.gw(Side::B).counters(other)?;
                everything_passes(&net, Line::Sound)?;
                let after = net.gw(Side::B).counters(other)?;
                ensure!(after.rx_packets - before.rx_packets < 10, "{before:?} {after:?}");
            }
            pair.stop()?;
        }
    }
    Ok(())
}

#[test]
fn a_device_that_is_not_there_is_named() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let options = Options::of(Side::A).set("carrier-device", "nowhere0");
    let mut gateway = cipe_tests::gateway::Gateway::start(&net, Side::A, Daemon::Idea, &options)?;
    let error = gateway.wait_up().map(drop).unwrap_err();
    ensure!(format!("{error:#}{}", gateway.log().text()).contains("carrier-device nowhere0"), "{error:#}");
    Ok(())
}
