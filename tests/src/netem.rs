//! Lines that delay, lose, reorder or have a rate limit, by the kernel's queueing disciplines at the ports of a tapped carrier.
//!
//! At a gateway's own card they would not work, since AF_XDP bypasses them on egress. At the ports, every packet of either gateway
//! passes them, by any door.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::topology::Topology;

const PORTS: [&str; 2] = ["portA", "portB"];

/// Adds these disciplines to both ports, each as an argument of `tc qdisc add dev PORT`. If this kernel lacks the first, prints the
/// reason and returns `false`.
///
/// # Errors
/// `tc` fails for another discipline, or the carrier has no tap.
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

/// Packets that the first discipline of a port has forwarded and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Forwarded; a superframe counts as its segments.
    pub packets: u64,
    /// Dropped.
    pub dropped: u64,
}

/// Returns the counts of both ports, A first.
///
/// # Errors
/// `tc` fails.
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
