//! `cargo xtask test`: every check that the project has, and a summary.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::guest::Shape;
use crate::guest::scenarios::{self, Kernels, Which};
use crate::tools::UNIT_TESTS;
use crate::{build_ebpf, tools};

/// Runs every check.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only the steps whose name contains one of these; with --kernel: files of scenarios, or FILE::PART for the tests whose
    /// names contain PART
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Run the scenarios on another kernel, in qemu: the latest of a line, such as 6.12; newest; all
    #[arg(long)]
    kernel: Option<Kernels>,
    /// With --kernel: only test that each program of the eBPF object loads, and that the kernel lacks later features
    #[arg(long, requires = "kernel", conflicts_with = "only")]
    loads: bool,
    /// With --kernel: number of kernels that run at the same time; with more than one, give each guest one CPU (--cpus 1)
    #[arg(long, requires = "kernel", default_value_t = 1)]
    at_once: usize,
    #[command(flatten)]
    shape: Shape,
}

const EBPF: &str = "ebpf";

/// Includes the fuzz targets, which no other step builds.
const LINTS: &[&str] = &[
    "clippy",
    "--locked",
    "--workspace",
    "--all-targets",
    "--features",
    "cipe-fuzz/libfuzzer",
    "--",
    "-D",
    "warnings",
];

/// The kernels on which the object must load. The oldest and the newest are not enough: a kernel between them may refuse a
/// program that both accept.
const LOAD_KERNELS: &str = "all";

/// The oldest and the newest kernel, on which the checks run [`SHORT_LIST`].
const OLDEST_AND_NEWEST: &str = "6.1,newest";

/// Scenarios that show whether tunnels work on a kernel at all; together they take at most five minutes by emulation.
const SHORT_LIST: &str = "bed::superframes,bed::without,tunnel::by_udp_sockets,tunnel::native_xdp,tunnel::sees_nothing,wrong_key::blowfish,\
                          bad_input,renewal::outlives,coalesced::tcp";

/// The seed of a soak of a minute: the same events each time.
const SOAK_SEED: &str = "1";

/// Two guests at the same time, with one CPU each: emulated CPUs of one guest wait for each other, and may run stale code that
/// another CPU changes.
const GUESTS: &[&str] = &["--at-once", "2", "--cpus", "1", "--memory", "2048"];

struct Step {
    name: &'static str,
    command: Command,
}

/// Runs the steps one after the other, all of them even if one fails.
///
/// # Errors
/// The names of the steps that failed.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    if let Some(kernels) = &args.kernel {
        let which = match &args.only[..] {
            _ if args.loads => Which::Loads,
            [] => Which::All,
            only => Which::Only(only),
        };
        return scenarios::run(kernels, which, &args.shape, args.at_once);
    }
    let mut steps = steps()?;
    if !args.only.is_empty() {
        steps.retain(|step| args.only.iter().any(|only| step.name.contains(only.as_str())));
        if steps.is_empty() {
            bail!("no step is called {}", args.only.join(", "));
        }
    }
    let mut results: Vec<(&str, bool, Duration)> = Vec::new();
    let mut fresh = None;
    for step in &mut steps {
        if let Some(object) = &fresh {
            step.command.env("CIPE_BPF_OBJECT", object);
        }
        println!("\n==> {}: {}", step.name, tools::text(&step.command));
        let start = Instant::now();
        let passed = match tools::check(&mut step.command) {
            Ok(()) => true,
            Err(error) => {
                eprintln!("{error:#}");
                false
            }
        };
        if passed && step.name == EBPF {
            // The committed object must match its sources; all later steps use the fresh one.
            fresh = Some(tools::workspace().join(build_ebpf::FRESH));
        }
        results.push((step.name, passed, start.elapsed()));
    }
    println!("\n==> summary");
    for (name, passed, took) in &results {
        println!("{:<14} {:<6} {:>6.1} s", name, if *passed { "ok" } else { "FAILED" }, took.as_secs_f64());
    }
    let failed: Vec<&str> = results.iter().filter(|(_, passed, _)| !passed).map(|(name, ..)| *name).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn steps() -> Result<Vec<Step>> {
    let step = |name, command| Step { name, command };
    let mut ebpf = Command::new(std::env::current_exe()?);
    ebpf.args(["build-ebpf", "--install", "--check"]).current_dir(tools::workspace());
    let mut dependencies = Command::new(std::env::current_exe()?);
    dependencies.arg("dependencies").current_dir(tools::workspace());
    let mut documentation = tools::cargo(&["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    documentation.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private-intra-doc-links");
    let mut scenarios = Command::new(std::env::current_exe()?);
    scenarios.arg("scenarios").current_dir(tools::workspace());
    let mut soak = Command::new(std::env::current_exe()?);
    soak.args(["soak", "1", "--seed", SOAK_SEED]).current_dir(tools::workspace());
    let guests = |kernels, what: &[&str]| -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["test", "--kernel", kernels]).args(what).args(GUESTS).current_dir(tools::workspace());
        Ok(command)
    };
    Ok(vec![
        step("format", tools::cargo(&["fmt", "--all", "--check"])),
        step(EBPF, ebpf),
        step("lints", tools::cargo(LINTS)),
        step("dependencies", dependencies),
        step("unit tests", tools::cargo(&[&["test", "--locked"], UNIT_TESTS, &["--no-fail-fast"]].concat())),
        step("scenarios", scenarios),
        step("soak", soak),
        step("loads", guests(LOAD_KERNELS, &["--loads"])?),
        step("kernels", guests(OLDEST_AND_NEWEST, &["--only", SHORT_LIST])?),
        step("documentation", documentation),
    ])
}
