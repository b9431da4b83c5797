//! Each of two ends is restarted, moved, or silent for a while: a TCP stream continues afterwards.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::Daemon;
use cipe_tests::impair::Relay;
use cipe_tests::options::PORT;
use cipe_tests::original::{Original, another_address};
use cipe_tests::peer::{Config, Event};
use cipe_tests::ping::{self, Plan};
use cipe_tests::relayed::{carrier_of, port_of};
use cipe_tests::stream::Stream;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces, process};
use rustix::process::Signal;

/// Runs `change` under a stream from each side, one after the other: the stream must continue, and pings must pass afterwards.
fn survives(daemon: Daemon, change: impl Fn(&mut Original) -> Result<()>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let quick = |config: &mut Config| {
        (config.tokey, config.tokxc) = (Duration::from_secs(1), Duration::from_secs(1));
    };
    for sender in [Side::A, Side::B] {
        let mut link =
            Original::start(daemon, |options| options.set("tokey", 1).set("tokxc", 1).set("maxerr", -1), quick)?;
        link.wait_for_pings()?;
        let receiver = sender.other();
        let stream = Stream::start(link.net.lan(sender), (link.net.lan(receiver), receiver.host()))?;
        stream.wait_for_more()?;
        change(&mut link)?;
        // Packets that a host would send by itself: a moved end is found by its packets.
        link.wait_for_pings()?;
        let more = stream.wait_for_more();
        more.with_context(|| {
            format!("from {sender:?}; theirs: {:?}\n{}", link.theirs.counters(), link.ours.log().text())
        })?;
        stream.finish()?;
    }
    Ok(())
}

/// Sends pings from a LAN, answered or not, until a condition is true.
fn until(link: &Original, side: Side, is_true: impl Fn(&Original) -> bool) -> Result<()> {
    let deadline = Instant::now() + process::patient(SOON);
    let plan = Plan { timeout: Duration::from_millis(100), ..Plan::count(1) };
    while !is_true(link) {
        ping::run(link.net.lan(side), side.other().host(), &plan)?;
        if Instant::now() > deadline {
            bail!("{:?}\n{}", link.theirs.counters(), link.ours.log().text());
        }
    }
    Ok(())
}

#[test]
fn the_original_is_restarted() -> Result<()> {
    survives(Daemon::Blowfish, |link| link.restart_theirs(carrier_of(Side::B)))
}

#[test]
fn ours_is_restarted() -> Result<()> {
    survives(Daemon::Blowfish, |link| link.restart_ours(|options| options))
}

#[test]
fn the_original_moves_to_another_address_and_port() -> Result<()> {
    survives(Daemon::Idea, |link| {
        let to = another_address(&link.net, Side::B)?;
        link.move_theirs(to)?;
        link.wait_for_pings()?;
        link.ours.wait_for_line("of the new peer", |line| line.contains(&format!("new peer {to}")))?;
        Ok(())
    })
}

#[test]
fn ours_moves_to_another_address_and_port() -> Result<()> {
    survives(Daemon::Blowfish, |link| {
        let me = another_address(&link.net, Side::A)?;
        link.restart_ours(|options| options.set("me", me))?;
        link.wait_for_pings()?;
        assert_eq!(link.theirs.counters().moves, 1, "{:?}", link.theirs.counters());
        Ok(())
    })
}

#[test]
fn the_original_is_silent_for_a_while() -> Result<()> {
    survives(Daemon::Blowfish, |link| {
        link.theirs.silence(true);
        until(link, Side::A, |link| link.ours.log().text().contains("no answer to NK_IND"))?;
        link.theirs.silence(false);
        Ok(())
    })
}

#[test]
fn ours_is_silent_for_a_while() -> Result<()> {
    survives(Daemon::Idea, |link| {
        let engine = link.ours.engine_pid().context("ours has an engine")?;
        let start = link.theirs.counters().indications_sent;
        process::signal(engine, Signal::STOP)?;
        // Each new key that it offers without an answer takes a tokxc.
        let offered = until(link, Side::B, |link| link.theirs.counters().indications_sent >= start + 3);
        process::signal(engine, Signal::CONT)?;
        offered
    })
}

#[test]
fn a_nat_between_them_forgets_its_mapping() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(
        Daemon::Blowfish,
        |options| options.set("peer", port_of(Side::A)),
        |config| config.peer = None,
    )?;
    let tap = link.net.tap().context("a tapped carrier has a tap")?;
    let bind = |address: SocketAddr| tap.run(|| UdpSocket::bind(address));
    let ends = [Side::A, Side::B].map(carrier_of);
    let relay = Relay::start([bind(port_of(Side::A))?, bind(port_of(Side::B))?], ends, 1)?;
    link.wait_for_pings()?;
    for (number, side) in [1, 0, 1, 0].into_iter().enumerate() {
        let new = SocketAddr::new(port_of([Side::A, Side::B][side]).ip(), PORT + 100 + number as u16);
        relay.rebind(side, bind(new)?)?;
        link.wait_for_pings()?;
        if side == 0 {
            link.ours.wait_for_line("of the new peer", |line| line.contains(&format!("new peer {new}")))?;
        }
    }
    assert_eq!(link.theirs.counters().moves, 3, "{:?}", link.theirs.counters());
    Ok(())
}

/// Without `ping` the other end would not learn the new address until ours has a packet to send.
#[test]
fn pings_tell_the_peer_of_a_nat_s_new_mapping() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(
        Daemon::Blowfish,
        |options| options.set("peer", port_of(Side::A)).set("ping", 1),
        |config| config.peer = None,
    )?;
    let tap = link.net.tap().context("a tapped carrier has a tap")?;
    let bind = |address: SocketAddr| tap.run(|| UdpSocket::bind(address));
    let ends = [Side::A, Side::B].map(carrier_of);
    let relay = Relay::start([bind(port_of(Side::A))?, bind(port_of(Side::B))?], ends, 1)?;
    link.wait_for_pings()?;
    for number in 1..=3 {
        let new = SocketAddr::new(port_of(Side::B).ip(), PORT + 200 + number);
        relay.rebind(1, bind(new)?)?;
        let deadline = Instant::now() + process::patient(SOON);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = link.events.recv_timeout(left).with_context(|| link.ours.log().text())?;
            if matches!(event, Event::Moved(to) if to == new) {
                break;
            }
        }
        let report = ping::run(link.net.lan(Side::B), Side::A.host(), &Plan::count(1))?;
        assert_eq!(report.received(), 1, "{:?}", link.theirs.counters());
    }
    Ok(())
}
