//! `cargo xtask bench many`: one engine with many tunnels, hub and spokes.
//!
//! Both ends are engines, each in its own namespace, joined by one veth pair. No daemon runs: a [`Fleet`] opens a control
//! connection for each of them, and gives both ends the same dynamic keys.

mod memory;
mod report;

use std::io::Write;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::fleet::{self, Cipher, Fleet, Keys};
use cipe_tests::gateway;
use cipe_tests::namespace::Namespace;
use cipe_tests::topology::{Carrier, Side, Topology as Net};
use cipe_tests::traffic;
use serde::{Deserialize, Serialize};

use super::files::Files;
use super::measure::{account, search};
use super::record::{Offloads, Topology};
use super::report::number;
use super::tunnel::Tunnel;
use crate::tools;

/// Arguments of the measurement.
#[derive(clap::Args)]
pub(super) struct Args {
    /// How many tunnels, one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [1, 100, 1_000, 10_000])]
    tunnels: Vec<usize>,
    /// How many times everything is measured
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Which cipher
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Tunnel::CipeIdea])]
    only: Vec<Tunnel>,
    /// How datagrams get to the carrier: auto, xdp or udp
    #[arg(long, default_value = "auto")]
    carrier: String,
    #[command(flatten)]
    files: Files,
}

/// Quantities, of one tunnel of many at one end unless noted otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Metric {
    /// Time to make a tunnel.
    Setup,
    /// Resident memory of the engine, without key state.
    Engine,
    /// Memory of the kernel.
    Kernel,
    /// Resident memory of the engine with keys in use.
    Keyed,
    /// CPU time of the engine for two new keys and the first packets under them.
    KeyChange,
    /// Highest rate of datagrams of 1400 octets to all tunnels at random that loses at most one in 1000.
    Rate,
    /// Rate that arrives when they flood the tunnel.
    Flood,
    /// The same as a payload rate.
    Goodput,
}

impl Metric {
    const ALL: [Self; 8] =
        [Self::Setup, Self::Engine, Self::Kernel, Self::Keyed, Self::KeyChange, Self::Rate, Self::Flood, Self::Goodput];

    fn name(self) -> &'static str {
        match self {
            Self::Setup => "setup",
            Self::Engine => "memory-engine",
            Self::Kernel => "memory-kernel",
            Self::Keyed => "memory-engine-keyed",
            Self::KeyChange => "key-change",
            Self::Rate => "udp-1400",
            Self::Flood => "udp-1400-flood",
            Self::Goodput => "udp-1400-goodput",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Setup | Self::KeyChange => "us",
            Self::Engine | Self::Kernel | Self::Keyed => "KiB",
            Self::Rate | Self::Flood => "packets/s",
            Self::Goodput => "Mbit/s",
        }
    }
}

/// One measurement, with the fields of all others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The cipher.
    pub tunnel: Tunnel,
    /// Always from gateway to gateway.
    pub topology: Topology,
    /// Of the carrier.
    pub offloads: Offloads,
    /// `many-`, the number of tunnels, and the quantity.
    pub test: String,
    /// Number of the round, from 1.
    pub round: usize,
    /// The value, in `unit`.
    pub value: f64,
    /// Unit of the value.
    pub unit: String,
}

impl Record {
    fn new(tunnel: Tunnel, tunnels: usize, metric: Metric, round: usize, value: f64) -> Self {
        let (topology, offloads, unit) = (Topology::P2p, Offloads::Raw, metric.unit().to_owned());
        Self { tunnel, topology, offloads, test: format!("many-{tunnels}-{}", metric.name()), round, value, unit }
    }

    /// The number of tunnels and the quantity; `None` if the record is not of this bench.
    fn parse(&self) -> Option<(usize, Metric)> {
        let (tunnels, name) = self.test.strip_prefix("many-")?.split_once('-')?;
        Some((tunnels.parse().ok()?, Metric::ALL.into_iter().find(|metric| metric.name() == name)?))
    }
}

