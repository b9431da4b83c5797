//! What the workspace depends on: only what it uses, under licences that fit, from the registry. cipe-ebpf has a lock file of its own and
//! is not looked at.

use std::process::Command;

use anyhow::Result;

use crate::tools;

/// Look for dependencies that are unused, or whose licence or source does not fit
#[derive(clap::Args)]
pub struct Args {}

/// Runs cargo-machete over all crates, and cargo-deny by deny.toml. Its list of advisories is not in a registry of packages, and is
/// not asked.
///
/// # Errors
/// What they found, or a tool that cannot be installed.
pub fn run(_: &Args) -> Result<()> {
    let machete = tools::MACHETE.get()?;
    let deny = tools::DENY.get()?;
    // Not by `cargo machete`, which takes its own name for a folder where a cargo command runs above it.
    tools::check(Command::new(machete).current_dir(tools::workspace()))?;
    let mut deny = Command::new(deny);
    deny.args(["--all-features", "check", "bans", "licenses", "sources"]).current_dir(tools::workspace());
    tools::check(&mut deny)
}
