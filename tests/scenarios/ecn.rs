//! By every door, the congestion mark (CE) of a router on the carrier is copied to the inner packet, as RFC 6040 requires; a
//! packet without ECN is dropped and counted.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cipe_tests::capture::Capture;
use cipe_tests::gateway::Daemon;
use cipe_tests::net::{Frame, UDP, checksum};
use cipe_tests::options::PORT;
use cipe_tests::original::Original;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces};
use socket2::{Domain, Protocol, Socket, Type};

/// The delivered field for each inner and outer field, `None` for a drop: figure 4 of RFC 6040.
const TABLE: [(u8, u8, Option<u8>); 16] = [
    (0, 0, Some(0)),
    (0, 2, Some(0)),
    (0, 1, Some(0)),
    (0, 3, None),
    (2, 0, Some(2)),
    (2, 2, Some(2)),
    (2, 1, Some(1)),
    (2, 3, Some(3)),
    (1, 0, Some(1)),
    (1, 2, Some(1)),
    (1, 1, Some(1)),
    (1, 3, Some(3)),
    (3, 0, Some(3)),
    (3, 2, Some(3)),
    (3, 1, Some(3)),
    (3, 3, Some(3)),
];

/// Bits of the TOS other than the congestion bits.
const DSCP: u8 = 0xB8;

/// A UDP packet of lanB to lanA, which its length identifies.
fn packet(length: usize, ecn: u8) -> Vec<u8> {
    let mut packet = vec![0x45, DSCP | ecn];
    packet.extend((length as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, UDP, 0, 0]);
    packet.extend(Side::B.host().octets());
    packet.extend(Side::A.host().octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend([0x1F, 0x90, 0x1F, 0x90]);
    packet.extend(((length - 20) as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.resize(length, 0x55);
    packet
}

/// TOS of a packet of this length on lanA; checks the packet's header.
fn tos(frame: &[u8], length: usize) -> Option<u8> {
    let frame = Frame::parse(frame)?;
    let ip = frame.ipv4().filter(|ip| ip.source == Side::B.host() && ip.payload.len() + 20 == length)?;
    ensure_header(&frame.payload[..20]);
    (ip.protocol == UDP).then(|| frame.payload[1])
}

fn ensure_header(header: &[u8]) {
    assert_eq!(checksum(header), 0, "wrong header checksum: {}", hex::encode(header));
}

#[test]
fn a_router_s_marks_go_over_to_what_the_datagrams_carry() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["udp", "xdp"] {
        let original = Original::start(Daemon::Blowfish, |options| options.set("carrier", door), |_| {})?;
        original.wait_for_pings()?;
        let (net, lan) = (&original.net, original.net.lan(Side::B));
        let raw = lan.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
        let to = SocketAddr::from((Side::A.host(), 0)).into();
        let capture = Capture::start(net.lan(Side::A), 10_000, |frame| Frame::parse(frame).is_some())?;
        let dropped = original.ours.status()?.count("congestion-drop");
        ensure!(dropped == 0, "{door}: {dropped} dropped before anything was marked");
        let (mut length, mut due) = (200, 0);
        for outer in 0..4 {
            // The carrier's mark: the second implementation sends from a socket with that TOS.
            let socket = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT + 10 + u16::from(outer))))?;
            socket2::SockRef::from(&socket).set_tos_v4(u32::from(DSCP | outer))?;
            original.theirs.move_to(socket)?;
            for (inner, _, expected) in TABLE.into_iter().filter(|(_, of, _)| *of == outer) {
                length += 8;
                raw.send_to(&packet(length, inner), &to)?;
                let what = || format!("{door}: {inner} in {outer}\n{}", original.ours.log().text());
                if let Some(ecn) = expected {
                    let frame = capture.wait_for(SOON, |frame| tos(frame, length).is_some()).with_context(what)?;
                    assert_eq!(tos(&frame.octets, length), Some(DSCP | ecn), "{}", what());
                    continue;
                }
                due += 1;
                let status = original.ours.wait_for_status("the drop", |status| status.count("congestion-drop") >= due);
                assert_eq!(status.with_context(what)?.count("congestion-drop"), due, "{}", what());
                let seen = capture.wait_for(Duration::ZERO, |frame| tos(frame, length).is_some());
                ensure!(seen.is_none(), "{}: it arrived", what());
            }
        }
    }
    Ok(())
}
