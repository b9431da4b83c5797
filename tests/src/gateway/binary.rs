//! Which `cipe` binary is tested.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

static BINARY: OnceLock<std::result::Result<PathBuf, String>> = OnceLock::new();

/// Uses this `cipe` binary from now on; has no effect once one is in use.
///
/// # Errors
/// There is no file at the path.
pub fn use_binary(path: &Path) -> Result<()> {
    let path = fs::canonicalize(path).with_context(|| format!("{}", path.display()))?;
    BINARY.get_or_init(|| Ok(path));
    Ok(())
}

/// The `cipe` binary in use: by default `CIPE_BIN`, or the one of this program's own build, which is built first if cargo runs
/// us.
///
/// # Errors
/// A build that fails, or no binary.
pub fn binary() -> Result<&'static Path> {
    let found = BINARY.get_or_init(|| find_binary().map_err(|error| format!("{error:#}")));
    found.as_deref().map_err(|error| anyhow!("{error}"))
}

fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("CIPE_BIN") {
        return fs::canonicalize(&path).with_context(|| format!("CIPE_BIN={}", path.display()));
    }
    let this = std::env::current_exe()?;
    // A test is in target/PROFILE/deps, a program in target/PROFILE.
    let profile =
        this.ancestors().skip(1).find(|dir| !dir.ends_with("deps")).context("a program stands in a folder")?;
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", "cipe-user", "--bin", "cipe"]);
        if profile.ends_with("release") {
            build.arg("--release");
        }
        if !build.status()?.success() {
            bail!("cargo build --package cipe-user --bin cipe failed");
        }
    }
    let path = profile.join("cipe");
    fs::canonicalize(&path).with_context(|| format!("{}: build it or set CIPE_BIN", path.display()))
}
