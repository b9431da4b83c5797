//! Hosts of two LANs reach each other through the tunnel, and the carrier sees only CIPE.

use anyhow::{Context, Result};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::net::{ETHERTYPE_ARP, Frame, in_clear, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, HEADERS, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{may_make_namespaces, traffic};

/// The device MTU that the protocol sets (section 2).
const MTU: usize = 1442;
/// Octets of the IPv4 and UDP headers.
const UDP_HEADERS: usize = 28;

/// `extra`: options at both ends in addition to those of every tunnel.
fn ping_and_tcp(daemon: Daemon, offload: Offload, extra: &[(&str, &str)]) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, offload)?;
    let with_extra = |options, (name, value): &(&str, &str)| Options::set(options, name, value);
    let pair = Pair::start(&net, daemon, |_, options| extra.iter().fold(options, with_extra))?;
    pair.wait_for_keys(&net)?;

    let before = [pair.a.status()?, pair.b.status()?];
    for side in [Side::A, Side::B] {
        let report = ping::run(net.lan(side), side.other().host(), &Plan::count(100))?;
        assert_eq!((report.received(), report.damaged), (100, 0), "from {side:?}");
    }
    for (before, gateway) in before.iter().zip([&pair.a, &pair.b]) {
        // 100 requests one way, 100 answers to the other side's.
        for verdict in ["sent", "delivered"] {
            let due = before.count(verdict) + 200;
            let after = gateway.wait_for_status("200 more packets", |status| status.count(verdict) >= due)?;
            assert_eq!(after.count(verdict), due, "{verdict}: {after:?}");
        }
    }

    let octets: Vec<u8> = (0..4_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    for side in [Side::A, Side::B] {
        let to = (net.lan(side.other()), side.other().host());
        assert!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "16 MB from {side:?}");
    }
    for (side, status) in pair.stop()?.iter().enumerate() {
        assert!(status.success(), "daemon {side} ended with {status}");
    }
    Ok(())
}

#[test]
fn ping_and_tcp_pass_with_blowfish() -> Result<()> {
    ping_and_tcp(Daemon::Blowfish, Offload::On, &[])
}

#[test]
fn ping_and_tcp_pass_with_idea() -> Result<()> {
    ping_and_tcp(Daemon::Idea, Offload::On, &[])
}

#[test]
fn ping_and_tcp_pass_by_af_xdp_on_both_sides() -> Result<()> {
    ping_and_tcp(Daemon::Blowfish, Offload::Raw, &[("carrier", "xdp")])?;
    ping_and_tcp(Daemon::Idea, Offload::On, &[("carrier", "xdp")])
}

#[test]
fn ping_and_tcp_pass_by_udp_sockets() -> Result<()> {
    ping_and_tcp(Daemon::Blowfish, Offload::On, &[("carrier", "udp")])
}

#[test]
fn ping_and_tcp_pass_with_native_xdp_and_with_generic() -> Result<()> {
    for mode in ["native", "generic"] {
        ping_and_tcp(Daemon::Blowfish, Offload::Off, &[("xdp-mode", mode), ("carrier", "xdp")])?;
    }
    Ok(())
}

#[test]
fn ping_and_tcp_pass_without_any_offload() -> Result<()> {
    ping_and_tcp(Daemon::Blowfish, Offload::Raw, &[])
}

#[test]
fn ping_and_tcp_pass_sealed_by_udp_sockets() -> Result<()> {
    ping_and_tcp(Daemon::Idea, Offload::On, &[("sealed", "require"), ("carrier", "udp")])?;
    ping_and_tcp(Daemon::Blowfish, Offload::On, &[("sealed", "auto")])
}

#[test]
fn ping_and_tcp_pass_sealed_by_af_xdp() -> Result<()> {
    ping_and_tcp(Daemon::Blowfish, Offload::Raw, &[("sealed", "require"), ("carrier", "xdp")])?;
    let generic = [("sealed", "auto"), ("carrier", "xdp"), ("xdp-mode", "generic")];
    ping_and_tcp(Daemon::Idea, Offload::Off, &generic)
}

fn every_size(daemon: Daemon, change: fn(Options) -> Options) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, daemon, |_, options| change(options))?;
    pair.wait_for_keys(&net)?;

    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((HEADERS..=MTU).collect()))?;
    assert_eq!(report.lost, [0; 0], "ICMP sizes lost");
    assert_eq!(report.received(), MTU - HEADERS + 1);

    // UDP echo, one size after the other.
    let (from, to) = (net.lan(Side::A), net.lan(Side::B));
    let server = to.run(|| std::net::UdpSocket::bind((Side::B.host(), 0)))?;
    let client = from.run(|| std::net::UdpSocket::bind((Side::A.host(), 0)))?;
    client.connect(server.local_addr()?)?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(patient(cipe_tests::SOON)))?;
    }
    let mut buffer = vec![0; 2000];
    for size in UDP_HEADERS..=MTU {
        let payload = pattern(size as u32, size - UDP_HEADERS);
        client.send(&payload)?;
        let (length, sender) = server.recv_from(&mut buffer).with_context(|| format!("{size} octets, to B"))?;
        assert!(buffer[..length] == payload, "{size} octets, to B");
        server.send_to(&buffer[..length], sender)?;
        let length = client.recv(&mut buffer).with_context(|| format!("{size} octets, to A"))?;
        assert!(buffer[..length] == payload, "{size} octets, to A");
    }
    Ok(())
}

#[test]
fn every_inner_size_passes_with_blowfish() -> Result<()> {
    every_size(Daemon::Blowfish, |options| options)
}

#[test]
fn every_inner_size_passes_with_idea() -> Result<()> {
    every_size(Daemon::Idea, |options| options)
}

#[test]
fn every_inner_size_passes_sealed() -> Result<()> {
    every_size(Daemon::Blowfish, Options::sealed)
}

/// `check` is called with the payload of each datagram.
fn the_carrier_sees(change: fn(Options) -> Options, check: impl Fn(&[u8])) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let capture = net.capture_carrier(100_000)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| change(options))?;
    pair.wait_for_keys(&net)?;
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((HEADERS..=MTU).step_by(7).collect()))?;
    assert!(report.lost.is_empty(), "{:?}", report.lost);

    let frames = capture.finish()?;
    let mut datagrams = 0;
    for frame in frames.iter().map(|frame| &frame.octets) {
        let parsed = Frame::parse(frame).context("a frame has a header")?;
        if parsed.kind == ETHERTYPE_ARP {
            continue;
        }
        let packet = parsed.ipv4().with_context(|| format!("neither ARP nor IPv4: {}", hex::encode(frame)))?;
        let (source, destination, payload) =
            packet.udp().with_context(|| format!("not UDP: {}", hex::encode(frame)))?;
        assert_eq!((source, destination), (PORT, PORT));
        check(payload);
        assert!(!in_clear(payload));
        datagrams += 1;
    }
    assert!(datagrams >= 2 * report.sent, "{datagrams} datagrams for {} pings", report.sent);
    Ok(())
}

#[test]
fn the_carrier_sees_nothing_but_cipe() -> Result<()> {
    let check = |payload: &[u8]| assert!(payload.len() >= 16 && payload.len().is_multiple_of(8), "{}", payload.len());
    the_carrier_sees(|options| options, check)
}

#[test]
fn the_carrier_sees_nothing_but_sealed_packets() -> Result<()> {
    let check = |payload: &[u8]| assert!(payload.len() >= 25 && payload[..4] == [0x80, 0, 0, 0], "{payload:02x?}");
    the_carrier_sees(Options::sealed, check)
}
