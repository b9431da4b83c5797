//! Somebody on the carrier records everything, and sends it again after a restart of gateway A: nothing of it is taken, and
//! nothing goes to him.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::capture::{Capture, Captured};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::{Frame, UDP, checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::peer::{self, Cipher};
use cipe_tests::ping::{self, Plan};
use cipe_tests::relayed::port_of;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;
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

/// A pair whose traffic to A is recorded: from its first packets on, which are under the static key, and data.
struct Recorded {
    pair: Pair,
    /// IP packets under the static key.
    exchanges: Vec<Vec<u8>>,
    /// IP packets under dynamic keys.
    data: Vec<Vec<u8>>,
    /// Gets the data in A's LAN.
    receiver: UdpSocket,
}

fn static_key() -> Result<[u8; 16]> {
    let mut key = [0; 16];
    hex::decode_to_slice(KEY, &mut key)?;
    Ok(key)
}

/// Removes the files that tell the next engine which packets under the static key are old.
fn lose_journals(gateway: &Gateway) -> Result<()> {
    for entry in std::fs::read_dir(gateway.run_directory().with_extension("state").join("engine"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "static") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Kills an engine, and waits for the next one.
fn kill_engine(gateway: &Gateway) -> Result<()> {
    let engine = gateway.engine_pid().context("an engine runs")?;
    process::signal(engine, Signal::KILL)?;
    process::wait_gone(engine, SOON)?;
    gateway.wait_for_line("of the next engine", |line| line.contains("the engine is back"))?;
    Ok(())
}

/// The IP packets of the tunnel that have come to A.
fn packets_to_a(capture: Capture) -> Result<Vec<Vec<u8>>> {
    let to_a = |frame: &Captured| {
        let ip = Frame::parse(&frame.octets)?.ipv4()?;
        let is_of_tunnel = ip.destination == Side::A.carrier() && ip.udp()?.1 == PORT;
        is_of_tunnel.then(|| frame.octets[14..].to_vec())
    };
    Ok(capture.finish()?.iter().filter_map(to_a).collect())
}

fn record(net: &Topology) -> Result<Recorded> {
    let capture = net.capture_carrier(10_000)?;
    let pair = Pair::start(net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(net)?;
    let receiver = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), DATA_PORT)))?;
    let sender = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
    for number in 0..DATAGRAMS {
        sender.send_to(&pattern(number as u32, 100), (Side::A.host(), DATA_PORT))?;
    }
    assert_eq!(drain(&receiver)?, DATAGRAMS);
    let recorded = packets_to_a(capture)?;
    let (exchanges, data): (Vec<_>, Vec<_>) = recorded.into_iter().partition(|packet| is_static(packet));
    assert!(!exchanges.is_empty() && data.len() >= DATAGRAMS, "{} and {}", exchanges.len(), data.len());
    Ok(Recorded { pair, exchanges, data, receiver })
}

/// Sends IP packets from the tap to A.
fn replay<'a>(tap: &Namespace, packets: impl IntoIterator<Item = &'a Vec<u8>>) -> Result<()> {
    let raw = tap.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
    let to = SocketAddr::from((Side::A.carrier(), 0)).into();
    for packet in packets {
        raw.send_to(packet, &to)?;
    }
    Ok(())
}

/// The same IP packet from another address; the kernel sets the checksum of the IP header.
fn from_elsewhere(packet: &[u8], source: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[12..16].copy_from_slice(&source.octets());
    packet[20..22].copy_from_slice(&port.to_be_bytes());
    packet[26..28].fill(0);
    packet
}

#[test]
fn nothing_recorded_is_taken_after_a_restart() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let Recorded { mut pair, exchanges, data, receiver } = record(&net)?;
    pair.a.restart(net.gw(Side::A))?;
    pair.wait_for_keys(&net)?;
    let keys = pair.a.log().text().lines().filter(|line| line.contains("new receive key")).count();
    replay(net.tap().context("a tapped carrier has a router")?, exchanges.iter().chain(&data))?;
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

/// What is recorded comes from another address. `opens`: A has lost what it knew of packets under the static key, so that address gets
/// questions. A's packets go to the peer.
fn diverts_nothing(opens: bool, restart: impl FnOnce(&mut Pair, &Topology) -> Result<()>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let Recorded { mut pair, exchanges, data, .. } = record(&net)?;
    let elsewhere = port_of(Side::A);
    net.gw(Side::A).ip(&["route", "add", &elsewhere.ip().to_string(), "dev", "wire0"])?;
    let tap = net.tap().context("a tapped carrier has a router")?;
    let attacker = tap.run(|| UdpSocket::bind(elsewhere))?;
    let std::net::IpAddr::V4(source) = elsewhere.ip() else { unreachable!("the tap has an IPv4 address") };
    lose_journals(&pair.a)?;
    restart(&mut pair, &net)?;
    pair.wait_for_keys(&net)?;
    let plan = Plan { interval: Duration::from_millis(2), window: 1000, ..Plan::count(1000) };
    std::thread::scope(|scope| -> Result<()> {
        let both = [Side::A, Side::B];
        let pings = both.map(|side| {
            let (plan, lan) = (plan.clone(), net.lan(side));
            scope.spawn(move || ping::run(lan, side.other().host(), &plan))
        });
        for packet in exchanges.iter().chain(&data) {
            replay(tap, [&from_elsewhere(packet, source, elsewhere.port())])?;
        }
        for pings in pings {
            let report = pings.join().expect("pings do not panic")?;
            assert_eq!((report.sent, report.lost), (1000, vec![]), "{}", pair.a.log().text());
        }
        Ok(())
    })?;
    let lines = pair.a.log().text();
    assert!(!lines.contains("new peer"), "{lines}");
    attacker.set_read_timeout(Some(Duration::from_millis(200)))?;
    let key = static_key()?;
    let mut questions = 0;
    let mut octets = [0; 2048];
    while let Ok(length) = attacker.recv(&mut octets) {
        let opened = peer::open(Cipher::Blowfish, &key, &octets[..length]);
        let message = opened.ok().filter(|opened| opened.control).context("data, or under a dynamic key")?;
        questions += usize::from(message.payload[0] == 0x72);
    }
    let expected = if opens { 1..=exchanges.len() } else { 0..=0 };
    assert!(expected.contains(&questions), "{questions} questions for {} packets", exchanges.len());
    Ok(())
}

