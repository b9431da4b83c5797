//! `cargo xtask bench`: tunnels side by side, in one run on one machine.
//!
//! Rounds are the outermost loop, so that tunnels take turns and a slow minute of the machine affects all of them alike.

mod files;
mod install;
mod instructions;
mod many;
mod measure;
pub(crate) mod profile;
mod program;
mod record;
mod report;
mod small_buffer;
mod tunnel;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway;
use cipe_tests::topology::{Carrier, Topology as Net};
use clap::ValueEnum;

use crate::{bench_cipher, bench_datapath, tools};
use files::Files;
use measure::{Bench, Effort, Test};
use record::{Metric, Offloads, Record, Results, Topology};
use tunnel::Tunnel;

/// Arguments of the measurement.
#[derive(clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    part: Option<Part>,
    #[command(flatten)]
    tunnels: TunnelArgs,
}

#[derive(clap::Subcommand)]
enum Part {
    /// Measure tunnels side by side, as without any subcommand
    Tunnels(TunnelArgs),
    /// Measure one engine with 1, 100, 1,000 and 10,000 tunnels
    Many(many::Args),
    /// Count instructions a packet, in an emulated guest: for tunnels that this machine's kernel does not have
    Instructions(instructions::Args),
    /// Measure one TCP stream into the small receive buffer of an original, from ours and from an original
    SmallBuffer(small_buffer::Args),
    /// Measure the cipher kernels beside OpenSSL, libgcrypt, Botan and RustCrypto
    Cipher(bench_cipher::BenchCipher),
    /// Measure the datapath without kernel and network: nanoseconds and instructions a packet
    Datapath(bench_datapath::BenchDatapath),
}

/// Arguments of the measurement of tunnels.
#[derive(clap::Args)]
struct TunnelArgs {
    /// Only these tunnels [default: every one that is installed; with --quick those that the goals name]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TUNNEL,...")]
    only: Vec<Tunnel>,
    /// Only these topologies
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Topology::P2p, Topology::Gw])]
    topology: Vec<Topology>,
    /// Only these offloads [default: raw and on; with --quick raw]
    #[arg(long, value_enum, value_delimiter = ',')]
    offloads: Vec<Offloads>,
    /// Only these tests [default: all]
    #[arg(long, value_enum, value_delimiter = ',')]
    tests: Vec<Test>,
    /// How many times everything is measured [default: 3]
    #[arg(long)]
    rounds: Option<usize>,
    /// One round of short tests, about two minutes: a first look
    #[arg(long, conflicts_with = "rounds")]
    quick: bool,
    /// An option for our daemons, as in an option file; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Install missing programs: Debian packages, and crates under the target folder
    #[arg(long, conflicts_with = "from")]
    install: bool,
    /// The tunnel that the ratios are to
    #[arg(long, value_enum, default_value_t = Tunnel::Gotatun)]
    compare: Tunnel,
    #[command(flatten)]
    files: Files,
}

/// With --quick: ours, and the tunnels that the goals compare them with.
const QUICK: [Tunnel; 8] = [
    Tunnel::CipeBlowfish,
    Tunnel::CipeIdea,
    Tunnel::CipeSealed,
    Tunnel::CipeNokey,
    Tunnel::OpenvpnBf,
    Tunnel::Gotatun,
    Tunnel::Vxlan,
    Tunnel::Veth,
];

/// Measures and reports.
///
/// # Errors
/// A program is missing, or a tunnel did not start or carry a load; the others are reported all the same.
pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.part {
        None => tunnels(&args.tunnels),
        Some(Part::Tunnels(args)) => tunnels(args),
        Some(Part::Many(args)) => many::run(args),
        Some(Part::Instructions(args)) => instructions::run(args),
        Some(Part::SmallBuffer(args)) => small_buffer::run(args),
        Some(Part::Cipher(args)) => bench_cipher::run(args),
        Some(Part::Datapath(args)) => bench_datapath::run(args),
    }
}

fn tunnels(args: &TunnelArgs) -> Result<()> {
    let (results, failures) =
        if args.files.from.is_empty() { measure(args)? } else { (read(&args.files.from)?, BTreeMap::new()) };
    if !results.is_empty() {
        report::report(&results, args.compare, args.files.write)?;
    }
    if let Some((tunnel, error)) = failures.first_key_value() {
        let names: Vec<String> = failures.keys().map(|tunnel| tunnel.name()).collect();
        bail!("failed: {}; {} first with:\n{error}", names.join(", "), tunnel.name());
    }
    Ok(())
}

fn read(files: &[PathBuf]) -> Result<Results> {
    let mut results = Results::default();
    for file in files {
        results.read(file)?;
    }
    Ok(results)
}

/// The first error of each tunnel.
type Failures = BTreeMap<Tunnel, String>;

fn measure(args: &TunnelArgs) -> Result<(Results, Failures)> {
    tools::need_namespaces()?;
    let plan = Plan::new(args)?;
    gateway::use_binary(&args.files.binary()?)?;
    tunnel::use_options(&args.options);
    tools::clean_up_on_signals(tunnel::remove_sockets)?;
    let mut run = Run {
        total: plan.count(),
        plan,
        json: args.files.journal()?,
        results: Results::default(),
        failures: Failures::new(),
        done: 0,
        start: Instant::now(),
    };
    println!("{} tunnels, {} measurements, about {}", run.plan.tunnels.len(), run.total, minutes(run.plan.estimate()));
    run.all()?;
    Ok((run.results, run.failures))
}