/// Payload of the load's datagrams, in octets.
const PAYLOAD: usize = 1400;
/// Duration of one trial of a rate.
const TRIAL_TIME: Duration = Duration::from_millis(1000);
/// Trials of rates, without the flood.
const RATE_TRIALS: usize = 6;
/// Datagrams in flight when each tunnel is used once.
const VISITS_IN_FLIGHT: usize = 20;
/// Longest time that the last of them may be in flight; after that, one is lost.
const LOSS_TIMEOUT: Duration = Duration::from_millis(100);
/// Number of changes of all keys.
const KEY_CHANGES: usize = 5;

/// Measures and reports.
///
/// # Errors
/// An engine does not start or refuses a tunnel, or nothing of a load arrives.
pub(super) fn run(args: &Args) -> Result<()> {
    let records = if args.files.from.is_empty() { measure(args)? } else { read(&args.files.from)? };
    report::report(&records, args.files.write)
}

fn read(files: &[PathBuf]) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    for path in files {
        let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        for (number, line) in text.lines().enumerate() {
            let place = || format!("{}:{}", path.display(), number + 1);
            records.push(serde_json::from_str(line).with_context(place)?);
        }
    }
    Ok(records)
}

fn measure(args: &Args) -> Result<Vec<Record>> {
    tools::need_namespaces()?;
    gateway::use_binary(&args.files.binary()?)?;
    tools::clean_up_on_signals(super::tunnel::remove_sockets)?;
    let most = fleet::most_tunnels();
    let mut json = args.files.journal()?;
    let mut records = Vec::new();
    for round in 1..=args.rounds.max(1) {
        for &tunnel in &args.only {
            for &wanted in &args.tunnels {
                if wanted > most {
                    let each = fleet::DESCRIPTORS;
                    println!(
                        "{wanted} tunnels: {most}, as {each} descriptors a tunnel and the limit of open files allow"
                    );
                }
                let tunnels = wanted.min(most);
                let values = one(tunnel, tunnels, &args.carrier).with_context(|| format!("{tunnels} tunnels"))?;
                let figures: Vec<String> = values
                    .iter()
                    .map(|(metric, value)| format!("{} {} {}", metric.name(), number(*value), metric.unit()))
                    .collect();
                println!("round {round} {} {tunnels:>5} tunnels: {}", tunnel.name(), figures.join(", "));
                for (metric, value) in values {
                    let record = Record::new(tunnel, tunnels, metric, round, value);
                    if let Some(file) = &mut json {
                        file.write_all(format!("{}\n", serde_json::to_string(&record)?).as_bytes())?;
                    }
                    records.push(record);
                }
            }
        }
    }
    Ok(records)
}

