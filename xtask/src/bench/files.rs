//! File arguments of every measurement of tunnels: the measured program, and records.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::tools;

/// The measured program, and the destinations of the figures.
#[derive(clap::Args)]
pub(super) struct Files {
    /// Measure this `cipe` binary instead of building one
    #[arg(long, value_name = "FILE")]
    pub cipe: Option<PathBuf>,
    /// Append each measurement to this file, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Measure nothing: report the measurements in one or more files of --json
    #[arg(long, value_name = "FILE,...", value_delimiter = ',', conflicts_with = "json")]
    pub from: Vec<PathBuf>,
    /// Write the report into docs/BENCHMARKS.md
    #[arg(long)]
    pub write: bool,
}

impl Files {
    /// See [`binary`].
    ///
    /// # Errors
    /// The same.
    pub(super) fn binary(&self) -> Result<PathBuf> {
        binary(self.cipe.as_deref())
    }

    /// The file for records, if one is given.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub(super) fn journal(&self) -> Result<Option<File>> {
        let open = |path: &PathBuf| {
            let file = File::options().create(true).append(true).open(path);
            file.with_context(|| path.display().to_string())
        };
        self.json.as_ref().map(open).transpose()
    }
}

/// The absolute path of the given `cipe` binary, else of one that this builds.
///
/// # Errors
/// cargo fails.
pub(super) fn binary(named: Option<&Path>) -> Result<PathBuf> {
    match named {
        Some(path) => Ok(std::path::absolute(path)?),
        None => {
            println!("Building cipe (release) ...");
            tools::build_cipe(true)
        }
    }
}
