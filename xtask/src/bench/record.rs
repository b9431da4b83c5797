//! One measurement, and a collection of measurements.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cipe_tests::offload;
use serde::{Deserialize, Serialize};

use super::tunnel::Tunnel;

/// The hosts at both ends of the load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Topology {
    /// From gateway to gateway, load and tunnel in one host
    P2p,
    /// From LAN to LAN, forwarded by the gateways
    Gw,
}

impl Topology {
    /// Its name in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::P2p => "p2p",
            Self::Gw => "gw",
        }
    }

    /// Description for headings.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::P2p => "gateway to gateway",
            Self::Gw => "LAN to LAN",
        }
    }
}

/// Offloads of the network devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Offloads {
    /// None: every packet on every wire is whole and finished, as a plain network card delivers it
    Raw,
    /// The defaults of veth: links carry superframes and unfinished checksums
    On,
}

impl Offloads {
    /// Its name in results.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::On => "on",
        }
    }

    /// The same, for the bed.
    pub(super) fn of_bed(self) -> offload::Offload {
        match self {
            Self::Raw => offload::Offload::Raw,
            Self::On => offload::Offload::On,
        }
    }
}

macro_rules! metrics {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $unit:literal;)*) => {
        /// A measured quantity, by its name in results.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub(super) enum Metric {
            $($(#[$doc])* #[serde(rename = $name)] $variant,)*
        }

        impl Metric {
            /// Its name in results.
            pub(super) fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Unit of its values.
            pub(super) fn unit(self) -> &'static str {
                match self {
                    $(Self::$variant => $unit,)*
                }
            }
        }
    };
}

metrics! {
    /// Goodput of one TCP stream, with a ping every 10 ms at the same time.
    Tcp1 = "tcp-1", "Mbit/s";
    /// Goodput of four TCP streams.
    Tcp4 = "tcp-4", "Mbit/s";
    /// Highest rate of datagrams of 64 octets that loses at most one in 1000.
    Udp64 = "udp-64", "packets/s";
    /// Rate that arrives when they flood the tunnel.
    Udp64Flood = "udp-64-flood", "packets/s";
    /// Highest rate of datagrams of 1400 octets that loses at most one in 1000.
    Udp1400 = "udp-1400", "packets/s";
    /// Rate that arrives when they flood the tunnel.
    Udp1400Flood = "udp-1400-flood", "packets/s";
    /// Median round trip on an idle tunnel.
    PingIdle = "ping-idle-median", "us";
    /// 99th percentile of the same.
    PingIdleP99 = "ping-idle-p99", "us";
    /// Median round trip during one TCP stream.
    PingLoad = "ping-load-median", "us";
    /// 99th percentile of the same.
    PingLoadP99 = "ping-load-p99", "us";
    /// CPU time of the tunnel's processes in user mode, a GB of one TCP stream.
    CpuUser = "cpu-user", "s/GB";
    /// The same in the kernel, including softirq work during their system calls.
    CpuSystem = "cpu-system", "s/GB";
    /// Both together.
    CpuTunnel = "cpu-tunnel", "s/GB";
    /// Softirq and interrupt time of the whole machine.
    CpuSoftirq = "cpu-softirq", "s/GB";
    /// All CPU time of the machine: both ends, the load, and the kernel.
    CpuMachine = "cpu-machine", "s/GB";
    /// CPU time of an idle tunnel's busiest end.
    CpuIdle = "cpu-idle", "% of a core";
    /// Peak resident memory of the larger end, after all tests.
    Memory = "memory", "MiB";
    /// CPU time of unrelated processes during a test.
    Foreign = "foreign-cpu", "% of the machine";
}

/// One measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Record {
    /// The tunnel.
    pub tunnel: Tunnel,
    /// The hosts at both ends of the load.
    pub topology: Topology,
    /// The offloads.
    pub offloads: Offloads,
    /// The quantity.
    pub test: Metric,
    /// Number of the round, from 1.
    pub round: usize,
    /// The value, in `unit`.
    pub value: f64,
    /// Unit of the value.
    pub unit: String,
}

/// Values of one quantity in several rounds, sorted.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series(Vec<f64>);

