//! The report: tables and goals for the terminal, and the same with plots for docs/BENCHMARKS.md.

mod document;
mod goals;
mod plot;
mod table;

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

use super::install;
use super::record::{Metric, Offloads, Results, Series, Topology};
use super::tunnel::{INNER_MTU, Tunnel};
use crate::tools;
use plot::{Best, Panel, Plot};
pub(super) use table::Table;

/// The document, and the folder of its plots.
const DOCUMENT: &str = "docs/BENCHMARKS.md";
const PLOTS: &str = "docs/bench";

/// Share of CPU time of other processes, in percent, above which the report warns.
const MAX_FOREIGN_CPU_PERCENT: f64 = 5.0;

/// A number with at least three significant digits.
pub(super) fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Prints the report and, if asked to, writes it into the document, with plots.
///
/// # Errors
/// A file cannot be written.
pub(super) fn report(results: &Results, compare: Tunnel, write: bool) -> Result<()> {
    let report = Report { results, compare };
    println!("\n{}", report.text(false)?);
    if write {
        fs::create_dir_all(tools::workspace().join(PLOTS))?;
        for (name, plot) in report.plots() {
            let path = tools::workspace().join(PLOTS).join(name);
            fs::write(&path, plot.svg()).with_context(|| format!("{}", path.display()))?;
        }
        document::replace(&tools::workspace().join(DOCUMENT), "cargo xtask bench", &report.text(true)?)?;
        println!("written: {DOCUMENT} and {PLOTS}/*.svg");
    }
    Ok(())
}

/// Writes `text` into the document, as the section of `command`.
///
/// # Errors
/// The document cannot be written.
pub(super) fn replace_section(command: &str, text: &str) -> Result<()> {
    document::replace(&tools::workspace().join(DOCUMENT), command, text)?;
    println!("written: {DOCUMENT}");
    Ok(())
}

struct Report<'a> {
    results: &'a Results,
    compare: Tunnel,
}

/// A column of a table.
struct Column {
    topology: Topology,
    metric: Metric,
    title: &'static str,
    /// Whether the ratio to the reference tunnel follows in the next column.
    ratio: bool,
}

/// A table of one offload mode.
struct Section {
    title: &'static str,
    /// Text above the table.
    note: &'static str,
    /// Part of the plot's file name.
    plot: &'static str,
    /// Divisor of the values.
    scale: f64,
    columns: &'static [(Metric, &'static str, bool)],
    /// Metric of the plot, its title, and which values are good.
    plotted: (Metric, &'static str, Best),
}

const SECTIONS: &[Section] = &[
    Section {
        title: "TCP, Mbit/s of goodput",
        note: "",
        plot: "tcp",
        scale: 1.0,
        columns: &[(Metric::Tcp1, "1 stream", true), (Metric::Tcp4, "4 streams", true)],
        plotted: (Metric::Tcp1, "TCP goodput of one stream, Mbit/s; more is better", Best::Highest),
    },
    Section {
        title: "UDP, thousand packets/s",
        note: "The highest rate that loses at most one datagram in 1000 (payload of 64 and of 1400 octets, one datagram a \
               packet), and the rate that arrives of a flood.",
        plot: "udp",
        scale: 1000.0,
        columns: &[
            (Metric::Udp64, "64", true),
            (Metric::Udp1400, "1400", true),
            (Metric::Udp64Flood, "64, flood", false),
            (Metric::Udp1400Flood, "1400, flood", false),
        ],
        plotted: (Metric::Udp1400, "1400 octets without loss, thousand packets/s; more is better", Best::Highest),
    },
    Section {
        title: "Round trip, µs",
        note: "`load`: during one TCP stream in the same direction.",
        plot: "ping",
        scale: 1.0,
        columns: &[
            (Metric::PingIdle, "idle", true),
            (Metric::PingIdleP99, "idle, p99", false),
            (Metric::PingLoad, "load", false),
            (Metric::PingLoadP99, "load, p99", true),
        ],
        plotted: (
            Metric::PingIdle,
            "Median on an idle tunnel, µs, logarithmic; less is better",
            Best::LowestLogarithmic,
        ),
    },
    Section {
        title: "CPU seconds per GB of one TCP stream",
        note: "User and system are those of the tunnel's processes at both ends (`/proc/PID/stat`), including softirq work during \
               their system calls. Softirq and machine are of the whole machine (`/proc/stat`), including the load and \
               both kernels.",
        plot: "cpu",
        scale: 1.0,
        columns: &[
            (Metric::CpuUser, "user", false),
            (Metric::CpuSystem, "system", false),
            (Metric::CpuTunnel, "both", true),
            (Metric::CpuSoftirq, "softirq", false),
            (Metric::CpuMachine, "machine", true),
        ],
        plotted: (Metric::CpuMachine, "Whole machine with load, CPU seconds per GB; less is better", Best::Lowest),
    },
    Section {
        title: "Memory of one end at its peak, MiB, and CPU while idle, % of a core",
        note: "",
        plot: "memory",
        scale: 1.0,
        columns: &[(Metric::Memory, "MiB", false), (Metric::CpuIdle, "idle CPU", false)],
        plotted: (Metric::Memory, "Peak resident memory of one end, MiB; less is better", Best::Lowest),
    },
];

