//! IPv6 inside the tunnel and as the carrier.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::pattern;
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};

/// The device MTU that the protocol sets (section 2).
const MTU: usize = 1442;
/// The MTU inside, over an IPv6 carrier of 1500 octets: 20 octets fewer than over IPv4.
const MTU_OVER_IPV6: usize = MTU - 20;
/// The same of sealed packets, by what a carrier of 1500 octets leaves: 48 octets of headers and 25 of a packet.
const SEALED_MTU_OVER_IPV6: usize = 1500 - 48 - 25;
/// Octets of the IPv6 and UDP headers.
const HEADERS: usize = 48;

fn number(side: Side) -> u16 {
    match side {
        Side::A => 1,
        Side::B => 2,
    }
}

fn inside(side: Side) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x201, 0, 0, 0, 0, 0, number(side))
}

fn carrier(side: Side) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, number(side))
}

/// A network whose gateways use IPv6 on the carrier.
fn network() -> Result<Topology> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        let gateway = net.gw(side);
        for name in ["default", "wire0"] {
            gateway.sysctl(&format!("net.ipv6.conf.{name}.disable_ipv6"), "0")?;
            gateway.sysctl(&format!("net.ipv6.conf.{name}.accept_dad"), "0")?;
        }
        gateway.ip(&["-6", "addr", "add", &format!("{}/64", carrier(side)), "dev", "wire0", "nodad"])?;
    }
    Ok(net)
}

fn over_ipv6(side: Side, options: Options) -> Options {
    let address = |side| SocketAddr::from((carrier(side), PORT));
    options.set("me", address(side)).set("peer", address(side.other()))
}

/// Datagrams of every size and a TCP stream between the inner addresses of the gateways.
fn inner_traffic(net: &Topology, mtu: usize) -> Result<()> {
    let (a, b) = (net.gw(Side::A), net.gw(Side::B));
    let server = b.run(|| UdpSocket::bind((inside(Side::B), 0)))?;
    let client = a.run(|| UdpSocket::bind((inside(Side::A), 0)))?;
    client.connect(server.local_addr()?)?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(patient(SOON)))?;
    }
    first_answer(&client, &server)?;
    let mut buffer = vec![0; 2000];
    for size in (HEADERS..=mtu).rev().step_by(3) {
        let payload = pattern(size as u32, size - HEADERS);
        client.send(&payload)?;
        let (length, from) = loop {
            let got = server.recv_from(&mut buffer).with_context(|| format!("{size} octets, to B"))?;
            if buffer[..got.0] != *FIRST {
                break got;
            }
        };
        assert!(buffer[..length] == payload, "{size} octets, to B");
        server.send_to(&buffer[..length], from)?;
        let length = client.recv(&mut buffer).with_context(|| format!("{size} octets, to A"))?;
        assert!(buffer[..length] == payload, "{size} octets, to A");
    }
    for (from, to, side) in [(a, b, Side::B), (b, a, Side::A)] {
        transfer(from, to, inside(side)).with_context(|| format!("TCP to {side:?}"))?;
    }
    Ok(())
}

/// A packet that is sent until one arrives, before the test of sizes.
const FIRST: &[u8] = b"first";

/// Sends until a packet arrives: the keys may not be there yet. Copies of it may arrive later.
fn first_answer(client: &UdpSocket, server: &UdpSocket) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    let mut buffer = [0; 64];
    server.set_read_timeout(Some(Duration::from_millis(100)))?;
    loop {
        client.send(FIRST)?;
        if server.recv_from(&mut buffer).is_ok() {
            break;
        }
        if Instant::now() > deadline {
            bail!("nothing comes through");
        }
    }
    server.set_read_timeout(Some(patient(SOON)))?;
    Ok(())
}

fn transfer(from: &Namespace, to: &Namespace, address: Ipv6Addr) -> Result<()> {
    let octets: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let listener = to.run(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    let mut sender = from.run(|| TcpStream::connect_timeout(&target, patient(SOON)))?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_write_timeout(Some(patient(SOON)))?;
    receiver.set_read_timeout(Some(patient(SOON)))?;
    std::thread::scope(|scope| {
        let octets = &octets;
        scope.spawn(move || sender.write_all(octets));
        let mut got = Vec::with_capacity(octets.len());
        receiver.read_to_end(&mut got).with_context(|| format!("after {} octets", got.len()))?;
        assert!(got == *octets, "{} octets of {}", got.len(), octets.len());
        Ok(())
    })
}

#[test]
fn ipv6_passes_inside_with_ipv6_addresses_of_the_tunnel() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = network()?;
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
        options.set("ipaddr", inside(side)).set("ptpaddr", inside(side.other()))
    })?;
    inner_traffic(&net, MTU).with_context(|| format!("{:?}\n{}", pair.a.status(), pair.a.log().text()))
}

