//! Several workers: the flows of one tunnel are spread over all of them, each flow in order.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cipe_tests::flows::Flows;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::process::patient;
use cipe_tests::status::Share;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, ping, traffic};

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

/// Two gateways with `workers` worker threads each, or with the default number; keys exchanged.
fn start(net: &Topology, options: &[(&str, &str)], workers: Option<usize>) -> Result<Pair> {
    let count = workers.map(|count| count.to_string());
    let environment: Vec<(&str, &str)> = count.iter().map(|count| ("CIPE_WORKERS", count.as_str())).collect();
    let start = |side: Side| {
        let options = options.iter().fold(Options::of(side), |all, (name, value)| all.set(name, value));
        let (who, routes) = (side.letter().to_string(), [side.other().lan()]);
        Gateway::start_with(net, (net.gw(side), &who), &routes, Daemon::Idea, &options, &environment)
    };
    let mut pair = Pair { a: start(Side::A)?, b: start(Side::B)? };
    pair.a.wait_up()?;
    pair.b.wait_up()?;
    pair.wait_for_keys(net)?;
    if options.contains(&("carrier", "xdp")) {
        // Sealed tunnels have keys before AF_XDP is open, and packets by the socket and by the card may overtake each other.
        for gateway in [&mut pair.a, &mut pair.b] {
            gateway.wait_for_status("its door", |status| status.doors.iter().any(|door| door.contains("queue(s)")))?;
        }
    }
    Ok(pair)
}

fn carries_in_order(carrier: Carrier, options: &[(&str, &str)], workers: Option<usize>) -> Result<()> {
    let net = Topology::new(carrier, Offload::Raw)?;
    let pair = start(&net, options, workers)?;
    let octets: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    for from in [Side::A, Side::B] {
        // Single frames make `carrier auto` change doors while the first of them are in flight.
        in_order(&net, from).with_context(|| format!("{:?}, {:?}", pair.a.status(), pair.b.status()))?;
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
        // The chance that all 32 flows use one of several workers is one in a thousand million.
        assert!(status.workers.iter().all(|share| share.sent > 0), "not all sent: {status:?}");
        assert_eq!(status.workers.iter().map(|share| share.sent).sum::<u64>(), status.count("sent"));
        assert_eq!(status.workers.iter().map(|share| share.delivered).sum::<u64>(), status.count("delivered"));
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
fn flows_of_a_sealed_tunnel_use_each_worker_and_stay_in_order() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for door in ["xdp", "udp"] {
        carries_in_order(Carrier::Queues(4), &[("carrier", door), ("sealed", "require")], Some(3))?;
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

/// Work sharing: a worker with more datagrams than the ciphers take at once lends some to others, and all arrive in order.
fn lends(door: &str, offload: Offload) -> Result<()> {
    /// Datagrams of each flow in flight: 512 in all, four times as many as the ciphers take at once.
    const MANY: u32 = 16;
    let net = Topology::new(Carrier::Direct, offload)?;
    let pair = start(&net, &[("carrier", door)], Some(3))?;
    let mut flows = Flows::new(&net, Side::A, FLOWS, false)?.with_window(MANY);
    let lent =
        |gateway: &Gateway| -> Result<u64> { Ok(gateway.status()?.workers.iter().map(|share| share.helped).sum()) };
    let (before, deadline) = (lent(&pair.b)?, Instant::now() + patient(SOON));
    loop {
        // B only receives, except for a few messages: its workers share packets from the carrier only.
        flows.round()?;
        if lent(&pair.b)? > before {
            break;
        }
        ensure!(Instant::now() < deadline, "nothing was lent: {:?}", pair.b.status()?);
    }
    let status = pair.b.status()?;
    let share = |count: fn(&Share) -> u64| status.workers.iter().map(count).collect::<Vec<_>>();
    // One worker received all of them; the others have decrypted, not delivered.
    assert_eq!(share(|worker| worker.delivered).iter().filter(|delivered| **delivered > 0).count(), 1, "{status:?}");
    Ok(())
}

#[test]
fn received_batches_are_lent_to_other_workers_and_each_flow_stays_in_order() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    lends("udp", Offload::On)?;
    lends("xdp", Offload::Raw)
}

#[test]
fn flows_on_several_queues_of_a_short_cut_stay_in_order() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (door, mode, workers) in [("xdp", "native", None), ("udp", "native", Some(3)), ("xdp", "generic", Some(2))] {
        let net = Topology::with_lan_queues(4, Carrier::Queues(4), Offload::Raw)?;
        let pair = start(&net, &[("carrier", door), ("xdp-mode", mode), ("lan", "lan0")], workers)?;
        for side in [Side::A, Side::B] {
            let words = |door: &String| door.contains("lan0: short cut") && door.contains("4 queue(s)");
            pair.of(side).wait_for_status("4 queues", |status| status.doors.iter().any(words))?;
        }
        let on_devices = || -> Result<u64> {
            let of = |side| net.gw(side).counters(Daemon::Idea.device());
            let (a, b) = (of(Side::A)?, of(Side::B)?);
            Ok(a.rx_packets + a.tx_packets + b.rx_packets + b.tx_packets)
        };
        let deadline = Instant::now() + patient(SOON);
        loop {
            let before = on_devices()?;
            let report = ping::run(net.lan(Side::A), Side::B.host(), &ping::Plan::count(1))?;
            if report.received() == 1 && on_devices()? == before {
                break;
            }
            ensure!(Instant::now() < deadline, "the kernel still forwards: {:?}", pair.a.status()?);
        }
        let before = on_devices()?;
        for from in [Side::A, Side::B] {
            in_order(&net, from).with_context(|| {
                let ends = [&pair.a, &pair.b].map(Gateway::status);
                format!(
                    "{door}, {mode}, {workers:?}, from {from:?}: {before} by devices, {:?} now, {ends:?}",
                    on_devices()
                )
            })?;
        }
        assert_eq!(on_devices()?, before, "not one went through the kernel");
        for gateway in [&pair.a, &pair.b] {
            let status = gateway.status()?;
            assert!(status.workers.iter().all(|share| share.sent > 0), "not all sent: {status:?}");
        }
    }
    Ok(())
}