impl Report<'_> {
    fn text(&self, with_plots: bool) -> Result<String> {
        let mut text = self.introduction()?;
        for offloads in self.results.offloads() {
            text += match offloads {
                Offloads::Raw => {
                    "### Offloads raw: every packet whole and finished, as a plain network card has it\n\n"
                }
                Offloads::On => "### Offloads on: links carry superframes, as between virtual machines\n\n",
            };
            for section in SECTIONS {
                let Some(table) = self.table(offloads, section) else { continue };
                text += &format!("#### {}\n\n", section.title);
                if !section.note.is_empty() {
                    text += &format!("{}\n\n", section.note);
                }
                if with_plots {
                    text += &format!("![{}](bench/{})\n\n", section.plotted.1, plot_name(section, offloads));
                }
                text += &table;
            }
        }
        if let Some(goals) = goals::table(self.results) {
            text += "### Figures to reach\n\nMedians against medians. Not measured here: the short cut for gateways. Many tunnels: below.\n\n";
            text += &goals;
        }
        Ok(text)
    }

    fn introduction(&self) -> Result<String> {
        let cpu = fs::read_to_string("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let rounds = self.results.rounds();
        let mut text = format!(
            "## Tunnels side by side (`cargo xtask bench`)\n\n\
             {}, Linux {}, {} CPUs ({}), which both ends of a tunnel, both kernels and the load share. {rounds} round{}, the \
             outermost loop; medians, in brackets the least and the greatest. `×` is the ratio to {}. `p2p` runs from gateway \
             to gateway, `gw` from LAN to LAN through both. Inner MTU {INNER_MTU} everywhere but on the plain wire.\n\n",
            date()?,
            kernel.trim(),
            super::measure::account::cpus(),
            model.trim_start_matches([' ', '\t', ':']),
            if rounds == 1 { "" } else { "s" },
            self.compare.name(),
        );
        if let Some(foreign) = self.results.largest(Metric::Foreign) {
            text += &format!("Other processes had at most {} % of the machine in any test.", number(foreign));
            text += if foreign > MAX_FOREIGN_CPU_PERCENT {
                " **It was not quiet: take the figures for an order of magnitude.**\n\n"
            } else {
                "\n\n"
            };
        }
        let mut table = Table::new(3, &["tunnel", "is", "version"]);
        for tunnel in self.results.tunnels() {
            table.row(vec![tunnel.name(), tunnel.what(), install::version(tunnel)]);
        }
        Ok(text + &table.markdown())
    }

    fn columns(&self, section: &Section) -> Vec<Column> {
        let topologies = self.results.topologies();
        let columns = topologies.iter().flat_map(|&topology| {
            section.columns.iter().map(move |&(metric, title, ratio)| Column { topology, metric, title, ratio })
        });
        columns.collect()
    }

    fn table(&self, offloads: Offloads, section: &Section) -> Option<String> {
        let mut columns = self.columns(section);
        let tunnels = self.results.tunnels();
        let get = |column: &Column, tunnel| self.results.get(offloads, column.topology, column.metric, tunnel);
        columns.retain(|column| tunnels.iter().any(|&tunnel| get(column, tunnel).is_some()));
        if columns.is_empty() {
            return None;
        }
        let mut head = vec!["tunnel".to_owned()];
        for column in &columns {
            head.push(format!("{} {}", column.topology.name(), column.title));
            if column.ratio {
                head.push("×".to_owned());
            }
        }
        let head: Vec<&str> = head.iter().map(String::as_str).collect();
        let mut table = Table::new(1, &head);
        for &tunnel in &tunnels {
            let mut row = vec![tunnel.name()];
            for column in &columns {
                let series = get(column, tunnel);
                row.push(series.as_ref().map_or_else(|| "-".to_owned(), |series| cell(series, section.scale)));
                if column.ratio {
                    row.push(ratio(series.as_ref(), get(column, self.compare).as_ref()));
                }
            }
            table.row(row);
        }
        Some(table.markdown())
    }

    fn plots(&self) -> Vec<(String, Plot)> {
        let mut plots = Vec::new();
        for offloads in self.results.offloads() {
            for section in SECTIONS {
                let (metric, what, best) = section.plotted;
                let panel = |topology: Topology| {
                    let bars = self.results.tunnels().into_iter().filter_map(|tunnel| {
                        let series = self.results.get(offloads, topology, metric, tunnel)?;
                        Some((tunnel, series.scaled(1.0 / section.scale)))
                    });
                    Panel { title: topology.title().to_owned(), bars: bars.collect() }
                };
                let panels: Vec<Panel> = self.results.topologies().into_iter().map(panel).collect();
                if panels.iter().all(|panel| panel.bars.is_empty()) {
                    continue;
                }
                let title =
                    format!("{}, offloads {}", section.title.split(',').next().unwrap_or_default(), offloads.name());
                let plot = Plot { title, subtitle: what.to_owned(), best, panels };
                plots.push((plot_name(section, offloads), plot));
            }
        }
        plots
    }
}

fn plot_name(section: &Section, offloads: Offloads) -> String {
    format!("{}-{}.svg", section.plot, offloads.name())
}

fn cell(series: &Series, scale: f64) -> String {
    let median = number(series.median() / scale);
    if series.rounds() == 1 {
        return median;
    }
    format!("{median} ({}-{})", number(series.min() / scale), number(series.max() / scale))
}

fn ratio(series: Option<&Series>, other: Option<&Series>) -> String {
    match (series, other) {
        (Some(series), Some(other)) if other.median() > 0.0 => number(series.median() / other.median()),
        _ => "-".to_owned(),
    }
}

fn date() -> Result<String> {
    let output = Command::new("date").args(["--utc", "+%F"]).output().context("date (Debian package coreutils)")?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
