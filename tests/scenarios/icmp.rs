//! Forged ICMP errors, from a host that sees no datagram of the tunnel: none ends a daemon, opens a tunnel, or makes it slower. Those that
//! routers send are believed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::forged::{
    ATTACKER, Attacker, FRAGMENTATION_NEEDED, PORT_UNREACHABLE, TO_ANYBODY, TO_THE_PEER, WITH_ANOTHER_IV, unreachable,
};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::net::in_clear;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// The device MTU that the protocol sets (section 2).
const MTU: usize = 1442;
/// A smaller path MTU of the carrier.
const PATH: u16 = 1400;

/// Pings through the tunnel while the attacker sends each error `times` times; returns how many pings were lost.
fn ping_under_attack(net: &Topology, errors: &[Vec<u8>], times: usize, plan: &Plan) -> Result<usize> {
    let attacker = Attacker::new(net)?;
    std::thread::scope(|scope| {
        let pinging = scope.spawn(|| ping::run(net.lan(Side::A), Side::B.host(), plan));
        for error in std::iter::repeat_n(errors, times).flatten() {
            attacker.send(error)?;
        }
        Ok(pinging.join().expect("pinging does not panic")?.lost.len())
    })
}

#[test]
fn forged_unreachables_end_no_daemon_and_open_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    // Where packets for LAN B go when the tunnel's device is gone.
    net.gw(Side::A).ip(&["route", "add", "default", "via", &Side::B.carrier().to_string()])?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("maxerr", "0"))?;
    pair.wait_for_keys(&net)?;
    let capture = net.capture_carrier(10_000)?;
    let before = pair.a.status()?.count("control-received");
    let errors = [TO_ANYBODY, TO_THE_PEER, WITH_ANOTHER_IV].map(|quoted| unreachable(PORT_UNREACHABLE, 0, quoted));
    let lost = ping_under_attack(&net, &errors, 40, &Plan::count(200))?;
    assert_eq!(lost, 0);
    // An error that proves nothing makes the daemon ask the peer, which answers.
    pair.a.wait_for_line("a question before giving up", |line| line.contains("asking it before giving up"))?;
    pair.a.wait_for_status("an answer of the peer", |status| status.count("control-received") > before)?;
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(20))?.received(), 20);
    let clear = capture.finish()?.iter().filter(|frame| in_clear(&frame.octets)).count();
    assert_eq!(clear, 0, "frames in clear on the carrier");
    for status in pair.stop()? {
        assert!(status.success());
    }
    Ok(())
}

#[test]
fn a_peer_that_is_gone_is_given_up() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("maxerr", "3"))?;
    pair.wait_for_keys(&net)?;
    let Pair { a, b, .. } = pair;
    // An end that was killed keeps its port, and its host is silent.
    b.stop()?;
    let plan = Plan { timeout: Duration::from_millis(20), window: 64, ..Plan::count(1) };
    let deadline = Instant::now() + patient(SOON) + Duration::from_secs(10);
    while !a.log().text().contains("no answer from the peer") {
        ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        ensure!(Instant::now() < deadline, "{}", a.log().text());
    }
    Ok(())
}

#[test]
fn forged_path_mtus_cost_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let errors =
        [TO_ANYBODY, TO_THE_PEER, WITH_ANOTHER_IV].map(|quoted| unreachable(FRAGMENTATION_NEEDED, 576, quoted));
    // Long enough for a probe without an answer to be believed.
    let plan = Plan { interval: Duration::from_millis(20), ..Plan::sizes(vec![MTU; 200]) };
    let lost = ping_under_attack(&net, &errors, 40, &plan)?;
    let status = pair.a.status()?;
    assert_eq!((lost, status.count("too-big")), (0, 0), "{}", pair.a.log().text());
    Ok(())
}

/// A router that quotes no more than RFC 792 asks for proves nothing; the peer does, which gets no datagram of the old size.
#[test]
fn a_short_quote_is_believed_where_large_datagrams_do_not_arrive() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let tap = net.tap().context("a tapped carrier has a router")?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    // The hop takes less, and the router's own errors, which quote enough, go nowhere.
    for words in [
        "add table ip quiet",
        "add chain ip quiet out { type filter hook output priority 0 ; }",
        &format!("add rule ip quiet out ip saddr != {ATTACKER} icmp type destination-unreachable drop"),
    ] {
        let Ok(output) = tap.command("nft").args(words.split_whitespace()).output() else {
            eprintln!("skipped: there is no `nft` here");
            return Ok(());
        };
        ensure!(output.status.success(), "nft {words}: {}", String::from_utf8_lossy(&output.stderr));
    }
    for (namespace, device) in [(tap, "portB"), (net.gw(Side::B), "wire0")] {
        namespace.ip(&["link", "set", device, "mtu", &PATH.to_string()])?;
    }
    let large = Plan { timeout: Duration::from_millis(200), ..Plan::sizes(vec![MTU]) };
    let attacker = Attacker::new(&net)?;
    let deadline = Instant::now() + patient(SOON);
    while pair.a.status()?.count("too-big") == 0 {
        attacker.send(&unreachable(FRAGMENTATION_NEEDED, PATH, TO_THE_PEER))?;
        ping::run(net.lan(Side::A), Side::B.host(), &large)?;
        ensure!(Instant::now() < deadline, "{}", pair.a.log().text());
    }
    Ok(())
}
