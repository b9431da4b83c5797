//! What a daemon or an engine could leave in its namespace and in its run directory.

use std::path::Path;

use anyhow::Result;

use crate::namespace::Namespace;

/// Traces that a daemon could leave.
#[derive(Clone, Debug, PartialEq)]
pub struct Traces {
    /// Names of the network devices.
    pub links: Vec<String>,
    /// Addresses, as `ip -brief` prints them.
    pub addresses: String,
    /// Routes of all tables.
    pub routes: String,
    /// Neighbours of devices other than the LAN's and the carrier's.
    pub neighbours: String,
    /// Processes in the namespace.
    pub processes: Vec<u32>,
    /// Names in the run directory.
    pub files: Vec<String>,
}

impl Traces {
    /// Those that are there now.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn of(namespace: &Namespace, run_directory: &Path) -> Result<Self> {
        // Neighbours come and go with the carrier's traffic; only devices that should be gone count.
        let neighbours = namespace.ip(&["neigh", "show"])?;
        let neighbours = neighbours.lines().filter(|line| !line.contains("wire0") && !line.contains("lan0"));
        Ok(Self {
            links: namespace.devices()?,
            addresses: namespace.ip(&["-brief", "addr", "show"])?,
            routes: namespace.ip(&["route", "show", "table", "all"])?,
            neighbours: neighbours.collect(),
            processes: namespace.processes()?,
            files: match std::fs::read_dir(run_directory) {
                Ok(entries) => entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect(),
                Err(_) => Vec::new(),
            },
        })
    }
}
