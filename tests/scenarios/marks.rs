//! Fields that the outer header copies from the inner one, by either door: TOS, TTL and DF, and the effect of options.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::net::{Frame, UDP, checksum};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use socket2::{Domain, Protocol, Socket, Type};

/// Octets of an encrypted datagram with a payload of `n` (protocol section 2): IV, payload, padding, P, CRC.
fn sealed(n: usize) -> usize {
    8 + n + (8 - (n + 5) % 8) % 8 + 5
}

/// A UDP packet of lanA to lanB, `n` octets with the IP header.
fn inner(n: usize, tos: u8, ttl: u8, dont_fragment: bool) -> Vec<u8> {
    let mut packet = vec![0x45, tos];
    packet.extend((n as u16).to_be_bytes());
    packet.extend([0, 1, if dont_fragment { 0x40 } else { 0 }, 0, ttl, UDP, 0, 0]);
    packet.extend(Side::A.host().octets());
    packet.extend(Side::B.host().octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0x1F, 0x90, 0x1F, 0x90]);
    packet.extend(((n - 20) as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.resize(n, 0x55);
    packet
}

/// The parts of an outer header that matter here.
#[derive(Debug, PartialEq)]
struct Outer {
    tos: u8,
    ttl: u8,
    dont_fragment: bool,
    has_checksum: bool,
}

/// Reads the header of A's datagram with `n` inner octets and verifies its checksum; `None` for every other frame.
fn outer(frame: &[u8], n: usize) -> Option<Outer> {
    let packet = Frame::parse(frame)?.payload;
    let ip = Frame::parse(frame)?.ipv4()?;
    let (from, _, datagram) = ip.udp()?;
    if ip.source != Side::A.carrier() || from != PORT || datagram.len() != sealed(n) {
        return None;
    }
    let has_checksum = ip.payload[6..8] != [0, 0];
    if has_checksum {
        let length = ip.payload.len() as u16;
        let pseudo = [&ip.source.octets()[..], &ip.destination.octets(), &[0, UDP], &length.to_be_bytes()].concat();
        assert_eq!(checksum(&[&pseudo, ip.payload].concat()), 0, "wrong UDP checksum");
    }
    Some(Outer { tos: packet[1], ttl: packet[8], dont_fragment: packet[6] & 0x40 != 0, has_checksum })
}

/// Sends packets with all marks through A and returns the expected outer headers that differ from the real ones.
fn check(door: &str, change: impl Fn(Options) -> Options, expect: impl Fn(u8, u8, bool) -> Outer) -> Result<()> {
    // No offloads: the tap sees complete checksums, as on a real link.
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => change(options.without("cttl").set("carrier", door)),
        Side::B => options,
    })?;
    pair.wait_for_keys(&net)?;
    let capture = net.capture_carrier(100_000)?;
    let raw = net.lan(Side::A).run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
    let to = SocketAddr::from((Side::B.host(), 0)).into();
    let mut n = 200;
    for tos in [0, 0x10, 0xB8, 0xB9, 0x03, 0xFF] {
        for (ttl, dont_fragment) in [(2, true), (64, false), (255, true)] {
            // A unique length identifies the packet.
            n += 8;
            raw.send_to(&inner(n, tos, ttl, dont_fragment), &to)?;
            let frame = capture.wait_for(SOON, |frame| outer(frame, n).is_some());
            let frame = frame.with_context(|| format!("{door}: {n} octets were not seen\n{}", pair.a.log().text()))?;
            // The gateway is a hop.
            let expected = expect(tos, ttl - 1, dont_fragment);
            assert_eq!(outer(&frame.octets, n), Some(expected), "{door}, TOS {tos:#x}, TTL {ttl}, DF {dont_fragment}");
        }
    }
    Ok(())
}

/// A UDP socket puts a checksum on everything, which originals accept.
fn usual(door: &str) -> bool {
    door == "udp"
}

#[test]
fn tos_ttl_and_df_are_those_of_the_inner_packet() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        check(
            door,
            |options| options,
            |tos, ttl, dont_fragment| Outer { tos, ttl, dont_fragment, has_checksum: usual(door) },
        )?;
    }
    Ok(())
}

#[test]
fn cttl_is_the_outer_ttl_and_ignoredf_lets_the_carrier_cut() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        check(
            door,
            |options| options.set("cttl", 77).flag("ignoredf"),
            |tos, _, _| Outer { tos, ttl: 77, dont_fragment: false, has_checksum: usual(door) },
        )?;
    }
    Ok(())
}

#[test]
fn checksum_puts_one_on_every_datagram() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        check(
            door,
            |options| options.flag("checksum"),
            |tos, ttl, dont_fragment| Outer { tos, ttl, dont_fragment, has_checksum: true },
        )?;
    }
    Ok(())
}
