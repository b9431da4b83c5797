//! An engine killed with SIGKILL: private traffic is dropped, never sent in clear, and the tunnel returns under the same keys.

use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::capture::{Capture, Captured};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::leak;
use cipe_tests::net::{Frame, in_clear, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::PORT;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use rustix::process::Signal;
use socket2::{Domain, Protocol, Socket, Type};

#[test]
fn the_check_itself_sees_a_leak() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    let capture = net.capture_carrier(1000)?;
    let plan = Plan { timeout: Duration::from_millis(100), ..Plan::count(1) };
    ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
    capture.wait_for(SOON, in_clear).context("a ping without a tunnel takes the default route")?;
    assert!(!leak::clear(&capture.finish()?).is_empty());
    Ok(())
}

#[test]
fn traffic_is_dropped_while_the_engine_is_dead() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    const PINGS: usize = 50;
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let engine = pair.a.engine_pid().context("an engine runs")?;

    // A stopped daemon cannot start another engine, so the state without an engine lasts as long as the test needs.
    process::signal(pair.a.pid(), Signal::STOP)?;
    let capture = net.capture_carrier(10_000)?;
    process::signal(engine, Signal::KILL)?;
    process::wait_gone(engine, SOON)?;
    let plan = Plan { timeout: Duration::from_millis(500), window: PINGS, ..Plan::count(PINGS) };
    let outward = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
    let before = pair.b.status()?.count("sent");
    let inward = ping::run(net.lan(Side::B), Side::A.host(), &plan)?;
    pair.b.wait_for_status("its pings sent", |status| status.count("sent") >= before + PINGS as u64)?;
    process::signal(pair.a.pid(), Signal::CONT)?;
    assert_eq!((outward.sent, outward.received()), (PINGS, 0));
    assert_eq!((inward.sent, inward.received()), (PINGS, 0));

    let frames = capture.finish()?;
    assert!(leak::clear(&frames).is_empty(), "in clear: {:#?}", leak::clear(&frames));
    // Several datagrams of one size may cross the tap as one superframe.
    let octets: usize = frames.iter().map(|frame| frame.octets.len()).sum();
    assert!(octets >= PINGS * 100, "B's pings came to the carrier sealed: {octets} octets");
    Ok(())
}

#[test]
fn the_tunnel_comes_back_and_nothing_leaks_on_the_way() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let capture = net.capture_carrier(1_000_000)?;

    // Pings continue from before the kill until after the return, so that they cover every moment.
    let (stop, sent) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| -> Result<()> {
        let pinging = scope.spawn(|| {
            let plan = Plan {
                window: 1000,
                interval: Duration::from_millis(1),
                timeout: Duration::from_millis(500),
                ..Plan::count(1_000_000)
            };
            ping::run_while(net.lan(Side::A), Side::B.host(), &plan, || {
                sent.fetch_add(1, Ordering::Relaxed);
                !stop.load(Ordering::Relaxed)
            })
        });
        let result = (0..3).try_for_each(|round| kill_and_wait(&net, &pair).with_context(|| format!("kill {round}")));
        stop.store(true, Ordering::Relaxed);
        let report = pinging.join().expect("the pinging thread does not panic")?;
        result?;
        assert!(report.received() > 0 && report.damaged == 0, "{} of {}", report.received(), report.sent);
        Ok(())
    })?;
    let leaks = leak::clear(&capture.finish()?);
    assert!(
        leaks.is_empty(),
        "{} frames in clear of {} pings, the first: {}",
        leaks.len(),
        sent.into_inner(),
        leaks[0]
    );
    Ok(())
}

/// Kills A's engine and waits until another one carries pings.
fn kill_and_wait(net: &Topology, pair: &Pair) -> Result<()> {
    let engine = pair.a.engine_pid().context("an engine runs")?;
    process::signal(engine, Signal::KILL)?;
    process::wait_gone(engine, SOON)?;
    let deadline = Instant::now() + process::patient(SOON);
    let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(5) };
    while ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received() < 5 {
        if Instant::now() > deadline {
            let (a, b, gw) = (pair.a.status(), pair.b.status(), net.gw(Side::A));
            let routes = gw.ip(&["route", "show"])?;
            let log = pair.a.log().text();
            bail!("no pings {SOON:?} after the engine was killed\nA: {a:?}\nB: {b:?}\nroutes:\n{routes}log:\n{log}");
        }
    }
    let new = pair.a.engine_pid().context("another engine runs")?;
    if new == engine {
        bail!("the engine {engine} was not killed");
    }
    Ok(())
}

