//! `cargo xtask fuzz`: every target of `cipe-user/fuzz`, each for a while.

use anyhow::{Context, Result, bail};
use std::process::Command;

use crate::tools;

/// Runs the fuzz targets.
#[derive(clap::Args)]
pub struct Args {
    /// Targets to run; all of them if none is named
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
}

/// Runs `cargo fuzz run TARGET` for each target; stops at the first finding.
///
/// # Errors
/// What is missing and how to get it, or the target that found something.
pub fn run(args: &Args) -> Result<()> {
    let folder = tools::workspace().join("cipe-user/fuzz/fuzz_targets");
    let mut targets = args.targets.clone();
    if targets.is_empty() {
        let entries = std::fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))?;
        let names = entries.flatten().filter_map(|entry| Some(entry.path().file_stem()?.to_str()?.to_owned()));
        targets.extend(names);
        targets.sort();
    }
    let available = tools::cargo(&["fuzz", "--version"]).output().is_ok_and(|output| output.status.success());
    if !available {
        bail!("cargo-fuzz is missing; type: cargo install cargo-fuzz (and rustup toolchain install nightly)");
    }
    for target in &targets {
        let limit = format!("-max_total_time={}", args.seconds);
        // Not `cargo +nightly`: it is the cargo of a toolchain that runs this, which does not know the others.
        let mut fuzz = Command::new("rustup");
        fuzz.args(["run", "nightly", "cargo", "fuzz", "run", target, "--", &limit]);
        tools::check(fuzz.current_dir(tools::workspace().join("cipe-user")))?;
    }
    Ok(())
}
