//! `cargo xtask soak`: traffic, while everything happens to a tunnel at random.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use cipe_tests::gateway;
use cipe_tests::soak::{self, Kind, Settings};

use crate::tools;

/// Lets everything happen to a tunnel at random.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask soak 60                                     for an hour, by a seed that it prints
  cargo xtask soak 5 --seed 7 --only engine-kill,replay   the same events each time, of some kinds only
  cargo xtask soak 10 --other ../old/target/debug/cipe    with a build that takes turns with this one")]
pub(crate) struct Args {
    /// How long new events begin, in minutes, such as 0.5
    minutes: f64,
    /// Decides which events happen, and in which order [default: random]
    #[arg(long)]
    seed: Option<u64>,
    /// Another build of the program, which takes turns with this one [default: the same one]
    #[arg(long, value_name = "PATH")]
    other: Option<PathBuf>,
    /// Only these kinds of events
    #[arg(long, value_delimiter = ',', value_name = "KIND,...", value_parser = Kind::parse)]
    only: Vec<Kind>,
    /// A sealed tunnel, with new keys each 5 s
    #[arg(long)]
    sealed: bool,
}

/// Builds the program and runs the soak.
///
/// # Errors
/// Something cannot be made, or a promise did not hold.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    let duration = Duration::try_from_secs_f64(args.minutes * 60.0)?;
    gateway::use_binary(&tools::build_cipe(false)?)?;
    tools::clean_up_on_signals(|| {})?;
    // Short, so that people can type it.
    let seed = args.seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}");
    let settings =
        Settings { duration, seed, other: args.other.clone(), only: args.only.clone(), is_sealed: args.sealed };
    let result = soak::run(&settings);
    if tools::ending() {
        // A signal removes the network, and the soak fails therefore; the process ends in a moment.
        std::thread::park();
    }
    let report = result?;
    println!("\nseed {seed}, {} events\n\n{report}", report.events());
    ensure!(report.faults() == 0, "{} promises were broken; repeat it with --seed {seed}", report.faults());
    Ok(())
}
