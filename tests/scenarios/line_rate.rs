//! A TCP stream fills a line of a fixed rate and 50 ms round trip, also while keys change: each 32,767 packets to and from an
//! original, each second between two of ours.
//!
//! The line is the bed's relay: it needs no netem, which some kernels lack, and keeps its rate on a busy machine. Other tests
//! use a line of netem, by each door, where the kernel has it.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::impair::{Impairment, Rate, Relay};
use cipe_tests::netem;
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::original::Original;
use cipe_tests::process::patient;
use cipe_tests::relayed::{Relayed, carrier_of, port_of};
use cipe_tests::stream::Stream;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Rate in octets a second: 64 Mbit/s of IP packets, far below the limit of either end; less on an emulated machine.
fn rate() -> u32 {
    8_000_000 / patient(Duration::from_secs(1)).as_secs() as u32
}

/// A line of that rate, 25 ms each way, with a queue as large as its bandwidth-delay product.
fn line() -> Impairment {
    let (delay, queue) = (Duration::from_millis(25), Duration::from_millis(50));
    Impairment { delay, rate: Some(Rate { octets: rate(), queue }), ..Impairment::default() }
}

/// Least share of the stream's octets in the line. Headers take 7 %, the key exchange very little; if a key change stopped the
/// stream for a round trip and TCP restarted, less than half would be left.
const SHARE: f64 = 0.7;

/// Streams from a side's LAN until the key has changed `count` times, by `changes`; compares the rate after the first megabytes
/// with the line's.
fn fills_line(net: &Topology, sender: Side, count: u64, changes: impl Fn() -> Result<u64>) -> Result<()> {
    let receiver = sender.other();
    let stream = Stream::start(net.lan(sender), (net.lan(receiver), receiver.host()))?;
    // TCP has found the rate.
    for _ in 0..5 {
        stream.wait_for_more()?;
    }
    let (start, octets, before) = (Instant::now(), stream.arrived(), changes()?);
    let deadline = start + patient(4 * SOON);
    while changes()? < before + count {
        stream.wait_for_more()?;
        ensure!(Instant::now() < deadline, "{} key changes, {} octets", changes()? - before, stream.arrived() - octets);
    }
    let (octets, took) = (stream.arrived() - octets, start.elapsed());
    stream.finish()?;
    let share = octets as f64 / took.as_secs_f64() / f64::from(rate());
    println!("{octets} octets in {took:?} and {count} key changes: {:.0} % of the line", 100.0 * share);
    ensure!(share >= SHARE, "{octets} octets in {took:?} and {count} key changes: {:.0} % of the line", 100.0 * share);
    Ok(())
}

/// Required key changes of the data's direction.
const CHANGES: u64 = 3;

fn with_an_original(sender: Side) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(
        Daemon::Blowfish,
        |options| options.set("peer", port_of(Side::A)),
        |config| config.peer = Some(port_of(Side::B)),
    )?;
    let tap = link.net.tap().context("a tapped carrier has a tap")?;
    let bind = |side| tap.run(|| UdpSocket::bind(port_of(side)));
    let relay = Relay::start([bind(Side::A)?, bind(Side::B)?], [Side::A, Side::B].map(carrier_of), 1)?;
    relay.impair(line());
    link.wait_for_pings()?;
    let changes = || {
        let counters = link.theirs.counters();
        Ok(if sender == Side::A { counters.receive_keys } else { counters.send_keys })
    };
    fills_line(&link.net, sender, CHANGES, changes)
        .with_context(|| format!("{:?}\n{:?}\n{:?}", relay.passed(), link.theirs.counters(), link.ours.status()))
}

#[test]
fn a_line_to_an_original_is_filled_while_keys_change() -> Result<()> {
    with_an_original(Side::A)
}

#[test]
fn a_line_from_an_original_is_filled_while_keys_change() -> Result<()> {
    with_an_original(Side::B)
}

#[test]
fn a_line_between_two_of_ours_is_filled_while_keys_change() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Relayed::start(Daemon::Idea, 1, |options| options.set("tokey", 1).set("tokxc", 1))?;
    link.relay.impair(line());
    link.pair.wait_for_keys(&link.net)?;
    let changes = || Ok(link.pair.a.send_keys() as u64);
    fills_line(&link.net, Side::A, 3 * CHANGES, changes)
        .with_context(|| format!("{:?}\n{:?}", link.relay.passed(), link.pair.a.status()))
}

#[test]
fn a_line_of_netem_is_filled_while_keys_change() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let bucket = format!("parent 1: handle 2: tbf rate {}bit burst 20kb latency 50ms", 8 * rate());
    for carrier in ["auto", "udp", "xdp"] {
        let offload = if carrier == "xdp" { Offload::Off } else { Offload::On };
        let net = Topology::new(Carrier::Tapped, offload)?;
        if !netem::shape(&net, &["root handle 1: netem delay 25ms limit 10000", &bucket])? {
            return Ok(());
        }
        let change = |_, options: Options| options.set("carrier", carrier).set("tokey", 1).set("tokxc", 1);
        let pair = Pair::start(&net, Daemon::Idea, change)?;
        pair.wait_for_keys(&net)?;
        for (sender, gateway) in [(Side::A, &pair.a), (Side::B, &pair.b)] {
            fills_line(&net, sender, CHANGES, || Ok(gateway.send_keys() as u64))
                .with_context(|| format!("carrier {carrier}: {:?}\n{:?}", netem::passed(&net), pair.a.status()))?;
        }
    }
    Ok(())
}
