//! Memory of engines, and memory of the kernel for them.

use std::fs;

use anyhow::{Context, Result};

/// Octets at one moment, or between two, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Memory {
    /// Resident memory of the engines.
    pub engine: f64,
    /// Memory that the kernel uses: slabs, per-CPU areas, page tables and large allocations, including sockets of the bench.
    pub kernel: f64,
}

impl Memory {
    /// Now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(super) fn now(engines: &[u32]) -> Result<Self> {
        let mut engine = 0.0;
        for pid in engines {
            engine += field(&fs::read_to_string(format!("/proc/{pid}/status"))?, "VmRSS").context("VmRSS")?;
        }
        let text = fs::read_to_string("/proc/meminfo")?;
        // Reclaimable memory does not count: file names and inodes of past builds come and go.
        let kernel = ["SUnreclaim", "Percpu", "PageTables", "KernelStack", "VmallocUsed"];
        let kernel = kernel.into_iter().filter_map(|name| field(&text, name)).sum();
        Ok(Self { engine, kernel })
    }

    /// The increase since `before`.
    pub(super) fn since(self, before: Self) -> Self {
        Self { engine: self.engine - before.engine, kernel: self.kernel - before.kernel }
    }
}

/// A line `name:   value kB`.
fn field(text: &str, name: &str) -> Option<f64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    value.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "VmRSSx:\t7 kB\nVmRSS:\t  1234 kB\n";
        assert_eq!(field(text, "VmRSS"), Some(1234.0));
        assert_eq!(field(text, "VmHWM"), None);
    }
}
