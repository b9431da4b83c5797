//! `cargo xtask package`: one folder to copy to a gateway.

mod glibc;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::tools;

/// Names of the daemons, which are links to the binary.
const DAEMONS: [&str; 4] = ["ciped-cb", "ciped-ci", "ciped-db", "ciped-di"];

/// Makes the folder.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where to; must not be there yet
    #[arg(long, default_value = "target/package")]
    to: PathBuf,
}

/// Builds the binary and copies it there, with links of its names, systemd units, sample scripts, manual pages, completions for
/// shells, the README and the daemons' manual.
///
/// # Errors
/// cargo fails, the folder exists already, or the program needs a newer C library than the oldest Debian has.
pub(crate) fn run(args: &Args) -> Result<()> {
    let binary = tools::build_cipe(true)?;
    if let Some(least) = glibc::least(&fs::read(&binary)?)? {
        println!("{}: glibc {least} or later", binary.display());
        let oldest = glibc::OLDEST;
        ensure!(
            least <= oldest,
            "the program would not start on Debian 12, which has glibc {oldest}: build it on Debian 12"
        );
    }
    let folder = tools::workspace().join(&args.to);
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    fs::copy(&binary, folder.join("cipe"))?;
    for name in std::iter::once("ciped").chain(DAEMONS) {
        symlink("cipe", folder.join(name))?;
    }
    for document in ["README.md", "docs/ciped.md"] {
        let from = tools::workspace().join(document);
        fs::copy(&from, folder.join(from.file_name().unwrap_or_default()))?;
    }
    for name in ["systemd", "scripts"] {
        let to = folder.join(name);
        fs::create_dir(&to)?;
        for file in fs::read_dir(tools::workspace().join("dist").join(name))? {
            let file = file?;
            fs::copy(file.path(), to.join(file.file_name()))?;
        }
    }
    let manuals = folder.join("man8");
    fs::create_dir(&manuals)?;
    tools::check(Command::new(&binary).arg("manuals").arg(&manuals))?;
    let completions = folder.join("completions");
    fs::create_dir(&completions)?;
    for shell in ["bash", "zsh", "fish"] {
        for daemon in std::iter::once(None).chain(DAEMONS.map(Some)) {
            let script = fs::File::create(completions.join(format!("{}.{shell}", daemon.unwrap_or("cipe"))))?;
            let choice = daemon.into_iter().flat_map(|daemon| ["--program", daemon]);
            tools::check(Command::new(&binary).arg("completions").args(choice).arg(shell).stdout(script))?;
        }
    }
    let names = DAEMONS.join(", ");
    println!(
        "{}: cipe, ciped, {names}, systemd/, scripts/, man8/, completions/, README.md, ciped.md",
        folder.display()
    );
    Ok(())
}
