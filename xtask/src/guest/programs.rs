//! Test programs, as cargo builds them.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Result, bail};
use serde::Deserialize;

use crate::tools;

/// Cargo's message about a program that it has built.
#[derive(Deserialize)]
struct Artifact {
    executable: Option<PathBuf>,
    profile: Profile,
    target: Target,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Builds the tests of the packages that `selection` names as to cargo, and returns the name and the path of those in libraries
/// (`kind` "lib") or in files of their own ("test").
///
/// The selection decides the features of packages: with the selection of the ordinary checks cargo uses their build.
///
/// # Errors
/// The build fails.
pub(super) fn build(selection: &[&str], kind: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut build = tools::cargo(&["test", "--no-run", "--message-format=json-render-diagnostics"]);
    let output = build.args(selection).stderr(Stdio::inherit()).output()?;
    if !output.status.success() {
        bail!("{}: {}", tools::text(&build), output.status);
    }
    let artifacts = output.stdout.split(|octet| *octet == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
    let tests = artifacts.filter(|artifact: &Artifact| artifact.profile.test && artifact.target.kind == [kind]);
    Ok(tests.filter_map(|artifact| Some((artifact.target.name, artifact.executable?))).collect())
}
