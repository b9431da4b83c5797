//! `cargo xtask profile`: the CPU time of a run by function, as a flame graph and as a table.

mod flame;
mod stacks;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cipe_tests::gateway;
use cipe_tests::topology::{Carrier, Topology as Net};

use super::measure::{Bench, Effort, Test, account};
use super::record::{Offloads, Topology};
use super::report::{self, Table};
use super::tunnel::{self, Kind, Tunnel};
use super::{install, program};
use crate::tools;
use stacks::Stacks;

/// Arguments of the profile.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The tunnel
    #[arg(long, value_enum, default_value_t = Tunnel::CipeBlowfish, hide_possible_values = true)]
    tunnel: Tunnel,
    /// The load
    #[arg(long, value_enum, default_value_t = Test::Tcp1)]
    test: Test,
    /// The hosts at both ends of the load
    #[arg(long, value_enum, default_value_t = Topology::Gw)]
    topology: Topology,
    /// Offloads of the network devices
    #[arg(long, value_enum, default_value_t = Offloads::Raw)]
    offloads: Offloads,
    /// Seconds of load
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// The flame graph [default: target/profile/TUNNEL-TEST-TOPOLOGY-OFFLOADS.svg]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Profile this `cipe` binary instead of building one with frame pointers, without which its stacks are cut short
    #[arg(long, value_name = "FILE")]
    cipe: Option<PathBuf>,
    /// An option for our daemons, as in an option file; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE")]
    options: Vec<String>,
    /// Install perf (Debian's linux-perf) and the tunnel's programs if they are missing
    #[arg(long)]
    install: bool,
}

/// Samples a second on each CPU. Not a multiple of the kernel's tick rate, so that samples are not in step with it.
const FREQUENCY: &str = "1997";
/// Letters of a function's name in the table.
const LETTERS: usize = 72;
/// Rows of the table.
const ROWS: usize = 20;

/// Runs the load under perf and draws the samples.
///
/// # Errors
/// A program is missing, or perf fails.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    if program::find("perf").is_none() && args.install {
        tools::apt_install(&["linux-perf"])?;
    }
    let perf = program::find("perf").context("perf is missing; add --install, or install linux-perf")?;
    if args.install {
        install::install(&[args.tunnel])?;
    }
    install::runnable(&[args.tunnel], true)?;
    if args.tunnel.kind() == Kind::Ours {
        gateway::use_binary(&binary(args)?)?;
    }
    tunnel::use_options(&args.options);
    tools::clean_up_on_signals(tunnel::remove_sockets)?;

    let folder = tools::target().join("profile");
    fs::create_dir_all(&folder)?;
    let samples = folder.join("perf.data");
    let tunnel = record(args, &perf, &samples)?;
    let stacks = read(&perf, &samples, &tunnel)?;
    fs::remove_file(&samples)?;

    print(&stacks);
    let name = [args.tunnel.name(), args.test.name(), args.topology.name().into(), args.offloads.name().into()];
    let path = args.output.clone().unwrap_or_else(|| folder.join(name.join("-") + ".svg"));
    let title = format!("{}, {}, {}, offloads {}", name[0], name[1], args.topology.title(), name[3]);
    fs::write(&path, flame::svg(&title, &stacks)).with_context(|| format!("{}", path.display()))?;
    println!("written: {}", path.display());
    Ok(())
}

/// A release build with frame pointers, in a separate target folder, since a change of flags would rebuild everything each
/// time.
fn binary(args: &Args) -> Result<PathBuf> {
    if let Some(path) = &args.cipe {
        return Ok(path.clone());
    }
    println!("Building cipe (release, with frame pointers) ...");
    let target = tools::target().join("profile/target");
    let mut build = tools::cargo(&["build", "--release", "--package", "cipe-user", "--bin", "cipe", "--target-dir"]);
    build.arg(&target).env("RUSTFLAGS", "-C force-frame-pointers=yes");
    tools::check(&mut build)?;
    Ok(target.join("release/cipe"))
}

/// Starts the tunnel and samples all CPUs while the load runs; returns the tunnel's processes.
fn record(args: &Args, perf: &Path, samples: &Path) -> Result<Vec<u32>> {
    let seconds = args.seconds.max(1);
    let time = Duration::from_secs(seconds);
    // Wait for a quiet machine before the first sample.
    let effort = Effort { tcp: time + Duration::from_secs(1), idle: time, quiet: Duration::ZERO, ..Effort::FULL };
    let net = Net::new(Carrier::Direct, args.offloads.of_bed())?;
    let running = args.tunnel.start(&net)?;
    account::wait_until_quiet(Effort::FULL.quiet)?;
    println!("{} of {} for {seconds} s ...", args.test.name(), args.tunnel.name());
    let mut command = Command::new(perf);
    command.args(["record", "--quiet", "--all-cpus", "--call-graph", "fp", "--event", "cpu-clock"]);
    command.args(["--freq", FREQUENCY, "--output"]).arg(samples).args(["--", "sleep", &seconds.to_string()]);
    let mut sampling = command.stdin(Stdio::null()).spawn()?;
    let bench = Bench { net: &net, topology: args.topology, effort };
    let values = bench.run(args.test).with_context(|| running.logs());
    let status = sampling.wait()?;
    for (metric, value) in values? {
        println!("  {} {} {}", metric.name(), report::number(value), metric.unit());
    }
    if !status.success() {
        bail!("perf record: {status}");
    }
    bench.tunnel()
}

/// Whether this is the idle task, on whose stack interrupts run, or a kernel thread that runs softirqs.
fn moves_packets(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    pid == 0 || name.starts_with("ksoftirqd/") || name.starts_with("napi/")
}

/// The stacks of the tunnel, the load and the kernel.
fn read(perf: &Path, samples: &Path, tunnel: &[u32]) -> Result<Stacks> {
    // Inlined frames would need addr2line for each address, which takes minutes.
    let mut command = Command::new(perf);
    command.args(["script", "--no-inline", "--fields", "comm,pid,ip,sym", "--input"]).arg(samples);
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("perf script: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let ours = |pid| pid == std::process::id() || tunnel.contains(&pid) || moves_packets(pid);
    Ok(Stacks::parse(&String::from_utf8_lossy(&output.stdout), ours))
}

fn print(stacks: &Stacks) {
    let share = |count: u64| format!("{:.1}", count as f64 * 100.0 / stacks.total().max(1) as f64);
    let mut table = Table::new(1, &["thread", "% of busy time"]);
    for (thread, count) in stacks.threads().into_iter().take(ROWS) {
        table.row(vec![thread, share(count)]);
    }
    let (samples, foreign) = (stacks.total(), stacks.foreign);
    println!("\n{samples} samples of tunnel, load and softirqs; {foreign} of other processes left out\n");
    print!("{}", table.markdown());
    let mut table = Table::new(2, &["function", "side", "% of busy time"]);
    for (function, count) in stacks.functions().into_iter().take(ROWS) {
        let side = if function.kernel { "kernel" } else { "user" };
        table.row(vec![flame::shortened(&function.name, LETTERS).unwrap_or_default(), side.to_owned(), share(count)]);
    }
    println!("{}", table.markdown());
}
