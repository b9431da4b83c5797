//! The report on the measurements of many tunnels.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::{Metric, Record};
use crate::bench::report::{Table, number, replace_section};
use crate::bench::tunnel::Tunnel;

/// Columns: metric, title, and divisor of the values.
const COLUMNS: [(Metric, &str, f64); 8] = [
    (Metric::Setup, "set-up, ms", 1000.0),
    (Metric::Engine, "engine, KiB", 1.0),
    (Metric::Kernel, "kernel, KiB", 1.0),
    (Metric::Keyed, "engine with keys, KiB", 1.0),
    (Metric::KeyChange, "key change, µs", 1.0),
    (Metric::Rate, "UDP 1400 without loss, k/s", 1000.0),
    (Metric::Flood, "flood, k/s", 1000.0),
    (Metric::Goodput, "flood, Mbit/s", 1.0),
];

/// Share of one tunnel's throughput that 1,000 active ones must have, and memory each may have in KiB.
const MIN_THROUGHPUT_SHARE: f64 = 0.85;
const MAX_TUNNEL_KIB: f64 = 64.0;

const NOTE: &str = "Set-up, memory and key changes are those of one tunnel at one end, on average. `engine` is resident memory \
                    without key state, `kernel` the kernel's memory for device and sockets. A key change is CPU time of an \
                    engine for two new keys and the first packet under each. The load goes to all tunnels at random.";

/// Prints the report and, if asked to, writes it into the document.
///
/// # Errors
/// The document cannot be written.
pub(super) fn report(records: &[Record], write: bool) -> Result<()> {
    let text = format!("## Many tunnels in one engine (`cargo xtask bench many`)\n\n{NOTE}\n\n{}", table(records));
    println!("\n{text}");
    if write {
        replace_section("cargo xtask bench many", &text)?;
    }
    Ok(())
}

/// Medians as a table, and the verdicts on the goals.
fn table(records: &[Record]) -> String {
    let mut series: BTreeMap<(Tunnel, usize, Metric), Vec<f64>> = BTreeMap::new();
    for record in records {
        if let Some((tunnels, metric)) = record.parse() {
            series.entry((record.tunnel, tunnels, metric)).or_default().push(record.value);
        }
    }
    let median = |tunnel: Tunnel, tunnels: usize, metric: Metric| {
        let mut values = series.get(&(tunnel, tunnels, metric))?.clone();
        values.sort_by(f64::total_cmp);
        Some((values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0)
    };
    let head: Vec<&str> = ["cipher", "tunnels"].into_iter().chain(COLUMNS.map(|(_, title, _)| title)).collect();
    let mut rows = Table::new(1, &head);
    let mut verdicts = String::new();
    let rows_of: BTreeSet<(Tunnel, usize)> = series.keys().map(|(tunnel, tunnels, _)| (*tunnel, *tunnels)).collect();
    for (tunnel, tunnels) in rows_of {
        let cell = |(metric, _, scale): (Metric, &str, f64)| {
            median(tunnel, tunnels, metric).map_or_else(|| "-".to_owned(), |value| number(value / scale))
        };
        rows.row([tunnel.name(), tunnels.to_string()].into_iter().chain(COLUMNS.map(cell)).collect());
        let memory = [Metric::Engine, Metric::Kernel].map(|metric| median(tunnel, tunnels, metric));
        if let [Some(engine), Some(kernel)] = memory
            && tunnels >= 1000
        {
            let kept = if engine + kernel <= MAX_TUNNEL_KIB { "reached" } else { "missed" };
            verdicts += &format!(
                "- {}, {tunnels} tunnels: {} KiB each without key state, asked at most {MAX_TUNNEL_KIB:.0}: {kept}\n",
                tunnel.name(),
                number(engine + kernel)
            );
        }
        for (metric, what) in [(Metric::Rate, "without loss"), (Metric::Flood, "of a flood")] {
            if let (Some(one), Some(many)) = (median(tunnel, 1, metric), median(tunnel, tunnels, metric))
                && tunnels == 1000
            {
                let kept = if many >= one * MIN_THROUGHPUT_SHARE { "reached" } else { "missed" };
                verdicts += &format!(
                    "- {}, {tunnels} tunnels: {:.0} % of one tunnel's throughput {what}, asked at least {:.0} %: {kept}\n",
                    tunnel.name(),
                    100.0 * many / one,
                    100.0 * MIN_THROUGHPUT_SHARE
                );
            }
        }
    }
    format!("{}\n{verdicts}", rows.markdown())
}
