//! Sealed tunnels (docs/SEALED.md) over what happens to gateways: restarts, an engine that is killed, and one end that is upgraded, or
//! put back, or that was an original all the time.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cipe_tests::capture::{Capture, Captured};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::net::{Frame, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::original::Original;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process;
use cipe_tests::stream::Stream;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use rustix::process::Signal;
use socket2::{Domain, Protocol, Socket, Type};

/// Datagrams of data that are recorded, and their port.
const DATAGRAMS: usize = 100;
const DATA_PORT: u16 = 5555;

/// IP packets of the tunnel that a gateway has sent.
fn packets_of(from: Side, frames: &[Captured]) -> Vec<Vec<u8>> {
    let of_it = |frame: &Captured| {
        let ip = Frame::parse(&frame.octets)?.ipv4().filter(|ip| ip.source == from.carrier())?;
        ip.udp().is_some_and(|(_, port, _)| port == PORT).then(|| frame.octets[14..].to_vec())
    };
    frames.iter().filter_map(of_it).collect()
}

/// The datagram in an IP packet without options.
fn datagram(packet: &[u8]) -> &[u8] {
    packet.get(28..).unwrap_or_default()
}

fn is_sealed(packet: &[u8]) -> bool {
    datagram(packet).starts_with(&[0x80, 0, 0, 0])
}

/// Whether it is a message of a handshake: epoch 0.
fn is_handshake(packet: &[u8]) -> bool {
    is_sealed(packet) && datagram(packet).get(4).is_some_and(|word| word >> 6 == 0)
}

/// Number of datagrams that wait at a socket.
fn drain(socket: &UdpSocket) -> Result<usize> {
    socket.set_read_timeout(Some(process::patient(Duration::from_millis(200))))?;
    let mut octets = [0; 2048];
    Ok(std::iter::from_fn(|| socket.recv(&mut octets).ok()).count())
}

/// Sends IP packets from the tap to A.
fn replay(net: &Topology, packets: &[Vec<u8>]) -> Result<()> {
    let tap = net.tap().context("a tapped carrier has a router")?;
    let raw = tap.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
    for packet in packets {
        raw.send_to(packet, &SocketAddr::from((Side::A.carrier(), 0)).into())?;
    }
    Ok(())
}

/// A sealed pair whose traffic to A is recorded from the first packet on, and the socket in A's LAN that got the data.
fn record(net: &Topology) -> Result<(Pair, Vec<Vec<u8>>, UdpSocket)> {
    let capture = net.capture_carrier(10_000)?;
    let pair = Pair::start(net, Daemon::Blowfish, |_, options| options.sealed())?;
    pair.wait_for_keys(net)?;
    let receiver = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), DATA_PORT)))?;
    let sender = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
    for number in 0..DATAGRAMS {
        sender.send_to(&pattern(number as u32, 100), (Side::A.host(), DATA_PORT))?;
    }
    ensure!(drain(&receiver)? == DATAGRAMS, "{:?}", pair.a.status()?);
    let recorded = packets_of(Side::B, &capture.finish()?);
    ensure!(recorded.len() > DATAGRAMS, "{}", recorded.len());
    assert!(recorded.iter().all(|packet| is_sealed(packet)));
    Ok((pair, recorded, receiver))
}

fn pings_pass(net: &Topology) -> Result<()> {
    let plan = Plan { interval: Duration::from_millis(2), ..Plan::count(50) };
    for side in [Side::A, Side::B] {
        assert_eq!(ping::run(net.lan(side), side.other().host(), &plan)?.lost, [0; 0], "from {side:?}");
    }
    Ok(())
}

fn nothing_passes(net: &Topology) -> Result<()> {
    let plan = Plan { timeout: Duration::from_millis(500), window: 20, ..Plan::count(20) };
    for side in [Side::A, Side::B] {
        assert_eq!(ping::run(net.lan(side), side.other().host(), &plan)?.received(), 0, "from {side:?}");
    }
    Ok(())
}

fn wait_for_pings(net: &Topology, within: Duration) -> Result<()> {
    for side in [Side::A, Side::B] {
        let interval = Duration::from_millis(50);
        ensure!(ping::wait_for_answer(net.lan(side), side.other().host(), interval, within)?, "from {side:?}");
    }
    Ok(())
}

#[test]
fn the_next_engine_goes_on_under_the_same_sealed_keys_and_takes_nothing_twice() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let (pair, recorded, receiver) = record(&net)?;
    let sent = pair.a.status()?.send_counter();
    for round in 1..=2 {
        let capture = net.capture_carrier(10_000)?;
        let engine = pair.a.engine_pid().context("an engine runs")?;
        process::signal(engine, Signal::KILL)?;
        process::wait_gone(engine, SOON)?;
        pair.a.wait_for_lines(round, "on the next engine", |line| line.contains("goes on under the same keys"))?;
        wait_for_pings(&net, SOON)?;
        let before = pair.a.status()?;
        replay(&net, &recorded)?;
        pair.a.wait_for_status("every recorded datagram refused", |status| {
            let refused = ["replayed", "too-old", "bad-tag", "no-receive-key", "control-received"];
            let count =
                |status: &cipe_tests::status::Status| refused.map(|verdict| status.count(verdict)).iter().sum::<u64>();
            count(status) >= count(&before) + recorded.len() as u64
        })?;
        assert_eq!(drain(&receiver)?, 0, "{round}: {:?}", pair.a.status()?);
        let frames = capture.finish()?;
        let handshakes =
            packets_of(Side::A, &frames).into_iter().filter(|packet| datagram(packet)[4..8] == [0, 0, 0, 1]);
        assert_eq!(handshakes.count(), 0, "{round}: it has its keys\n{}", pair.a.log().text());
        assert!(pair.a.status()?.send_counter() > sent, "no counter is used twice");
    }
    pings_pass(&net)
}

