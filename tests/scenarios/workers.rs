//! Several workers: the flows of one tunnel on all of them, each flow in order.

use std::path::Path;

use anyhow::{Context, Result};
use cipe_tests::flows::Flows;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{may_make_namespaces, traffic};

/// Flows, and datagrams of all of them.
const FLOWS: usize = 32;
const DATAGRAMS: u64 = 400 * FLOWS as u64;

/// Sends numbered datagrams in all flows at once, and asserts that each flow arrives in order and whole.
fn in_order(net: &Topology, from: Side) -> Result<()> {
    let mut flows = Flows::new(net, from, FLOWS, false)?;
    let mut datagrams = 0;
    while datagrams < DATAGRAMS {
        datagrams += flows.round()?;
    }
    Ok(())
}

/// The CPUs that each worker thread of an engine may run on, as the kernel prints them.
fn cpus_of_workers(engine: u32) -> Result<Vec<String>> {
    let mut cpus = Vec::new();
    for task in Path::new("/proc").join(engine.to_string()).join("task").read_dir()? {
        let path = task?.path();
        if std::fs::read_to_string(path.join("comm"))?.starts_with("cipe-worker") {
            let status = std::fs::read_to_string(path.join("status"))?;
            let line = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            cpus.push(line.context("the kernel tells the CPUs of a thread")?.trim().to_owned());
        }
    }
    cpus.sort();
    Ok(cpus)
}

/// Two gateways with `workers` worker threads each, or as many as they start by themselves.
fn carries_in_order(carrier: Carrier, options: &[(&str, &str)], workers: Option<usize>) -> Result<()> {
    let net = Topology::new(carrier, Offload::Raw)?;
    let count = workers.map(|count| count.to_string());
    let environment: Vec<(&str, &str)> = count.iter().map(|count| ("CIPE_WORKERS", count.as_str())).collect();
    let start = |side: Side| {
        let options = options.iter().fold(Options::of(side), |all, (name, value)| all.set(name, value));
        let (who, routes) = (side.letter().to_string(), [side.other().lan()]);
        Gateway::start_with(&net, (net.gw(side), &who), &routes, Daemon::Idea, &options, &environment)
    };
    let mut pair = Pair { a: start(Side::A)?, b: start(Side::B)? };
    pair.a.wait_up()?;
    pair.b.wait_up()?;
    pair.wait_for_keys(&net)?;
    let octets: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    for from in [Side::A, Side::B] {
        // Single frames make `carrier auto` change doors, with the first of them under way.
        in_order(&net, from)?;
        let waits = |door: &String| door.contains("until single frames");
        let receiver = pair.of(from.other());
        receiver.wait_for_status("its door", |status| !status.doors.iter().any(waits))?;
        let to = (net.lan(from.other()), from.other().host());
        assert!(traffic::tcp_transfer(net.lan(from), to, &octets)? == octets, "4 MB from {from:?}");
    }
    let allowed = std::thread::available_parallelism()?.get();
    let expected =
        workers.unwrap_or(if let Carrier::Queues(queues) = carrier { allowed.min(queues as usize) } else { 1 });
    for gateway in [&pair.a, &pair.b] {
        let status = gateway.status()?;
        assert_eq!(status.workers.len(), expected);
        // 32 flows on one of several: a chance of one in a thousand million.
        assert!(status.workers.iter().all(|(sent, _)| *sent > 0), "not all sent: {status:?}");
        assert_eq!(status.workers.iter().map(|(sent, _)| sent).sum::<u64>(), status.count("sent"));
        assert_eq!(status.workers.iter().map(|(_, delivered)| delivered).sum::<u64>(), status.count("delivered"));
        let engine = gateway.engine_pid().context("an engine")?;
        let cpus = cpus_of_workers(engine)?;
        assert_eq!(cpus.len(), expected);
        if expected > 1 {
            assert!(cpus.iter().all(|cpus| cpus.parse::<usize>().is_ok()), "each pinned to one CPU: {cpus:?}");
            let mut different = cpus.clone();
            different.dedup();
            assert_eq!(different.len(), expected.min(allowed), "{cpus:?}");
        }
    }
    Ok(())
}

#[test]
fn flows_of_one_tunnel_use_a_worker_for_each_queue_of_the_carrier() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["xdp", "udp", "auto"] {
        carries_in_order(Carrier::Queues(4), &[("carrier", door)], None)?;
    }
    Ok(())
}

#[test]
fn a_carrier_with_one_queue_has_one_worker_which_goes_where_there_is_room() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    carries_in_order(Carrier::Direct, &[], None)
}

#[test]
fn more_workers_than_queues_and_cpus_carry_all_the_same() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (carrier, door, mode) in
        [(Carrier::Direct, "xdp", "auto"), (Carrier::Queues(2), "xdp", "native"), (Carrier::Queues(2), "udp", "auto")]
    {
        carries_in_order(carrier, &[("carrier", door), ("xdp-mode", mode)], Some(3))?;
    }
    Ok(())
}
