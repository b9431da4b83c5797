//! Carriers that AF_XDP cannot serve: the engine chooses the UDP socket, and the status reports it.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::line::Line;
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::peer::{Cipher, Config, Peer};
use cipe_tests::ping::{self, Plan};
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process, traffic};
use cipe_user::kernel::bpf::{LoadOptions, Programs, XdpMode};

const MTU: usize = 1442;

fn has_door(status: &Status, words: &[&str]) -> bool {
    status.doors.iter().any(|door| words.iter().all(|word| door.contains(word)))
}

/// Pings of all sizes, and 2 MB of TCP, from either side.
fn everything_passes(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let plan = Plan::sizes((ping::HEADERS..=MTU).step_by(13).chain([MTU]).collect());
        let report = ping::run(net.lan(side), side.other().host(), &plan)?;
        assert_eq!((report.received(), report.damaged), (report.sent, 0), "lost: {:?}", report.lost);
        let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        let to = (net.lan(side.other()), side.other().host());
        assert!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "from {side:?}");
    }
    Ok(())
}

#[test]
fn a_line_without_ethernet_carries_a_tunnel_by_the_udp_socket() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let end = |side| match side {
        Side::A => Ipv4Addr::new(10, 202, 0, 1),
        Side::B => Ipv4Addr::new(10, 202, 0, 2),
    };
    let _line = Line::new("line0", [Side::A, Side::B].map(|side| (net.gw(side), end(side))))?;
    let address = |side| SocketAddr::from((end(side), PORT));
    for daemon in [Daemon::Blowfish, Daemon::Idea] {
        let pair = Pair::start(&net, daemon, |side, options| {
            options.set("me", address(side)).set("peer", address(side.other()))
        })?;
        pair.wait_for_keys(&net)?;
        everything_passes(&net)?;
        for side in [Side::A, Side::B] {
            let status = pair.of(side).status()?;
            assert!(has_door(&status, &["line0", "UDP socket", "no Ethernet"]), "{status:?}");
        }
    }
    Ok(())
}

#[test]
fn the_loopback_carries_a_tunnel_by_the_udp_socket() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let [ours, theirs] = [PORT, PORT + 1].map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let mut key = [0; 16];
    hex::decode_to_slice(KEY, &mut key)?;
    let socket = net.gw(Side::A).run(|| UdpSocket::bind(theirs))?;
    let (peer, _events) = Peer::start(socket, Config::original(Cipher::Idea, key))?;
    let options = Options::of(Side::A).set("me", ours).set("peer", theirs);
    let mut gateway = Gateway::start(&net, Side::A, Daemon::Idea, &options)?;
    gateway.wait_up()?;
    let (deadline, one) =
        (Instant::now() + process::patient(SOON), Plan { timeout: Duration::from_millis(500), ..Plan::count(1) });
    while ping::run(net.lan(Side::A), Side::B.host(), &one)?.received() == 0 {
        if Instant::now() > deadline {
            bail!("{:?}\n{:?}\n{}", peer.counters(), gateway.status()?, gateway.log().text());
        }
    }
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((31..=MTU).step_by(13).collect()))?;
    assert_eq!(report.lost, [0; 0]);
    let status = gateway.status()?;
    assert!(has_door(&status, &["lo: UDP socket", "no Ethernet"]), "{status:?}");
    Ok(())
}

#[test]
fn the_status_says_which_door_was_asked_for() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for (carrier, words) in [("udp", &["wire0: UDP socket", "`carrier`"][..]), ("xdp", &["wire0", "XDP"])] {
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        pair.a.wait_for_status(carrier, |status| has_door(status, words))?;
    }
    Ok(())
}

/// A router on the path fragments datagrams without DF that are too large for its next link. The kernel reassembles them before
/// the tunnel gets them.
fn datagrams_in_fragments_reach_the_tunnel(carriers: &[&str], sealed: &str) -> Result<()> {
    const LARGE: usize = 20;
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in carriers {
        let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
        for side in [Side::A, Side::B] {
            net.lan(side).sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
        }
        let pair =
            Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", carrier).set("sealed", sealed))?;
        pair.wait_for_keys(&net)?;
        // Towards A only: a device with this MTU would not receive A's own datagrams.
        let (tap, to) = (net.tap().expect("a tapped carrier has a tap"), Side::A.carrier().to_string());
        tap.ip(&["route", "replace", &to, "dev", "portA", "mtu", "lock", "1000"])?;
        let report = ping::run(net.lan(Side::B), Side::A.host(), &Plan::sizes(vec![1400; LARGE]))?;
        assert_eq!((report.received(), report.damaged), (LARGE, 0), "{carrier}");
        let status = pair.a.status()?;
        assert_eq!(status.count("fragmented"), LARGE as u64, "{carrier}: {status:?}");
        assert_eq!(pair.b.status()?.count("fragmented"), 0);
    }
    Ok(())
}