/// The tests of a run, and their durations.
struct Plan {
    tunnels: Vec<Tunnel>,
    topologies: Vec<Topology>,
    offloads: Vec<Offloads>,
    tests: Vec<Test>,
    rounds: usize,
    effort: Effort,
}

impl Plan {
    fn new(args: &TunnelArgs) -> Result<Self> {
        let wanted = match (&args.only[..], args.quick) {
            ([], false) => Tunnel::all(),
            ([], true) => &QUICK,
            (only, _) => only,
        };
        if args.install {
            install::install(wanted)?;
        }
        let offloads: &[_] = match (&args.offloads[..], args.quick) {
            ([], true) => &[Offloads::Raw],
            ([], false) => &[Offloads::Raw, Offloads::On],
            (given, _) => given,
        };
        let tests = if args.tests.is_empty() { Test::value_variants() } else { &args.tests };
        Ok(Self {
            tunnels: install::runnable(wanted, !args.only.is_empty())?,
            topologies: args.topology.clone(),
            offloads: offloads.to_vec(),
            tests: tests.to_vec(),
            rounds: args.rounds.unwrap_or(if args.quick { 1 } else { 3 }).max(1),
            effort: if args.quick { Effort::QUICK } else { Effort::FULL },
        })
    }

    /// Total number of tests.
    fn count(&self) -> usize {
        self.rounds * self.offloads.len() * self.tunnels.len() * self.topologies.len() * self.tests.len()
    }

    fn estimate(&self) -> Duration {
        let start = Duration::from_millis(1500);
        let tests: Duration = self.tests.iter().map(|&test| self.effort.of(test)).sum();
        let starts = self.rounds * self.offloads.len() * self.tunnels.len();
        (tests * self.topologies.len() as u32 + start) * starts as u32
    }
}

struct Run {
    plan: Plan,
    json: Option<File>,
    results: Results,
    failures: Failures,
    done: usize,
    total: usize,
    start: Instant,
}

impl Run {
    fn all(&mut self) -> Result<()> {
        for round in 1..=self.plan.rounds {
            for offloads in self.plan.offloads.clone() {
                for tunnel in self.plan.tunnels.clone() {
                    if let Err(error) = self.one(round, offloads, tunnel) {
                        if tools::ending() {
                            // A signal removes the networks, and tests fail therefore; the process ends in a moment.
                            std::thread::park();
                        }
                        println!("{} failed: {error:#}", tunnel.name());
                        self.failures.entry(tunnel).or_insert_with(|| format!("{error:#}"));
                    }
                    let each = self.plan.topologies.len() * self.plan.tests.len();
                    self.done = self.done.next_multiple_of(each);
                }
            }
        }
        Ok(())
    }

    /// Starts a tunnel and runs every test on it.
    fn one(&mut self, round: usize, offloads: Offloads, tunnel: Tunnel) -> Result<()> {
        let net = Net::new(Carrier::Direct, offloads.of_bed())?;
        let running = tunnel.start(&net)?;
        for topology in self.plan.topologies.clone() {
            let bench = Bench { net: &net, topology, effort: self.plan.effort };
            for test in self.plan.tests.clone() {
                let values = bench.run(test).with_context(|| running.logs())?;
                self.done += 1;
                if values.is_empty() {
                    continue;
                }
                self.print(round, offloads, tunnel, topology, &values);
                for (test, value) in values {
                    let unit = test.unit().to_owned();
                    self.keep(&Record { tunnel, topology, offloads, test, round, value, unit })?;
                }
            }
        }
        Ok(())
    }

    fn keep(&mut self, record: &Record) -> Result<()> {
        self.results.add(record);
        if let Some(file) = &mut self.json {
            // A line in one write, so that an interrupted run leaves whole lines.
            file.write_all(format!("{}\n", serde_json::to_string(record)?).as_bytes())?;
        }
        Ok(())
    }

    fn print(&self, round: usize, offloads: Offloads, tunnel: Tunnel, topology: Topology, values: &[(Metric, f64)]) {
        let passed = self.start.elapsed();
        let left = passed.mul_f64((self.total - self.done) as f64 / self.done as f64);
        let figures: Vec<String> = values
            .iter()
            .filter(|(metric, value)| *metric != Metric::Foreign || *value > 5.0)
            .map(|(metric, value)| format!("{} {} {}", metric.name(), report::number(*value), metric.unit()))
            .collect();
        println!(
            "[{:>width$}/{}, {} left] round {round} {:>3} {:<3} {:<15} {}",
            self.done,
            self.total,
            minutes(left),
            offloads.name(),
            topology.name(),
            tunnel.name(),
            figures.join(", "),
            width = self.total.to_string().len(),
        );
    }
}

/// A duration for people.
fn minutes(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..100 => format!("{seconds} s"),
        seconds => format!("{} min", (seconds + 30) / 60),
    }
}