/// Sets `tunnels` up between two fresh engines, and measures.
fn one(tunnel: Tunnel, tunnels: usize, carrier: &str) -> Result<Vec<(Metric, f64)>> {
    let net = Net::new(Carrier::Direct, Offloads::Raw.of_bed())?;
    let cipher = match tunnel {
        Tunnel::CipeBlowfish => Cipher::Blowfish,
        Tunnel::CipeNokey => Cipher::Nokey,
        _ => Cipher::Idea,
    };
    let mut ends = [Fleet::start(&net, Side::A, cipher)?, Fleet::start(&net, Side::B, cipher)?];
    ends.iter_mut().for_each(|end| end.set_modes(carrier, "auto"));
    let [a, b] = &ends;
    let engines = [a.engine(), b.engine()];
    let count = tunnels as f64;
    let mut before = memory::Memory::now(&engines)?;
    let mut others = count;
    let start = Instant::now();
    ends.iter_mut().try_for_each(|end| end.attach(0..1))?;
    if tunnels > 1 {
        // The first tunnel made the shared objects.
        before = memory::Memory::now(&engines)?;
        others = count - 1.0;
        ends.iter_mut().try_for_each(|end| end.attach(1..tunnels))?;
    }
    let setup = start.elapsed().as_secs_f64() * 1e6 / (2.0 * count);
    let idle = memory::Memory::now(&engines)?.since(before);

    let addresses: Vec<Ipv4Addr> = (0..tunnels).map(|number| fleet::inner(Side::B, number)).collect();
    let (from, to) = (net.gw(Side::A), net.gw(Side::B));
    ends.iter().try_for_each(|end| end.set_keys(Keys::first()))?;
    visit(from, (to, &addresses))?;
    let keyed = memory::Memory::now(&engines)?.since(before);

    account::wait_until_quiet(Duration::from_secs(15))?;
    let (mut visits, mut changes) = (Vec::new(), Vec::new());
    for change in 0..KEY_CHANGES {
        visits.push(used_by(&engines, || visit(from, (to, &addresses)))?);
        let keys = if change % 2 == 0 { Keys::next() } else { Keys::first() };
        changes.push(used_by(&engines, || {
            ends.iter().try_for_each(|end| end.set_keys(keys))?;
            visit(from, (to, &addresses))
        })?);
    }
    let change = median(changes).saturating_sub(median(visits)).as_secs_f64() * 1e6 / (2.0 * count);

    account::wait_until_quiet(Duration::from_secs(15))?;
    let found = search::loss_free(RATE_TRIALS, |pace| {
        let report = traffic::udp_scattered(from, (to, &addresses), PAYLOAD, pace, TRIAL_TIME)?;
        ensure!(report.damaged == 0, "{} datagrams were damaged", report.damaged);
        Ok((&report).into())
    })?;
    for end in &ends {
        println!(
            "{}",
            end.verdicts()?.iter().map(|(verdict, count)| format!("{verdict} {count}")).collect::<Vec<_>>().join(", ")
        );
    }
    ensure!(found.flood > 0.0, "no datagram arrived\n{}", ends[0].log());
    let mbit = |rate: f64| rate * PAYLOAD as f64 * 8e-6;
    Ok(vec![
        (Metric::Setup, setup),
        (Metric::Engine, idle.engine / (2.0 * others)),
        (Metric::Kernel, idle.kernel / (2.0 * others)),
        (Metric::Keyed, keyed.engine / (2.0 * others)),
        (Metric::KeyChange, change),
        (Metric::Rate, found.rate),
        (Metric::Flood, found.flood),
        (Metric::Goodput, mbit(found.flood)),
    ])
}

/// CPU time of processes while `work` runs.
fn used_by(pids: &[u32], work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let before = account::run_time(pids)?;
    work()?;
    Ok(account::run_time(pids)?.saturating_sub(before))
}

/// Sends one datagram through each tunnel, so that each has traffic under its present keys.
fn visit(from: &Namespace, (to, addresses): (&Namespace, &[Ipv4Addr])) -> Result<()> {
    let receiver = to.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    receiver.set_read_timeout(Some(LOSS_TIMEOUT))?;
    let port = receiver.local_addr()?.port();
    let sender = from.run(|| UdpSocket::bind("0.0.0.0:0"))?;
    for some in addresses.chunks(VISITS_IN_FLIGHT) {
        for address in some {
            sender.send_to(b"visit", (*address, port))?;
        }
        // Send the next ones when these have arrived. A lost one has passed its tunnel's near end, which is enough.
        let mut waiting = some.iter();
        while waiting.next().is_some() && receiver.recv(&mut [0; 16]).is_ok() {}
    }
    Ok(())
}

/// The median.
fn median(mut values: Vec<Duration>) -> Duration {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_says_how_many_tunnels_and_what() {
        let record = Record::new(Tunnel::CipeIdea, 1000, Metric::Flood, 2, 5.0);
        assert_eq!(record.test, "many-1000-udp-1400-flood");
        assert_eq!(record.parse(), Some((1000, Metric::Flood)));
        let other = Record { test: "udp-1400".to_owned(), ..record };
        assert_eq!(other.parse(), None);
    }
}
