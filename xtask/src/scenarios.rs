//! `cargo xtask scenarios`: several scenarios at the same time, each in a process of its own.

use anyhow::Result;

use crate::tools::{self, SCENARIOS};

/// Run several scenarios at the same time, and print the time of each
#[derive(clap::Args)]
#[command(after_help = "Examples:
  cargo xtask scenarios                          all of them
  cargo xtask scenarios -- 'binary(=tunnel)'     those of a file
  cargo xtask scenarios -- 'test(superframes)'   those with a word in their names")]
pub(crate) struct Args {
    /// Which ones, as filter sets of cargo-nextest; several are joined
    #[arg(last = true)]
    filters: Vec<String>,
}

/// Builds the program and the scenarios, and runs the requested ones by cargo-nextest; .config/nextest.toml sets how many run
/// at the same time, and which ones run alone.
///
/// # Errors
/// A scenario fails, or the program cannot be built.
pub(crate) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    let nextest = tools::NEXTEST.get()?;
    let cipe = tools::build_cipe(false)?;
    tools::outlive_interrupts()?;
    let mut run = std::process::Command::new(nextest);
    run.args(["nextest", "run", "--locked"]).args(SCENARIOS).current_dir(tools::workspace()).env("CIPE_BIN", cipe);
    for filter in &args.filters {
        run.args(["--filterset", filter]);
    }
    let result = tools::check(&mut run);
    // Remove the leftovers of scenarios that were interrupted or took too long.
    cipe_tests::remove_abandoned();
    result
}
