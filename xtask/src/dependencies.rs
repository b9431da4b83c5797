//! What the workspace depends on: only what it uses, under licences that fit, from the registry. cipe-ebpf has a lock file of its own and
//! is not looked at.

use std::process::Command;

use anyhow::Result;

use crate::tools;

/// Look for dependencies that are unused, or whose licence or source does not fit
#[derive(clap::Args)]
pub struct Args {}

/// Tools that are installed under the target folder, and their versions: a newer one may find more, in a commit of its own.
const TOOLS: [(&str, &str); 2] = [("cargo-machete", "0.9.2"), ("cargo-deny", "0.20.2")];

/// Runs cargo-machete over all crates, and cargo-deny by deny.toml. Its list of advisories is not in a registry of packages, and is
/// not asked.
///
/// # Errors
/// What they found, or a tool that cannot be installed.
pub fn run(_: &Args) -> Result<()> {
    let root = tools::target().join("tools");
    for (name, version) in TOOLS {
        let installed = Command::new(root.join("bin").join(name)).arg("--version").output();
        if installed.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains(version)) {
            continue;
        }
        let mut install = tools::cargo(&["install", "--locked", "--quiet", "--version", version, "--root"]);
        // A target folder of its own: a build folder in the environment would be filled with what nobody needs again.
        install.arg(&root).arg(name).env_remove("CARGO_TARGET_DIR");
        println!("installing {name} {version}");
        tools::check(&mut install)?;
    }
    // Not by `cargo machete`, which takes its own name for a folder where a cargo command runs above it.
    tools::check(Command::new(root.join("bin/cargo-machete")).current_dir(tools::workspace()))?;
    let mut deny = Command::new(root.join("bin/cargo-deny"));
    deny.args(["--all-features", "check", "bans", "licenses", "sources"]).current_dir(tools::workspace());
    tools::check(&mut deny)
}
