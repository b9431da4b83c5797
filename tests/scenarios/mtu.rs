//! Packets that are too large for the carrier path: which senders get ICMP messages, which packets are fragmented, and that
//! streams continue.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::net::{ETHERTYPE_IPV4, Frame};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use rustix::net::sockopt::Ipv4PathMtuDiscovery;
use socket2::SockRef;

/// The device MTU that the protocol sets (section 2).
const MTU: usize = 1442;
/// A smaller path MTU of the carrier, and the MTU that it leaves to the tunnel (section 4).
const PATH: usize = 1400;
const LEFT: usize = PATH - 48;
/// The same for sealed packets.
const LEFT_SEALED: usize = PATH - 53;

/// What `sealed` leaves of [`PATH`].
fn left(sealed: &str) -> usize {
    if sealed == "no" { LEFT } else { LEFT_SEALED }
}

/// Limits the carrier's last hop before B to [`PATH`] octets: B's device has this MTU, A learns it from the router.
fn shrink_hop(net: &Topology) -> Result<()> {
    let tap = net.tap().context("a tapped carrier has a router")?;
    for (namespace, device) in [(tap, "portB"), (net.gw(Side::B), "wire0")] {
        namespace.ip(&["link", "set", device, "mtu", &PATH.to_string()])?;
    }
    Ok(())
}

/// The path MTU that a LAN's host has learned towards the other LAN's host.
fn learned(net: &Topology, side: Side) -> Result<String> {
    net.lan(side).ip(&["route", "get", &side.other().host().to_string()])
}

fn a_sender_is_told_what_a_smaller_hop_leaves(sealed: &str) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("sealed", sealed))?;
    pair.wait_for_keys(&net)?;
    let large = Plan { timeout: Duration::from_millis(200), ..Plan::sizes(vec![MTU]) };
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes(vec![MTU]))?.received(), 1);
    shrink_hop(&net)?;

    let deadline = Instant::now() + patient(SOON);
    while ping::run(net.lan(Side::A), Side::B.host(), &large)?.received() == 0 {
        if Instant::now() > deadline {
            bail!("{}{}\n{}", learned(&net, Side::A)?, learned(&net, Side::B)?, pair.a.log().text());
        }
    }
    // B sends answers, which have no DF.
    let learned = learned(&net, Side::A)?;
    assert!(learned.contains(&format!("mtu {}", left(sealed))), "{learned}");
    assert!(pair.a.status()?.count("too-big") > 0);
    // Neither is a network error that counts against `maxerr`.
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((28..=MTU).step_by(13).collect()))?;
    assert_eq!(report.lost, [0; 0]);
    Ok(())
}

#[test]
fn a_sender_is_told_what_a_smaller_hop_of_the_carrier_leaves() -> Result<()> {
    a_sender_is_told_what_a_smaller_hop_leaves("no")
}

#[test]
fn a_sender_is_told_what_a_smaller_hop_leaves_to_a_sealed_tunnel() -> Result<()> {
    a_sender_is_told_what_a_smaller_hop_leaves("require")
}

/// Makes the kernel of gateway A learn the smaller hop by another socket: no router informs the tunnel then.
fn let_the_kernel_learn(net: &Topology) -> Result<()> {
    let gateway = net.gw(Side::A);
    let other = gateway.run(|| UdpSocket::bind((Side::A.carrier(), 0)))?;
    rustix::net::sockopt::set_ip_mtu_discover(&other, Ipv4PathMtuDiscovery::DO)?;
    other.connect((Side::B.carrier(), 9))?;
    let deadline = Instant::now() + patient(SOON);
    let knows = || gateway.ip(&["route", "get", &Side::B.carrier().to_string()]);
    while !knows()?.contains(&format!("mtu {PATH}")) {
        // The kernel refuses it once it knows.
        let _ = other.send(&[0; MTU]);
        ensure!(Instant::now() < deadline, "{}", knows()?);
    }
    Ok(())
}