/// Datagrams of data that are recorded, and their port.
const DATAGRAMS: usize = 100;
const DATA_PORT: u16 = 5555;

/// Datagrams that wait at a socket.
fn drain(socket: &UdpSocket) -> Result<usize> {
    socket.set_read_timeout(Some(process::patient(Duration::from_millis(200))))?;
    let mut octets = [0; 2048];
    Ok(std::iter::from_fn(|| socket.recv(&mut octets).ok()).count())
}

/// Numbers of the lines that tell of new keys, and of engines that went on under the old ones.
fn told(pair: &Pair, side: Side) -> (usize, usize) {
    let text = pair.of(side).log().text();
    let count = |what: &str| text.lines().filter(|line| line.contains(what)).count();
    // Lines of one kind are rare after the first ones, so that one more key may not be told; but A's first keys are.
    (count("new send key") + count("new receive key"), count("goes on under the same keys"))
}

#[test]
fn the_next_engine_goes_on_under_the_same_keys_and_takes_nothing_twice() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for daemon in [Daemon::Blowfish, Daemon::Idea] {
        let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
        let pair = Pair::start(&net, daemon, |_, options| options)?;
        pair.wait_for_keys(&net)?;
        let capture = net.capture_carrier(10_000)?;
        let receiver = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), DATA_PORT)))?;
        let sender = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
        for number in 0..DATAGRAMS {
            sender.send_to(&pattern(number as u32, 100), (Side::A.host(), DATA_PORT))?;
        }
        assert_eq!(drain(&receiver)?, DATAGRAMS);
        let frames = capture.finish()?;
        // IP packets of the tunnel to A, under whatever key.
        let to_a = |frame: &Captured| {
            let ip = Frame::parse(&frame.octets)?.ipv4().filter(|ip| ip.destination == Side::A.carrier())?;
            ip.udp().is_some_and(|(_, port, _)| port == PORT).then(|| frame.octets[14..].to_vec())
        };
        let recorded: Vec<Vec<u8>> = frames.iter().filter_map(to_a).collect();
        assert!(recorded.len() >= DATAGRAMS, "{}", recorded.len());
        let before = [told(&pair, Side::A), told(&pair, Side::B)];
        let tap = net.tap().context("a tapped carrier has a router")?;
        let raw = tap.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;

        for round in 1..=2 {
            let capture = net.capture_carrier(10_000)?;
            kill_and_wait(&net, &pair)?;
            for packet in &recorded {
                raw.send_to(packet, &SocketAddr::from((Side::A.carrier(), 0)).into())?;
            }
            let refused = pair.a.wait_for_status("every recorded datagram refused", |status| {
                status.count("replayed") + status.count("reflected") >= recorded.len() as u64
            })?;
            assert_eq!(drain(&receiver)?, 0, "{round}: {refused:?}");
            let [a, b] = [told(&pair, Side::A), told(&pair, Side::B)];
            assert_eq!((a, b), ((before[0].0, round), before[1]), "{round}:\n{}", pair.a.log().text());
            // A key exchange would begin under the static key.
            let is_static = |frame: &&Captured| {
                let packet = Frame::parse(&frame.octets).and_then(|frame| frame.ipv4());
                packet.and_then(|ip| ip.udp()).is_some_and(|(_, _, datagram)| datagram[0] & 0x80 == 0)
            };
            assert_eq!(capture.finish()?.iter().filter(is_static).count(), 0, "{round}");
        }
        let plan = Plan { interval: Duration::from_millis(5), ..Plan::count(100) };
        for side in [Side::A, Side::B] {
            assert_eq!(ping::run(net.lan(side), side.other().host(), &plan)?.lost, [0; 0]);
        }
    }
    Ok(())
}

