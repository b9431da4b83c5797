//! An engine stands by, and takes the place of one that is killed.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, leak, may_make_namespaces, ping, process};
use rustix::process::Signal;

/// Gateway A, which has an engine that stands by from the start.
fn gateway(net: &Topology) -> Result<Gateway> {
    let (gw, routes) = (net.gw(Side::A), [Side::B.lan()]);
    let environment = [("CIPE_STANDBY", "0")];
    Gateway::start_with(net, (gw, "A"), &routes, Daemon::Blowfish, &Options::of(Side::A), &environment)
}

/// Gateways with keys, of which A has an engine that stands by from the start.
fn pair(net: &Topology) -> Result<Pair> {
    let mut a = gateway(net)?;
    let mut b = Gateway::start(net, Side::B, Daemon::Blowfish, &Options::of(Side::B))?;
    a.wait_up()?;
    b.wait_up()?;
    let pair = Pair { a, b };
    pair.wait_for_keys(net)?;
    Ok(pair)
}

/// The processes of A's gateway that stand by.
fn standing_by(net: &Topology) -> Result<Vec<u32>> {
    let all = net.gw(Side::A).processes()?.into_iter();
    Ok(all.filter(|pid| process::name(*pid).as_deref() == Some("cipe-standby")).collect())
}

/// Waits until there are so many lines that an engine stands by; returns its process.
fn wait_for_standby(net: &Topology, pair: &Pair, lines: usize) -> Result<u32> {
    pair.a.wait_for_lines(lines, "on an engine that stands by", |line| line.contains("an engine stands by"))?;
    let all = standing_by(net)?;
    ensure!(all.len() == 1, "{all:?} stand by");
    Ok(all[0])
}

fn wait_for_ping(net: &Topology) -> Result<()> {
    let (from, to) = (net.lan(Side::A), Side::B.host());
    let answered = ping::wait_for_answer(from, to, Duration::from_millis(10), SOON)?;
    ensure!(answered, "no answer within {SOON:?}");
    Ok(())
}

/// Waits until nothing is left of A's engines.
fn wait_for_nothing(net: &Topology, directory: &Path) -> Result<()> {
    for pid in net.gw(Side::A).processes()? {
        process::wait_gone(pid, SOON)?;
    }
    assert_eq!(std::fs::read_dir(directory)?.count(), 0);
    Ok(())
}

#[test]
fn an_engine_that_stands_by_takes_the_place_of_one_that_is_killed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    leak::tempt(&net)?;
    let pair = pair(&net)?;
    let capture = net.capture_carrier(100_000)?;
    for round in 1..=2 {
        let (engine, standby) = (pair.a.engine_pid().context("an engine runs")?, wait_for_standby(&net, &pair, round)?);
        process::signal(engine, Signal::KILL)?;
        pair.a.wait_for_lines(round, "on the next engine", |line| line.contains("goes on under the same keys"))?;
        wait_for_ping(&net)?;
        assert_eq!(pair.a.engine_pid(), Some(standby), "{round}");
    }
    assert!(leak::clear(&capture.finish()?).is_empty());
    wait_for_standby(&net, &pair, 3)?;
    let directory = pair.a.run_directory().to_owned();
    assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    wait_for_nothing(&net, &directory)
}

#[test]
fn an_engine_that_hangs_is_replaced_by_the_one_that_stands_by() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = pair(&net)?;
    let (engine, standby) = (pair.a.engine_pid().context("an engine runs")?, wait_for_standby(&net, &pair, 1)?);
    process::signal(engine, Signal::STOP)?;
    process::wait_gone(engine, SOON)?;
    wait_for_ping(&net)?;
    assert_eq!(pair.a.engine_pid(), Some(standby));
    Ok(())
}

#[test]
fn another_one_stands_by_after_one_that_is_killed_and_a_replacement_dismisses_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = pair(&net)?;
    let engine = pair.a.engine_pid().context("an engine runs")?;
    process::signal(wait_for_standby(&net, &pair, 1)?, Signal::KILL)?;
    let former = wait_for_standby(&net, &pair, 2)?;
    assert_eq!(pair.a.engine_pid(), Some(engine));
    let replaced = pair.a.cipe(&["engine", "--replace"]).output()?;
    ensure!(replaced.status.success(), "{}", String::from_utf8_lossy(&replaced.stderr));
    process::wait_gone(former, SOON)?;
    process::wait_gone(engine, SOON)?;
    wait_for_ping(&net)?;
    assert_ne!(pair.a.engine_pid(), Some(former));
    Ok(())
}

/// The engine that stands by takes over the device of a daemon that then dies, too.
#[test]
fn a_device_whose_daemon_dies_with_its_engine_makes_way_and_goes() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = pair(&net)?;
    let (daemon, standby) = (pair.a.pid(), wait_for_standby(&net, &pair, 1)?);
    process::signal(daemon, Signal::STOP)?;
    process::signal(pair.a.engine_pid().context("an engine runs")?, Signal::KILL)?;
    // It answers when it has taken over what the other one left.
    let deadline = Instant::now() + process::patient(SOON);
    let shows = || Ok::<_, anyhow::Error>(String::from_utf8(pair.a.cipe(&["show"]).output()?.stdout)?);
    while pair.a.engine_pid() != Some(standby) || shows()?.contains("no engine") {
        ensure!(Instant::now() < deadline, "the next engine does not answer");
    }
    process::signal(daemon, Signal::KILL)?;
    process::wait_gone(daemon, SOON)?;
    let Pair { a: gone, b } = pair;
    let directory = gone.run_directory().to_owned();
    let mut a = gateway(&net)?;
    a.wait_up()?;
    drop(gone);
    let device = a.status()?.device;
    ensure!(device == "cipcb0", "the device of the dead daemon was in the way: {device}");
    wait_for_ping(&net)?;
    assert!(Pair { a, b }.stop()?.iter().all(std::process::ExitStatus::success));
    wait_for_nothing(&net, &directory)?;
    net.gw(Side::A).wait_for_devices(&["lo", "lan0", "wire0"])
}

/// Both are gone at once: a daemon starts another engine.
#[test]
fn a_tunnel_comes_back_without_the_one_that_stood_by() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = pair(&net)?;
    let (engine, standby) = (pair.a.engine_pid().context("an engine runs")?, wait_for_standby(&net, &pair, 1)?);
    process::signal(standby, Signal::STOP)?;
    process::signal(engine, Signal::KILL)?;
    // Daemons wait at its socket, notice that it hangs, and kill it.
    process::wait_gone(standby, SOON)?;
    wait_for_ping(&net)?;
    let deadline = Instant::now() + process::patient(SOON);
    while pair.a.engine_pid().is_none() {
        ensure!(Instant::now() < deadline, "no engine");
        wait_for_ping(&net)?;
    }
    Ok(())
}
