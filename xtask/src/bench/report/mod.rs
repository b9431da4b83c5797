//! What the measurements say: tables, goals, plots.

use anyhow::Result;

use super::record::Results;
use super::tunnel::Tunnel;

/// A number with three digits or more that say something, thousands apart.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

pub fn report(results: &Results, _compare: Tunnel, _write: bool) -> Result<()> {
    println!("{}", results.rounds());
    Ok(())
}
