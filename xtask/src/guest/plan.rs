//! The programs for a guest, in a file that it reads; and its reports, in lines of a serial port.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Begins a line that is a [`Record`]; all other lines are output of the programs.
pub(crate) const MARK: char = '\u{1e}';

/// Programs for a guest to run, one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The programs.
    pub steps: Vec<Step>,
}

/// A program to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Step {
    /// Its name in tables.
    pub name: String,
    /// Path of the program, the same on the host and in the guest.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its working directory.
    pub folder: PathBuf,
    /// Its environment variables.
    pub environment: Vec<(String, String)>,
    /// Time limit in seconds.
    pub deadline: u64,
}

/// A report of a guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Record {
    /// The guest is up; the kernel's release.
    Up(String),
    /// A step begins.
    Begin(String),
    /// A step has ended: its exit code (`None`: a signal, or its deadline), and its duration in seconds.
    End(Option<i32>, f64),
    /// It is alive.
    Alive,
    /// The plan is done.
    Done,
}
