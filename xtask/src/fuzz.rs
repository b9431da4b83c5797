//! `cargo xtask fuzz`: every target of `cipe-user/fuzz`, each for a while.

use anyhow::{Context, Result, bail};
use std::process::Command;

use crate::tools;

/// Runs the fuzz targets, each for a while.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Targets to run; all of them if none is named
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Inputs for each target, if they are tried before the time is over
    #[arg(long)]
    inputs: Option<u64>,
    /// Add to cipe-user/fuzz/corpus the inputs that reach new code
    #[arg(long)]
    keep: bool,
}

/// Most octets of an input: a few packets, and short enough to read.
const LARGEST_INPUT: &str = "-max_len=4096";

/// Runs each target, starting with the inputs in the tree; useful new inputs go to `target/fuzz`. Stops at the first finding.
///
/// # Errors
/// A program is missing (with how to get it), or a target found a fault.
pub(crate) fn run(args: &Args) -> Result<()> {
    let crate_folder = tools::workspace().join("cipe-user/fuzz");
    let mut targets = args.targets.clone();
    if targets.is_empty() {
        let folder = crate_folder.join("fuzz_targets");
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
        let (kept, found) = (crate_folder.join("corpus").join(target), tools::target().join("fuzz").join(target));
        for folder in [&kept, &found] {
            std::fs::create_dir_all(folder).with_context(|| format!("{}", folder.display()))?;
        }
        // libFuzzer writes to the first folder.
        tools::check(
            fuzz(target)
                .args([&found, &kept])
                .args(["--", LARGEST_INPUT])
                .arg(format!("-max_total_time={}", args.seconds))
                .args(args.inputs.map(|inputs| format!("-runs={inputs}"))),
        )?;
        if args.keep {
            tools::check(fuzz(target).args([&kept, &found]).args(["--", LARGEST_INPUT, "-merge=1"]))?;
        }
    }
    Ok(())
}

/// `cargo fuzz run TARGET`. Not `cargo +nightly`: the cargo that runs this program belongs to one toolchain and does not know
/// the others.
fn fuzz(target: &str) -> Command {
    let mut command = Command::new("rustup");
    command.args(["run", "nightly", "cargo", "fuzz", "run", "--features", "link", target]);
    command.current_dir(tools::workspace().join("cipe-user"));
    command
}