/// `restart` ends what has taken the recorded datagrams.
fn nothing_recorded_is_taken(restart: impl FnOnce(&mut Pair, &Topology) -> Result<()>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let (mut pair, recorded, receiver) = record(&net)?;
    restart(&mut pair, &net)?;
    pair.wait_for_keys(&net)?;
    pings_pass(&net)?;
    let before = pair.a.status()?;
    replay(&net, &recorded)?;
    pings_pass(&net)?;
    assert_eq!(drain(&receiver)?, 0, "recorded datagrams reached the LAN");
    let after = pair.a.status()?;
    // Replayed first messages make no session.
    let age = |status: &cipe_tests::status::Status| status.sealed.as_ref().and_then(|sealed| sealed.send_seconds);
    assert!(age(&after) >= age(&before) && after.send_counter() >= before.send_counter(), "{before:?}\n{after:?}");
    assert!(!pair.a.log().text().contains("new peer"), "{}", pair.a.log().text());
    Ok(())
}

#[test]
fn nothing_sealed_that_was_recorded_is_taken_after_a_restart() -> Result<()> {
    nothing_recorded_is_taken(|pair, net| pair.a.restart(net.gw(Side::A)))
}

#[test]
fn nothing_sealed_that_was_recorded_is_taken_after_a_restart_of_its_sender() -> Result<()> {
    nothing_recorded_is_taken(|pair, net| pair.b.restart(net.gw(Side::B)))
}

/// Killed, so that no CT_KILL tells the peer, and without what was on disk.
#[test]
fn nothing_sealed_that_was_recorded_is_taken_after_the_state_was_lost() -> Result<()> {
    nothing_recorded_is_taken(|pair, net| {
        std::fs::remove_dir_all(pair.a.run_directory().with_extension("state"))?;
        pair.a.restart_after(Signal::KILL, net.gw(Side::A))
    })
}

#[test]
fn both_ends_may_restart_at_once() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut pair = Pair::start(&net, Daemon::Idea, |_, options| options.sealed())?;
    for how in [Signal::TERM, Signal::KILL] {
        pair.wait_for_keys(&net)?;
        std::thread::scope(|scope| {
            let Pair { a, b } = &mut pair;
            let other = scope.spawn(|| b.restart_after(how, net.gw(Side::B)));
            let own = a.restart_after(how, net.gw(Side::A));
            other.join().expect("a restart does not panic").and(own)
        })?;
    }
    pair.wait_for_keys(&net)?;
    pings_pass(&net)
}

#[test]
fn with_another_key_nothing_passes_sealed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => options.sealed(),
        Side::B => options.set("key", "000102030405060708090a0b0c0d0e0e").sealed(),
    })?;
    nothing_passes(&net)?;
    for gateway in [&pair.a, &pair.b] {
        let status = gateway.wait_for_status("refused handshakes", |status| status.count("bad-tag") > 0)?;
        assert_eq!((status.count("delivered"), status.is_sealed()), (0, false), "{status:?}");
        assert_eq!(status.count("sent"), 0, "{status:?}");
    }
    Ok(())
}

/// The value of `sealed` at A changes from `no` to `auto` by a restart, while a stream runs.
#[test]
fn a_tunnel_becomes_sealed_when_its_second_end_is_allowed_to() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => options.set("sealed", "no"),
        Side::B => options.set("sealed", "auto"),
    })?;
    pair.wait_for_keys(&net)?;
    assert!(!pair.b.status()?.is_sealed());
    let stream = Stream::start(net.lan(Side::A), (net.lan(Side::B), Side::B.host()))?;
    stream.wait_for_more()?;
    pair.a.reconfigure(|options| options.set("sealed", "auto"))?;
    pair.a.restart(net.gw(Side::A))?;
    stream.wait_for_more()?;
    pair.wait_for_keys(&net)?;
    stream.wait_for_more()?;
    assert!(stream.finish()? > 0);
    // PREVIOUS_LIFE after the first sealed packet.
    for gateway in [&pair.a, &pair.b] {
        gateway.wait_for_status("protocol 3 refused", |status| {
            status.sealed.as_ref().is_some_and(|sealed| !sealed.sends_unsealed && !sealed.accepts_unsealed)
        })?;
    }
    pings_pass(&net)
}