#[test]
fn datagrams_in_fragments_reach_the_tunnel_and_are_counted() -> Result<()> {
    datagrams_in_fragments_reach_the_tunnel(&["xdp", "udp", "auto"], "no")
}

#[test]
fn sealed_datagrams_in_fragments_reach_the_tunnel_and_are_counted() -> Result<()> {
    datagrams_in_fragments_reach_the_tunnel(&["xdp", "udp"], "require")
}

/// A device on top of the carrier's cable, of a kind of `ip link add link wire0 type ...`.
fn a_device_on_another_carries(kind: &[&str]) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let end = |side| match side {
        Side::A => Ipv4Addr::new(10, 202, 0, 1),
        Side::B => Ipv4Addr::new(10, 202, 0, 2),
    };
    let address = |side| SocketAddr::from((end(side), PORT));
    // Such drivers have no native XDP, so `auto` cannot change to it.
    for (offload, carrier, words) in [
        (Offload::Raw, "xdp", "upper0: generic (native refused"),
        (Offload::On, "xdp", "upper0: generic (native refused"),
        (Offload::Raw, "udp", "upper0: UDP socket, as `carrier` says"),
        (Offload::On, "auto", "upper0: UDP socket"),
        (Offload::Raw, "auto", "upper0: UDP socket, AF_XDP refused"),
    ] {
        let net = Topology::new(Carrier::Direct, offload)?;
        for side in [Side::A, Side::B] {
            let gateway = net.gw(side);
            let link = ["link", "add", "link", "wire0", "name", "upper0", "type"];
            if let Err(error) = gateway.ip(&[&link[..], kind].concat()) {
                eprintln!("skipped: this kernel cannot make a {}: {error:#}", kind[0]);
                return Ok(());
            }
            gateway.sysctl("net.ipv6.conf.upper0.disable_ipv6", "1")?;
            offload.apply(gateway, "upper0")?;
            gateway.ip(&["addr", "add", &format!("{}/24", end(side)), "dev", "upper0"])?;
            gateway.ip(&["link", "set", "upper0", "up"])?;
        }
        let pair = Pair::start(&net, Daemon::Idea, |side, options| {
            options.set("me", address(side)).set("peer", address(side.other())).set("carrier", carrier)
        })?;
        pair.wait_for_keys(&net)?;
        everything_passes(&net)?;
        pair.a.wait_for_status(words, |status| has_door(status, &[words]))?;
        // The door stays the same, and the tunnel works.
        everything_passes(&net)?;
        for gateway in [&pair.a, &pair.b] {
            let status = gateway.status()?;
            assert!(has_door(&status, &[words]), "{offload:?}, {carrier}: {status:?}");
        }
    }
    Ok(())
}

#[test]
fn a_vlan_carries_a_tunnel_by_each_door() -> Result<()> {
    a_device_on_another_carries(&["vlan", "id", "7"])
}

#[test]
fn a_macvlan_carries_a_tunnel_by_each_door() -> Result<()> {
    a_device_on_another_carries(&["macvlan", "mode", "bridge"])
}

/// Another owner's XDP program on a gateway's carrier device; it passes everything.
fn foreign_program(net: &Topology, side: Side) -> Result<(Programs, u32)> {
    net.gw(side).run(|| {
        let mut programs = Programs::load(&LoadOptions { max_tunnels: 4, max_carriers: 2, ..LoadOptions::default() })?;
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        let ifindex = rustix::net::netdevice::name_to_index(&socket, "wire0")?;
        programs.attach_carrier(ifindex, XdpMode::Native)?;
        Ok((programs, ifindex))
    })
}

#[test]
fn af_xdp_is_taken_again_when_another_program_has_gone() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let (foreign, ifindex) = foreign_program(&net, Side::A)?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", "xdp"))?;
    pair.wait_for_keys(&net)?;
    let other = ["wire0", "UDP socket", "another XDP program (id "];
    pair.a.wait_for_status("the other program", |status| has_door(status, &other))?;
    everything_passes(&net)?;
    drop(foreign);
    let own = ["wire0: native XDP"];
    pair.a.wait_for_status("AF_XDP", |status| has_door(status, &own) && !has_door(status, &other))?;
    everything_passes(&net)?;

    // The engine's own program is detached from outside, without another one in its place, and with one.
    let engine = pair.a.engine_pid().context("an engine")?;
    process::detach_xdp(engine, ifindex)?;
    pair.a.wait_for_line("of the loss", |line| line.contains("somebody has detached"))?;
    pair.a.wait_for_status("AF_XDP again", |status| has_door(status, &own))?;
    everything_passes(&net)?;
    process::detach_xdp(engine, ifindex)?;
    // The first owner keeps the device.
    if let Ok((foreign, _)) = foreign_program(&net, Side::A) {
        pair.a.wait_for_status("the other program", |status| has_door(status, &other))?;
        everything_passes(&net)?;
        drop(foreign);
    }
    pair.a.wait_for_status("AF_XDP at last", |status| has_door(status, &own) && !has_door(status, &other))?;
    everything_passes(&net)
}