#[test]
fn a_recorded_packet_from_elsewhere_diverts_nothing_after_a_restart_of_the_daemon() -> Result<()> {
    diverts_nothing(true, |pair, net| pair.a.restart(net.gw(Side::A)))
}

#[test]
fn a_recorded_packet_from_elsewhere_diverts_nothing_after_a_restart_of_the_engine() -> Result<()> {
    // The daemon has handed the engine's memory of packets to the next one.
    diverts_nothing(false, |pair, _| kill_engine(&pair.a))
}

/// A packet of data under the static key, as an original sends it during an exchange: a UDP datagram from LAN B to LAN A.
fn static_data(number: u16) -> Result<Vec<u8>> {
    let mut packet = vec![0; 128];
    (packet[0], packet[3], packet[8], packet[9]) = (0x45, 128, 64, UDP);
    packet[4..6].copy_from_slice(&number.to_be_bytes());
    packet[12..16].copy_from_slice(&Side::B.host().octets());
    packet[16..20].copy_from_slice(&Side::A.host().octets());
    let sum = checksum(&packet[..20]).to_be_bytes();
    packet[10..12].copy_from_slice(&sum);
    packet[20..22].copy_from_slice(&DATA_PORT.to_be_bytes());
    packet[22..24].copy_from_slice(&DATA_PORT.to_be_bytes());
    packet[25] = 108;
    Ok(peer::seal(Cipher::Blowfish, &static_key()?, false, false, &packet))
}

#[test]
fn recorded_data_under_the_static_key_is_refused_after_a_restart() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut a = Gateway::start(&net, Side::A, Daemon::Blowfish, &Options::of(Side::A).set("maxerr", -1))?;
    a.wait_up()?;
    let original = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?;
    let receiver = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), DATA_PORT)))?;
    let to = (Side::A.carrier(), PORT);
    let recorded: Vec<Vec<u8>> = (0..DATAGRAMS).map(|number| static_data(number as u16)).collect::<Result<_>>()?;
    for datagram in &recorded {
        original.send_to(datagram, to)?;
    }
    assert_eq!(drain(&receiver)?, DATAGRAMS);
    for round in 0..2 {
        if round == 0 {
            a.restart(net.gw(Side::A))?;
        } else {
            kill_engine(&a)?;
        }
        for datagram in &recorded {
            original.send_to(datagram, to)?;
        }
        assert_eq!(drain(&receiver)?, 0, "recorded datagrams reached the LAN, round {round}");
        a.wait_for_status("of the replays", |status| status.count("replayed") == DATAGRAMS as u64)?;
        original.send_to(&static_data(1000 + round)?, to)?;
        assert_eq!(drain(&receiver)?, 1, "a new one");
    }
    Ok(())
}

/// NK_IND under the static key, which says that it was written so many seconds ago.
fn announcement(key: u8, seconds_ago: u32) -> Result<Vec<u8>> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs() as u32;
    let message = peer::announcement(&[key; 16], now - seconds_ago);
    Ok(peer::seal(Cipher::Blowfish, &static_key()?, false, true, &message))
}

#[test]
fn a_peer_whose_clock_went_back_is_taken_when_a_running_daemon_is_asked_to_forget() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut a = Gateway::start(&net, Side::A, Daemon::Blowfish, &Options::of(Side::A).set("maxerr", -1))?;
    a.wait_up()?;
    let socket = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?;
    let announce =
        |key, ago| -> Result<()> { Ok(_ = socket.send_to(&announcement(key, ago)?, (Side::A.carrier(), PORT))?) };
    announce(1, 0)?;
    a.wait_for_line("of the first key", |line| line.contains("new receive key"))?;
    announce(2, 1000)?;
    a.wait_for_line("of the clock", |line| line.contains("s older than one that came before"))?;
    // The file of the first key is written behind the line about it.
    let deadline = Instant::now() + SOON;
    loop {
        let output = a.cipe(&["forget", "cipcb0"]).output()?;
        if output.status.success() {
            break;
        }
        ensure!(Instant::now() < deadline, "{}", String::from_utf8_lossy(&output.stderr));
    }
    // This one only makes the daemon look for its file.
    announce(3, 990)?;
    a.wait_for_line("that it is gone", |line| line.contains("the peer's clock may have any time"))?;
    announce(4, 980)?;
    a.wait_for_lines(2, "of new keys", |line| line.contains("new receive key"))
}