fn a_stream_goes_on(offload: Offload, known_before: bool, sealed: &str) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, offload)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("sealed", sealed))?;
    pair.wait_for_keys(&net)?;
    let listener = net.lan(Side::B).run(|| TcpListener::bind((Side::B.host(), 0)))?;
    let mut here = net.lan(Side::A).run(|| TcpStream::connect(listener.local_addr()?))?;
    let (mut there, _) = listener.accept()?;
    for stream in [&here, &there] {
        stream.set_read_timeout(Some(patient(SOON)))?;
        stream.set_write_timeout(Some(patient(SOON)))?;
    }
    let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let mut both_ways = |hop: &str| -> Result<()> {
        for _ in [Side::A, Side::B] {
            let mut received = vec![0; octets.len()];
            std::thread::scope(|scope| -> Result<()> {
                let writing = scope.spawn(|| here.write_all(&octets));
                there.read_exact(&mut received).context(hop.to_owned())?;
                writing.join().expect("writing does not panic")?;
                Ok(())
            })?;
            assert!(received == octets);
            std::mem::swap(&mut here, &mut there);
        }
        Ok(())
    };
    both_ways("the hop that the stream was made for")?;
    shrink_hop(&net)?;
    if known_before {
        let_the_kernel_learn(&net)?;
    }
    // Packets that do not fit are fragmented until the senders know the MTU, which may take longer than one turn.
    let told = |side| -> Result<bool> { Ok(learned(&net, side)?.contains(&format!("mtu {}", left(sealed)))) };
    for _ in 0..100 {
        both_ways("the smaller hop")?;
        if told(Side::A)? && told(Side::B)? {
            break;
        }
    }
    for side in [Side::A, Side::B] {
        let learned = learned(&net, side)?;
        assert!(learned.contains(&format!("mtu {}", left(sealed))), "lan{}: {learned}", side.letter());
        assert!(pair.of(side).status()?.count("too-big") > 0);
    }
    Ok(())
}

#[test]
fn a_stream_of_superframes_goes_on_over_a_smaller_hop() -> Result<()> {
    a_stream_goes_on(Offload::On, false, "no")
}

#[test]
fn a_sealed_stream_of_superframes_goes_on_over_a_smaller_hop() -> Result<()> {
    a_stream_goes_on(Offload::On, false, "require")
}

#[test]
fn a_stream_of_single_frames_goes_on_over_a_smaller_hop() -> Result<()> {
    a_stream_goes_on(Offload::Raw, false, "no")
}

#[test]
fn a_smaller_hop_that_only_the_kernel_knows_is_found_by_what_it_refuses() -> Result<()> {
    a_stream_goes_on(Offload::On, true, "no")
}

#[test]
fn packets_without_df_are_cut_before_they_are_sealed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let tap = net.tap().context("a tapped carrier has a router")?;
    for (namespace, device) in [(tap, "portA"), (tap, "portB"), (net.gw(Side::A), "wire0"), (net.gw(Side::B), "wire0")]
    {
        namespace.ip(&["link", "set", device, "mtu", &PATH.to_string()])?;
    }
    for side in [Side::A, Side::B] {
        net.lan(side).sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
    }
    let capture = net.capture_carrier(10_000)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;

    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((LEFT - 20..=MTU).collect()))?;
    assert_eq!((report.lost.as_slice(), report.damaged), (&[][..], 0));
    for side in [Side::A, Side::B] {
        assert_eq!(pair.of(side).status()?.count("too-big"), 0);
        assert!(!learned(&net, side)?.contains("mtu"), "{}", learned(&net, side)?);
    }
    for captured in capture.finish()? {
        let frame = Frame::parse(&captured.octets).context("a frame has a header")?;
        let fragment = u16::from_be_bytes([frame.payload[6], frame.payload[7]]) & 0x3FFF;
        assert!(frame.kind != ETHERTYPE_IPV4 || fragment == 0, "the carrier saw a fragment");
    }
    Ok(())
}

#[test]
fn the_mss_follows_the_carrier_path() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        net.gw(side).ip(&["link", "set", "wire0", "mtu", &PATH.to_string()])?;
    }
    for sealed in ["no", "require"] {
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("sealed", sealed))?;
        pair.wait_for_keys(&net)?;
        let listener = net.lan(Side::B).run(|| TcpListener::bind((Side::B.host(), 0)))?;
        let stream = net.lan(Side::A).run(|| TcpStream::connect(listener.local_addr()?))?;
        // Less IPv4 and TCP headers, and the time stamps, which the kernel subtracts by itself.
        assert_eq!(SockRef::from(&stream).tcp_mss()?, (left(sealed) - 40 - 12) as u32, "sealed {sealed}");
        assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    }
    Ok(())
}

#[test]
fn without_the_clamp_the_mss_is_that_of_the_hosts() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("mssclamp", "no"))?;
    pair.wait_for_keys(&net)?;
    let listener = net.lan(Side::B).run(|| TcpListener::bind((Side::B.host(), 0)))?;
    let stream = net.lan(Side::A).run(|| TcpStream::connect(listener.local_addr()?))?;
    assert_eq!(SockRef::from(&stream).tcp_mss()?, 1500 - 40 - 12);
    Ok(())
}

