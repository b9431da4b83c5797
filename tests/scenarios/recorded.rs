//! Somebody on the carrier records everything, and sends it again after a restart of gateway A: nothing of it is taken.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::may_make_namespaces;
use cipe_tests::net::{Frame, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::PORT;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use socket2::{Domain, Protocol, Socket, Type};

/// Datagrams of data that are recorded, and their port.
const DATAGRAMS: usize = 100;
const DATA_PORT: u16 = 5555;

/// Whether a carrier datagram is under the static key, as key exchanges after a restart are.
fn is_static(packet: &[u8]) -> bool {
    packet.get(28).is_some_and(|first| first & 0x80 == 0)
}

/// Number of datagrams that wait at a socket.
fn drain(socket: &UdpSocket) -> Result<usize> {
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut octets = [0; 2048];
    Ok(std::iter::from_fn(|| socket.recv(&mut octets).ok()).count())
}

#[test]
fn nothing_recorded_is_taken_after_a_restart() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let capture = net.capture_carrier(10_000)?;
    let mut pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let receiver = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), DATA_PORT)))?;
    let sender = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
    for number in 0..DATAGRAMS {
        sender.send_to(&pattern(number as u32, 100), (Side::A.host(), DATA_PORT))?;
    }
    assert_eq!(drain(&receiver)?, DATAGRAMS);
    // The IP packets of the tunnel that have come to A.
    let recorded: Vec<Vec<u8>> = capture
        .finish()?
        .iter()
        .filter_map(|frame| {
            Frame::parse(&frame.octets)?
                .ipv4()
                .filter(|ip| ip.destination == Side::A.carrier())
                .map(|_| frame.octets[14..].to_vec())
        })
        .filter(|packet| packet.get(22..24) == Some(&PORT.to_be_bytes()))
        .collect();
    let (exchanges, data): (Vec<_>, Vec<_>) = recorded.into_iter().partition(|packet| is_static(packet));
    assert!(!exchanges.is_empty() && data.len() >= DATAGRAMS, "{} and {}", exchanges.len(), data.len());

    pair.a.restart(net.gw(Side::A))?;
    pair.wait_for_keys(&net)?;
    let keys = pair.a.log().text().lines().filter(|line| line.contains("new receive key")).count();
    let tap = net.tap().context("a tapped carrier has a router")?;
    let raw = tap.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
    let to = SocketAddr::from((Side::A.carrier(), 0)).into();
    for packet in exchanges.iter().chain(&data) {
        raw.send_to(packet, &to)?;
    }
    assert_eq!(drain(&receiver)?, 0, "recorded datagrams reached the LAN");
    let plan = Plan { interval: Duration::from_millis(10), ..Plan::count(100) };
    for side in [Side::A, Side::B] {
        assert_eq!(ping::run(net.lan(side), side.other().host(), &plan)?.lost, [0; 0]);
    }
    // No recorded key, and nobody's new address.
    let lines = pair.a.log().text();
    let count = |what: &str| lines.lines().filter(|line| line.contains(what)).count();
    assert_eq!((count("new receive key"), count("new peer")), (keys, 0), "{lines}");
    Ok(())
}