impl Series {
    /// Of at least one value.
    pub(super) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The median: the middle value, or the mean of the two in the middle.
    pub(super) fn median(&self) -> f64 {
        let values = &self.0;
        (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
    }

    /// The smallest.
    pub(super) fn min(&self) -> f64 {
        self.0[0]
    }

    /// The largest.
    pub(super) fn max(&self) -> f64 {
        self.0[self.0.len() - 1]
    }

    /// The same times `factor`.
    pub(super) fn scaled(&self, factor: f64) -> Self {
        Self(self.0.iter().map(|value| value * factor).collect())
    }

    /// Number of rounds.
    pub(super) fn rounds(&self) -> usize {
        self.0.len()
    }
}

/// All measurements of a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Results {
    /// Never an empty series.
    series: BTreeMap<(Offloads, Topology, Metric, Tunnel), Vec<f64>>,
}

impl Results {
    /// Adds one.
    pub(super) fn add(&mut self, record: &Record) {
        let key = (record.offloads, record.topology, record.test, record.tunnel);
        self.series.entry(key).or_default().push(record.value);
    }

    /// Adds the records of a `--json` file: one object on each line.
    ///
    /// # Errors
    /// A line is not a measurement.
    pub(super) fn read(&mut self, path: &Path) -> Result<()> {
        let text = fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
        for (number, line) in text.lines().enumerate() {
            let record = serde_json::from_str(line).with_context(|| format!("{}:{}", path.display(), number + 1))?;
            self.add(&record);
        }
        Ok(())
    }

    /// Values of a quantity of a tunnel.
    pub(super) fn get(&self, offloads: Offloads, topology: Topology, metric: Metric, tunnel: Tunnel) -> Option<Series> {
        let values = self.series.get(&(offloads, topology, metric, tunnel))?;
        Some(Series::new(values.clone()))
    }

    /// Measured tunnels, in the order of the tables.
    pub(super) fn tunnels(&self) -> Vec<Tunnel> {
        let is_there = |tunnel: &Tunnel| self.series.keys().any(|(.., measured)| measured == tunnel);
        Tunnel::all().iter().copied().filter(is_there).collect()
    }

    /// Measured offload modes.
    pub(super) fn offloads(&self) -> Vec<Offloads> {
        let is_there = |wanted: &Offloads| self.series.keys().any(|(offloads, ..)| offloads == wanted);
        [Offloads::Raw, Offloads::On].into_iter().filter(is_there).collect()
    }

    /// Measured topologies.
    pub(super) fn topologies(&self) -> Vec<Topology> {
        let is_there = |wanted: &Topology| self.series.keys().any(|(_, topology, ..)| topology == wanted);
        [Topology::P2p, Topology::Gw].into_iter().filter(is_there).collect()
    }

    /// Most rounds of any series.
    pub(super) fn rounds(&self) -> usize {
        // Every test records the CPU time of unrelated processes.
        let series = self.series.iter().filter(|((_, _, metric, _), _)| *metric != Metric::Foreign);
        series.map(|(_, values)| values.len()).max().unwrap_or_default()
    }

    /// Whether there are no measurements.
    pub(super) fn is_empty(&self) -> bool {
        self.series.is_empty()
    }

    /// The largest value of a metric, over everything.
    pub(super) fn largest(&self, metric: Metric) -> Option<f64> {
        let values = self.series.iter().filter(|((_, _, measured, _), _)| *measured == metric).flat_map(|(_, v)| v);
        values.copied().max_by(f64::total_cmp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(round: usize, value: f64) -> Record {
        let (topology, offloads, test) = (Topology::Gw, Offloads::Raw, Metric::Tcp1);
        Record { tunnel: Tunnel::Gotatun, topology, offloads, test, round, value, unit: test.unit().to_owned() }
    }

    #[test]
    fn a_measurement_is_one_object_with_the_fields_of_the_manual() {
        let text = serde_json::to_string(&record(2, 1610.5)).expect("JSON");
        assert_eq!(
            text,
            r#"{"tunnel":"gotatun","topology":"gw","offloads":"raw","test":"tcp-1","round":2,"value":1610.5,"unit":"Mbit/s"}"#
        );
        assert_eq!(serde_json::from_str::<Record>(&text).expect("the same"), record(2, 1610.5));
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle() {
        let mut results = Results::default();
        for (round, value) in [(1, 9.0), (2, 1.0), (3, 4.0), (4, 2.0)] {
            results.add(&record(round, value));
        }
        let series = results.get(Offloads::Raw, Topology::Gw, Metric::Tcp1, Tunnel::Gotatun).expect("four");
        assert_eq!((series.median(), series.min(), series.max(), series.rounds()), (3.0, 1.0, 9.0, 4));
        assert_eq!(results.tunnels(), [Tunnel::Gotatun]);
        assert!(results.get(Offloads::On, Topology::Gw, Metric::Tcp1, Tunnel::Gotatun).is_none());
    }
}