#[test]
fn a_path_too_small_for_a_link_is_said_and_carries_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    net.gw(Side::A).ip(&["link", "set", "wire0", "mtu", "115"])?;
    pair.a.wait_for_line("MTU too small", |line| line.contains("MTU too small"))?;
    let plan = Plan { timeout: Duration::from_millis(100), ..Plan::count(3) };
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0);
    pair.a.wait_for_status("each ping counted", |status| status.count("too-big") >= 3)?;
    // Another MTU of the interface leaves as little, which is said again.
    net.gw(Side::A).ip(&["link", "set", "cipcb0", "mtu", "1000"])?;
    pair.a.wait_for_line("the MTU of the interface", |line| line.contains("the interface's MTU is 1000 now"))?;
    pair.a.wait_for_lines(2, "MTU too small", |line| line.contains("MTU too small"))?;
    Ok(())
}

#[test]
fn forcemtu_ignores_the_carrier_path() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        net.gw(side).ip(&["link", "set", "wire0", "mtu", &PATH.to_string()])?;
    }
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.flag("forcemtu"))?;
    pair.wait_for_keys(&net)?;
    let sizes: Vec<usize> = (LEFT - 20..=MTU).collect();
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan { window: 16, ..Plan::sizes(sizes) })?;
    assert_eq!(report.lost, [0; 0], "{}", pair.a.log().text());
    for side in [Side::A, Side::B] {
        assert!(!learned(&net, side)?.contains("mtu"));
    }
    Ok(())
}

#[test]
fn an_mtu_that_an_operator_sets_is_followed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("mtu", 1300))?;
    pair.wait_for_keys(&net)?;
    let too_large = Plan { timeout: Duration::from_millis(300), ..Plan::sizes(vec![1301]) };
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &too_large)?.received(), 0);
    for mtu in [MTU, 1000] {
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["link", "set", "cipcb0", "mtu", &mtu.to_string()])?;
            let line = format!("the interface's MTU is {mtu} now");
            pair.of(side).wait_for_line("of the MTU", |text| text.contains(&line))?;
        }
        // The host has learned the tunnel's MTU of before.
        net.lan(Side::A).ip(&["route", "flush", "cache"])?;
        let plan = Plan::sizes(vec![mtu]);
        let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        assert_eq!(report.received(), 1, "{mtu}: {:?}\n{}", pair.a.status()?, pair.a.log().text());
        let above = Plan { timeout: Duration::from_millis(300), ..Plan::sizes(vec![mtu + 1]) };
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &above)?.received(), 0, "{mtu}");
    }
    Ok(())
}

#[test]
fn a_tunnel_with_a_large_mtu_needs_an_engine_started_for_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    const LARGE: usize = 3400;
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for side in [Side::A, Side::B] {
        for (namespace, device) in [(net.gw(side), "wire0"), (net.gw(side), "lan0"), (net.lan(side), "eth0")] {
            namespace.ip(&["link", "set", device, "mtu", "3500"])?;
        }
    }
    for carrier in ["udp", "xdp"] {
        let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("mtu", LARGE).set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        let sizes: Vec<usize> = (28..LARGE).step_by(61).chain([LARGE]).collect();
        let sent = sizes.len();
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes(sizes))?.received(), sent, "{carrier}");
        assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    }
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let options = Options::of(Side::A)
        .set("mtu", LARGE)
        .set("ipaddr", "10.202.0.1")
        .set("ptpaddr", "10.202.0.2")
        .set("me", format!("{}:{}", Side::A.carrier(), PORT + 1))
        .set("peer", format!("{}:{}", Side::B.carrier(), PORT + 1));
    let mut second =
        Gateway::start_in(&net, (net.gw(Side::A), &Side::A.letter().to_string()), &[], Daemon::Idea, &options)?;
    let refusal = format!("{:#}", second.wait_up().unwrap_err());
    assert!(refusal.contains("mtu 3400") && refusal.contains("CIPE_LARGEST_MTU"), "{refusal}");
    assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    let who = (net.gw(Side::A), &*Side::A.letter().to_string());
    let first = Options::of(Side::A);
    let environment = [("CIPE_LARGEST_MTU", "3400")];
    let mut first = Gateway::start_with(&net, who, &[], Daemon::Idea, &first, &environment)?;
    first.wait_up()?;
    Gateway::start_in(&net, who, &[], Daemon::Idea, &options)?.wait_up()?;
    Ok(())
}

/// An option file from a line with larger packets.
#[test]
fn an_mtu_above_the_carrier_s_is_taken_with_a_warning() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("mtu", 1600))?;
    pair.wait_for_keys(&net)?;
    let line = pair.a.wait_for_line("of the MTU", |line| line.contains("mtu 1600 is above"))?;
    assert!(line.text.contains("the carrier's MTU of 1500 leaves, 14"), "{}", line.text);
    Ok(())
}