/// The name of the tunnel in the command that a line of the log gives.
fn to_forget(line: &str) -> Option<&str> {
    let rest = line.split_once("cipe forget ")?.1;
    rest.split(|mark: char| mark == '`' || mark.is_whitespace()).next()
}

/// Captures what leaves B, beginning now.
fn capture(net: &Topology) -> Result<Capture> {
    net.capture_carrier(100_000)
}

#[test]
fn an_end_that_was_sealed_is_not_led_back_to_protocol_3_until_its_operator_says_so() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let mut pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("sealed", "auto"))?;
    pair.wait_for_keys(&net)?;
    pings_pass(&net)?;
    pair.a.reconfigure(|options| options.set("sealed", "no"))?;
    pair.a.restart(net.gw(Side::A))?;
    let capture = capture(&net)?;
    nothing_passes(&net)?;
    let is_told = |line: &str| line.contains("the peer was sealed") && line.contains("cipe forget ");
    let line = pair.b.wait_for_line("of the fallback", is_told)?.text;
    let status = pair.b.wait_for_status("packets refused", |status| status.count("unsealed") > 0)?;
    let sealed = status.sealed.as_ref().context("it would be sealed")?;
    assert!(!sealed.sends_unsealed && !sealed.accepts_unsealed, "{status:?}");
    assert_eq!(status.count("delivered"), pair.b.status()?.count("delivered"));

    // Not after a restart of B either.
    pair.b.restart(net.gw(Side::B))?;
    nothing_passes(&net)?;
    let left = packets_of(Side::B, &capture.finish()?);
    // CT_KILL leaves as long as there is a session.
    let unsealed: Vec<_> = left.iter().filter(|packet| !is_sealed(packet)).collect();
    assert!(unsealed.is_empty() && !left.is_empty(), "{} of {} unsealed", unsealed.len(), left.len());

    let name = to_forget(&line).with_context(|| format!("no name in {line}"))?;
    let forgotten = pair.b.cipe(&["forget", name]).output()?;
    ensure!(forgotten.status.success(), "{}", String::from_utf8_lossy(&forgotten.stderr));
    wait_for_pings(&net, SOON).with_context(|| pair.b.log().text())?;
    pair.wait_for_keys(&net)
}

/// A tunnel to an original is what it was, with `auto`; with `require` it carries nothing.
#[test]
fn an_original_is_served_as_before_or_not_at_all() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut link = Original::start(Daemon::Blowfish, |options| options.set("sealed", "auto"), |_| {})?;
    link.wait_for_pings()?;
    pings_pass(&link.net)?;
    let status = link.ours.status()?;
    assert!(!status.is_sealed() && status.has_key("send"), "{status:?}");

    let capture = link.net.capture_carrier(100_000)?;
    link.restart_ours(Options::sealed)?;
    let before = link.theirs.counters();
    nothing_passes(&link.net)?;
    let status = link.ours.wait_for_status("packets refused", |status| status.count("unsealed") > 0)?;
    assert_eq!((status.count("delivered"), status.count("sent")), (0, 0), "{status:?}");
    let after = link.theirs.counters();
    assert_eq!((after.delivered_dynamic, after.delivered_static), (before.delivered_dynamic, before.delivered_static));
    let left = packets_of(Side::A, &capture.finish()?);
    // Of the daemon before.
    let last = left.iter().rposition(|packet| !is_sealed(packet)).map_or(0, |last| last + 1);
    let of_this = &left[last..];
    assert!(!of_this.is_empty() && of_this.iter().all(|packet| is_handshake(packet)), "{}", of_this.len());
    Ok(())
}

/// Two daemons of one engine, one of which is sealed.
#[test]
fn an_engine_keeps_sealed_tunnels_and_others_apart() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let sealed = Pair::start(&net, Daemon::Blowfish, |_, options| options.sealed())?;
    let second = |side: Side| {
        let of = |side: Side| if side == Side::A { "10.202.0.1" } else { "10.202.0.2" };
        let at = |side: Side| format!("{}:{}", side.carrier(), PORT + 1);
        let options = Options::of(side).set("ipaddr", of(side)).set("ptpaddr", of(side.other()));
        let options = options.set("me", at(side)).set("peer", at(side.other()));
        Gateway::start_in(&net, (net.gw(side), &side.letter().to_string()), &[], Daemon::Idea, &options)
    };
    let mut plain = Pair { a: second(Side::A)?, b: second(Side::B)? };
    plain.a.wait_up()?;
    plain.b.wait_up()?;
    sealed.wait_for_keys(&net)?;
    let to = std::net::Ipv4Addr::new(10, 202, 0, 2);
    ensure!(ping::wait_for_answer(net.gw(Side::A), to, Duration::from_millis(50), SOON)?, "{}", plain.a.log().text());
    let both = [sealed.a.status()?, plain.a.wait_for_status("keys", |status| status.has_key("send"))?];
    assert!(both[0].is_sealed() && !both[0].has_key("send"), "{both:?}");
    assert!(!both[1].is_sealed() && both[1].sealed.is_none(), "{both:?}");
    pings_pass(&net)
}