/// Pings until one is answered, for as long as `within`.
fn wait_for_ping(net: &Topology, within: Duration) -> Result<()> {
    let answered = ping::wait_for_answer(net.lan(Side::A), Side::B.host(), Duration::from_millis(10), within)?;
    anyhow::ensure!(answered, "no answer within {within:?}");
    Ok(())
}

/// Gateways with keys, whose private packets would leave in clear outside the tunnel, and a capture that sees it.
fn watched() -> Result<(Topology, Pair, Capture)> {
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let capture = net.capture_carrier(100_000)?;
    Ok((net, pair, capture))
}

#[test]
fn an_engine_that_hangs_is_killed_and_replaced() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (net, pair, capture) = watched()?;
    let engine = pair.a.engine_pid().context("an engine runs")?;
    process::signal(engine, Signal::STOP)?;
    pair.a.wait_for_line("on the engine that hangs", |line| line.contains("has not answered for 3 s"))?;
    process::wait_gone(engine, SOON)?;
    pair.a.wait_for_line("on the next engine", |line| line.contains("goes on under the same keys"))?;
    wait_for_ping(&net, SOON)?;
    assert!(pair.a.engine_pid().is_some_and(|next| next != engine));
    assert!(leak::clear(&capture.finish()?).is_empty());
    Ok(())
}

#[test]
fn programs_that_somebody_detaches_from_a_hub_are_attached_again() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (net, pair, capture) = watched()?;
    let engine = pair.a.engine_pid().context("an engine runs")?;
    let index = |device: &str| net.gw(Side::A).run(|| nix::net::if_::if_nametoindex(device));
    let mut ends = vec![("xdp", index("cipehub0x")?)];
    // Without tcx links there is a filter, which a link's descriptor does not hold.
    if pair.a.status()?.has_feature("tcx links") {
        ends.push(("tcx", index("cipehub0")?));
    }
    for (kind, ifindex) in ends {
        // A program that has just been attached works some time before the engine has the descriptor of its link.
        let deadline = Instant::now() + process::patient(SOON);
        while let Err(error) = process::detach_link(engine, kind, ifindex) {
            anyhow::ensure!(Instant::now() < deadline, error);
            wait_for_ping(&net, SOON)?;
        }
        let plan = Plan { timeout: Duration::from_millis(200), ..Plan::count(1) };
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0, "{kind}");
        wait_for_ping(&net, SOON).with_context(|| kind)?;
    }
    assert_eq!(pair.a.engine_pid(), Some(engine));
    assert!(leak::clear(&capture.finish()?).is_empty());
    Ok(())
}

#[test]
fn another_engine_takes_the_place_of_one_that_runs() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (net, pair, capture) = watched()?;
    let refused = pair.a.cipe(&["engine"]).output()?;
    assert!(!refused.status.success(), "two engines in one namespace");
    let before = [told(&pair, Side::A), told(&pair, Side::B)];
    for round in 1..=2 {
        let engine = pair.a.engine_pid().context("an engine runs")?;
        let replaced = pair.a.cipe(&["engine", "--replace"]).output()?;
        anyhow::ensure!(replaced.status.success(), "{}", String::from_utf8_lossy(&replaced.stderr));
        process::wait_gone(engine, SOON)?;
        pair.a.wait_for_lines(round, "on the next engine", |line| line.contains("goes on under the same keys"))?;
        wait_for_ping(&net, SOON)?;
        assert!(pair.a.engine_pid().is_some_and(|next| next != engine));
    }
    assert_eq!([told(&pair, Side::A), told(&pair, Side::B)], [(before[0].0, 2), before[1]]);
    assert!(leak::clear(&capture.finish()?).is_empty());
    let (last, left) = (pair.a.engine_pid().context("an engine runs")?, pair.a.run_directory().to_owned());
    assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    process::wait_gone(last, SOON)?;
    assert_eq!(std::fs::read_dir(left)?.count(), 0);
    Ok(())
}
