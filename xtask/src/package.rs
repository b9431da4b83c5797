//! `cargo xtask package`: one folder to copy to a gateway.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::tools;

/// Makes the folder.
#[derive(clap::Args)]
pub struct Args {
    /// Where to; must not be there yet
    #[arg(long, default_value = "target/package")]
    to: PathBuf,
}

/// Builds the binary and puts it there under its three names, with the README.
///
/// # Errors
/// What cargo says, or a folder that is there already.
pub fn run(args: &Args) -> Result<()> {
    let binary = tools::build_cipe(true)?;
    let folder = tools::workspace().join(&args.to);
    if let Some(parent) = folder.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::create_dir(&folder).with_context(|| format!("{}", folder.display()))?;
    fs::copy(&binary, folder.join("cipe"))?;
    for name in ["ciped-cb", "ciped-ci"] {
        symlink("cipe", folder.join(name))?;
    }
    fs::copy(tools::workspace().join("README.md"), folder.join("README.md"))?;
    println!("{}: cipe, ciped-cb, ciped-ci, README.md", folder.display());
    Ok(())
}
