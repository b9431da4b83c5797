//! What a guest shall run, in a file that it reads; and what it tells, in lines of a serial port.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Begins a line that is a [`Record`]; all other lines are output of the programs.
pub const MARK: char = '\u{1e}';

/// What a guest shall run, one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The programs.
    pub steps: Vec<Step>,
}

/// A program to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// What it is called in tables.
    pub name: String,
    /// The program, as the host and the guest see it.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Where it runs.
    pub folder: PathBuf,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// Seconds after which it is ended.
    pub deadline: u64,
}

/// What a guest tells.
#[derive(Debug, Serialize, Deserialize)]
pub enum Record {
    /// It is up; the kernel's release.
    Up(String),
    /// A step begins.
    Begin(String),
    /// A step is over: its exit code (`None`: a signal, or its deadline), and the seconds that it took.
    End(Option<i32>, f64),
    /// It is alive.
    Alive,
    /// All is done.
    Done,
}
