//! Lines that delay, lose, reorder or are narrow, by the kernel's queueing disciplines at the ports of a tapped carrier.
//!
//! At a gateway's own card they would not do: AF_XDP transmits past them. At the ports everything that either gateway sends passes
//! them, whatever door it takes.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::topology::Topology;

const PORTS: [&str; 2] = ["portA", "portB"];

/// Gives both ports these disciplines, each as behind `tc qdisc add dev PORT`; says why and returns `false` where this kernel has
/// not got the first.
///
/// # Errors
/// What `tc` says of the others, or a carrier without a tap.
pub fn shape(net: &Topology, disciplines: &[&str]) -> Result<bool> {
    let tap = net.tap().context("a tapped carrier has a tap")?;
    for port in PORTS {
        for (number, words) in disciplines.iter().enumerate() {
            let output =
                tap.command("tc").args(["qdisc", "add", "dev", port]).args(words.split_whitespace()).output()?;
            if !output.status.success() {
                let error = String::from_utf8_lossy(&output.stderr).into_owned();
                ensure!(number == 0, "tc qdisc add dev {port} {words}: {error}");
                eprintln!("skipped: tc qdisc add dev {port} {words}: {error}");
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// What the first discipline of a port has passed on, and dropped, in packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Passed on; a superframe counts as its segments.
    pub packets: u64,
    /// Dropped.
    pub dropped: u64,
}

/// The same of both ports.
///
/// # Errors
/// What `tc` says.
pub fn passed(net: &Topology) -> Result<[Passed; 2]> {
    let tap = net.tap().context("a tapped carrier has a tap")?;
    let of = |port: &str| -> Result<Passed> {
        let output = tap.command("tc").args(["-s", "-j", "qdisc", "show", "dev", port, "root"]).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let disciplines: Vec<Value> = serde_json::from_str(&text).with_context(|| text.clone())?;
        let number = |name: &str| disciplines.first().and_then(|first| first[name].as_u64());
        let (packets, dropped) = number("packets").zip(number("drops")).with_context(|| text.clone())?;
        Ok(Passed { packets, dropped })
    };
    Ok([of(PORTS[0])?, of(PORTS[1])?])
}
