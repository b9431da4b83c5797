//! Checks the dependencies of the workspace: all are used, have suitable licences, and are from the registry. It does not check
//! cipe-ebpf, which has its own lock file.

use std::process::Command;

use anyhow::Result;

use crate::tools;

/// Look for dependencies that are unused, or whose licence or source does not fit
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs cargo-machete over all crates, and cargo-deny by deny.toml. It does not check advisories, since their list is not in a
/// registry of packages.
///
/// # Errors
/// The tools found a fault, or a tool cannot be installed.
pub(crate) fn run(_: &Args) -> Result<()> {
    let machete = tools::MACHETE.get()?;
    let deny = tools::DENY.get()?;
    // Not by `cargo machete`: under another cargo command it takes its own name for a folder.
    tools::check(Command::new(machete).current_dir(tools::workspace()))?;
    let mut deny = Command::new(deny);
    deny.args(["--all-features", "check", "bans", "licenses", "sources"]).current_dir(tools::workspace());
    tools::check(&mut deny)
}