#[test]
fn ipv6_passes_inside_beside_ipv4() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = network()?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    for side in [Side::A, Side::B] {
        let (own, peer) = (inside(side).to_string(), inside(side.other()).to_string());
        net.gw(side).ip(&["-6", "addr", "add", &own, "peer", &peer, "dev", "cipci0", "nodad"])?;
    }
    inner_traffic(&net, MTU).with_context(|| format!("{:?}\n{}", pair.a.status(), pair.a.log().text()))
}

#[test]
fn the_carrier_is_ipv6() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (daemon, sealed, mtu) in [
        (Daemon::Blowfish, "no", MTU_OVER_IPV6),
        (Daemon::Idea, "no", MTU_OVER_IPV6),
        (Daemon::Idea, "require", SEALED_MTU_OVER_IPV6),
    ] {
        let net = network()?;
        let pair = Pair::start(&net, daemon, |side, options| over_ipv6(side, options).set("sealed", sealed))?;
        pair.wait_for_keys(&net)?;
        let plan = Plan::sizes((ping::HEADERS..=mtu).step_by(7).chain([mtu]).collect());
        let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        assert_eq!((report.received(), report.damaged), (report.sent, 0), "lost: {:?}", report.lost);
        let octets: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        for side in [Side::A, Side::B] {
            let to = (net.lan(side.other()), side.other().host());
            assert!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "from {side:?}");
        }
        let status = pair.b.status()?;
        assert_eq!(status.count("bad-crc") + status.count("bad-tag") + status.count("bad-length"), 0, "{status:?}");
    }
    Ok(())
}

/// ICMPv6 informs the sender of the MTU that a smaller carrier path leaves, and the sender then fragments.
#[test]
fn a_sender_inside_is_told_what_a_smaller_carrier_path_leaves() -> Result<()> {
    const PATH: usize = 1400;
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = network()?;
    for side in [Side::A, Side::B] {
        net.gw(side).ip(&["link", "set", "wire0", "mtu", &PATH.to_string()])?;
    }
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
        options.set("ipaddr", inside(side)).set("ptpaddr", inside(side.other()))
    })?;
    let (a, b) = (net.gw(Side::A), net.gw(Side::B));
    let server = b.run(|| UdpSocket::bind((inside(Side::B), 0)))?;
    let client = a.run(|| UdpSocket::bind((inside(Side::A), 0)))?;
    client.connect(server.local_addr()?)?;
    first_answer(&client, &server)?;
    let deadline = Instant::now() + patient(SOON);
    let payload = pattern(1, MTU - HEADERS);
    let learned = || a.ip(&["-6", "route", "get", &inside(Side::B).to_string()]);
    let expected = format!("mtu {}", PATH - 48);
    while !learned()?.contains(&expected) {
        // The kernel refuses it once it knows.
        let _ = client.send(&payload);
        if Instant::now() > deadline {
            bail!("{}\n{:?}\n{}", learned()?, pair.a.status()?, pair.a.log().text());
        }
    }
    // The refused size is reported once more.
    while let Err(error) = client.send(&payload) {
        if Instant::now() > deadline {
            return Err(error.into());
        }
    }
    let mut buffer = vec![0; 2000];
    server.set_read_timeout(Some(patient(SOON)))?;
    let length = loop {
        let length = server.recv(&mut buffer).context("the fragments arrive")?;
        if buffer[..length] != *FIRST {
            break length;
        }
    };
    assert!(buffer[..length] == payload);
    assert!(pair.a.status()?.count("too-big") > 0);
    Ok(())
}

#[test]
fn both_are_ipv6() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = network()?;
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
        over_ipv6(side, options).set("ipaddr", inside(side)).set("ptpaddr", inside(side.other()))
    })?;
    inner_traffic(&net, MTU_OVER_IPV6).with_context(|| format!("{:?}\n{}", pair.a.status(), pair.a.log().text()))
}

#[test]
fn fragments_over_ipv6_are_joined_and_counted() -> Result<()> {
    const LARGE: usize = 20;
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["xdp", "udp"] {
        let net = network()?;
        let pair = Pair::start(&net, Daemon::Blowfish, |side, options| over_ipv6(side, options).set("carrier", door))?;
        pair.wait_for_keys(&net)?;
        // Noise, because none of our datagrams is larger than the link; the kernel fragments it. Zeros would be a message in
        // clear.
        let socket = net.gw(Side::B).run(|| UdpSocket::bind((carrier(Side::B), 0)))?;
        for _ in 0..LARGE {
            socket.send_to(&[0x55; 1600], (carrier(Side::A), PORT))?;
        }
        let status = pair.a.wait_for_status("noise", |status| status.count("bad-crc") == LARGE as u64)?;
        assert_eq!(status.count("fragmented"), LARGE as u64, "{door}: {status:?}");
    }
    Ok(())
}
