//! A gateway that is started and stopped many times leaves nothing behind.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::{self, BpfObjects, patient};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::traces::Traces;
use cipe_tests::{SOON, may_make_namespaces};

/// Waits until the traces equal `before`: the engine may end a moment after its last daemon.
fn wait_for_none(before: &Traces, namespace: &Namespace, run_directory: &Path) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    loop {
        for pid in namespace.processes()? {
            process::wait_gone(pid, SOON)?;
        }
        let now = Traces::of(namespace, run_directory)?;
        if now == *before {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("left behind: {now:#?}\nbefore: {before:#?}");
        }
    }
}

/// Waits until the kernel has freed `objects`, which it does some time after the last descriptor was closed.
fn wait_until_freed(objects: &BpfObjects) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    loop {
        let programs: BTreeSet<u32> = aya::programs::loaded_programs().filter_map(|p| p.ok().map(|p| p.id())).collect();
        let maps: BTreeSet<u32> = aya::maps::loaded_maps().filter_map(|m| m.ok().map(|m| m.id())).collect();
        let links: BTreeSet<u32> = aya::programs::loaded_links().filter_map(|l| l.ok().map(|l| l.id())).collect();
        let left = BpfObjects {
            programs: objects.programs.iter().copied().filter(|id| programs.contains(id)).collect(),
            maps: objects.maps.iter().copied().filter(|id| maps.contains(id)).collect(),
            links: objects.links.iter().copied().filter(|id| links.contains(id)).collect(),
        };
        if left == BpfObjects::default() {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("not freed: {left:?}");
        }
    }
}

#[test]
fn fifty_starts_and_stops_leave_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let namespace = net.gw(Side::A);
    let mut before = None;
    for round in 0..50 {
        let mut daemon = [Daemon::Blowfish, Daemon::Idea][round % 2];
        if round < 2 {
            daemon = Daemon::Blowfish;
        }
        let start = || Gateway::start(&net, Side::A, daemon, &Options::of(Side::A));
        let mut gateway = start()?;
        let run_directory = gateway.run_directory().to_owned();
        let device = gateway.wait_up().with_context(|| format!("round {round}"))?;
        assert_eq!(device, daemon.device(), "round {round}: an earlier device is in the way");
        let objects = gateway.bpf_objects();
        assert!(objects.programs.len() >= 3 && !objects.maps.is_empty(), "round {round}: {objects:?}");
        let status = gateway.stop()?;
        assert!(status.success(), "round {round}: {status}");
        match &before {
            // The first start may make permanent objects, such as an empty run directory.
            None => {
                for pid in namespace.processes()? {
                    process::wait_gone(pid, SOON)?;
                }
                before = Some(Traces::of(namespace, &run_directory)?);
            }
            Some(before) => {
                wait_for_none(before, namespace, &run_directory).with_context(|| format!("round {round}"))?;
            }
        }
        wait_until_freed(&objects).with_context(|| format!("round {round}"))?;
    }
    let before = before.context("there was a first round")?;
    assert_eq!(before.links, ["lo", "lan0", "wire0"]);
    assert!(before.files.is_empty(), "{:?}", before.files);
    Ok(())
}

#[test]
fn a_start_after_a_crash_removes_what_the_crash_left() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    for round in 0..5 {
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options)?;
        pair.wait_for_keys(&net).with_context(|| format!("round {round}"))?;
        let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(10))?;
        assert_eq!(report.received(), 10, "round {round}");
        let engine = pair.a.engine_pid().context("an engine runs")?;
        pair.a.kill()?;
        process::signal(engine, rustix::process::Signal::KILL)?;
        process::wait_gone(engine, SOON)?;
        assert!(pair.b.stop()?.success(), "round {round}");
    }
    let mut last = Gateway::start(&net, Side::A, Daemon::Blowfish, &Options::of(Side::A))?;
    let run_directory = last.run_directory().to_owned();
    assert_eq!(last.wait_up()?, "cipcb0");
    last.stop()?;
    for pid in net.gw(Side::A).processes()? {
        process::wait_gone(pid, SOON)?;
    }
    let after = Traces::of(net.gw(Side::A), &run_directory)?;
    assert_eq!(after.links, ["lo", "lan0", "wire0"]);
    assert_eq!((after.processes, after.files), (vec![], vec![]));
    Ok(())
}
