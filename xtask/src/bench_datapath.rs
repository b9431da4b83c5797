//! `cargo xtask bench datapath`: the cost of a packet in the datapath alone, in nanoseconds and instructions.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::tools;

/// Measure the datapath without kernel and network: nanoseconds and instructions a packet
#[derive(clap::Args, Debug)]
pub(crate) struct BenchDatapath {
    /// Rounds of a batch for each figure of nanoseconds; the fastest counts
    #[arg(long, default_value_t = 2000)]
    rounds: usize,
    /// Do not count instructions, which needs valgrind and takes a minute
    #[arg(long)]
    no_instructions: bool,
}

/// Rounds under callgrind, whose count is the same in each.
const COUNTED_ROUNDS: &str = "4";

/// Kernels that valgrind can run, since it does not support AVX-512; on other CPUs the scalar ones.
const KERNELS: [(&str, &str); 2] = [("CIPE_BLOWFISH", "gather"), ("CIPE_IDEA", "avx2")];

/// Builds the example, runs it, and prints a table.
///
/// # Errors
/// The example does not build or run, or a program is missing.
pub(crate) fn run(args: &BenchDatapath) -> Result<()> {
    let build = ["build", "--release", "--package", "cipe-user", "--features", "harness", "--example", "datapath"];
    tools::check(&mut tools::cargo(&build))?;
    let example = tools::target().join("release/examples/datapath");
    let output = Command::new(&example).arg(args.rounds.to_string()).output().context("the example")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let cases = cases(&String::from_utf8_lossy(&output.stdout))?;
    let names = KERNELS.map(|(_, kernel)| kernel).join(" and ");
    println!("{:<4} {:<9} {:<12} {:>9} {:>22}", "", "cipher", "traffic", "ns", "instructions");
    for case in cases {
        let instructions = match args.no_instructions {
            true => "not counted".to_owned(),
            false => format!("{:.0}", instructions(&example, &case)?),
        };
        let Case { direction, cipher, traffic, nanoseconds, .. } = case;
        println!("{direction:<4} {cipher:<9} {traffic:<12} {nanoseconds:>9.1} {instructions:>22}");
    }
    println!("For each packet of a batch of 128, or of three superframes. Instructions: with the kernels {names}.");
    Ok(())
}

/// One line of the example.
struct Case {
    direction: String,
    cipher: String,
    traffic: String,
    packets: f64,
    nanoseconds: f64,
}

fn cases(lines: &str) -> Result<Vec<Case>> {
    let case = |line: &str| {
        let mut words = line.split_whitespace().map(str::to_owned);
        let mut next = || words.next().with_context(|| format!("the example prints `{line}`"));
        let (direction, cipher, traffic) = (next()?, next()?, next()?);
        Ok(Case { direction, cipher, traffic, packets: next()?.parse()?, nanoseconds: next()?.parse()? })
    };
    lines.lines().map(case).collect()
}

/// Instructions a packet of one case, in the measured functions.
fn instructions(example: &std::path::Path, case: &Case) -> Result<f64> {
    let function = if case.direction == "out" { "datapath::seal" } else { "datapath::open" };
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--collect-atstart=no"]);
    valgrind.arg(format!("--toggle-collect={function}")).arg(example);
    valgrind.args([COUNTED_ROUNDS, &case.direction, &case.cipher, &case.traffic]).envs(KERNELS);
    let output = valgrind.output().context("valgrind is missing: apt-get install valgrind")?;
    let (lines, log) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{}: {log}", tools::text(&valgrind));
    let counted = cases(&lines)?;
    let packets = counted.first().context("the example prints nothing")?.packets;
    let collected = log.lines().find_map(|line| line.split_once("Collected :")).context("callgrind counts nothing")?;
    Ok(collected.1.trim().parse::<f64>()? / packets)
}
