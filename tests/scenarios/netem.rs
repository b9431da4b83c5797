//! Lines that are long, lossy, out of order or slow, by each door: traffic of all kinds both ways, also while keys change. A
//! kernel without netem skips them, with the reason printed.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::exercise::{Line, everything_passes};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::netem;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::{patient, slowness};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Required key changes of either end.
const CHANGES: usize = 3;

/// A line with these queueing disciplines, each way.
#[derive(Clone, Copy)]
struct Shape<'a> {
    name: &'a str,
    disciplines: &'a [&'a str],
    line: Line,
    /// Least round-trip time.
    least: Duration,
    /// Whether the line drops some packets.
    drops: bool,
}

fn carries(shape: Shape<'_>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in ["auto", "udp", "xdp"] {
        let offload = if carrier == "xdp" { Offload::Off } else { Offload::On };
        let net = Topology::new(Carrier::Tapped, offload)?;
        if !netem::shape(&net, shape.disciplines)? {
            return Ok(());
        }
        let tell = |what: &str| format!("{}, carrier {carrier}, {what}", shape.name);
        let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        everything_passes(&net, shape.line).with_context(|| tell("with keys that stay"))?;
        let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(10))?;
        ensure!(report.quantile(0.0).is_some_and(|time| time >= shape.least), "{}: {report:?}", tell("round trips"));
        pair.stop()?;

        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| {
            options.set("carrier", carrier).set("tokey", 1).set("tokxc", 1)
        })?;
        pair.wait_for_keys(&net)?;
        let (start, before) = (Instant::now(), [pair.a.send_keys(), pair.b.send_keys()]);
        // Packets in flight may be lost when a key changes.
        while pair.a.send_keys() < before[0] + CHANGES || pair.b.send_keys() < before[1] + CHANGES {
            everything_passes(&net, Line::Lossy).with_context(|| tell("while keys change"))?;
            ensure!(start.elapsed() < patient(SOON), "{}", tell("too few key changes"));
        }
        let passed = netem::passed(&net)?;
        let right = |end: &netem::Passed| end.packets > 1000 && (end.dropped > 0 || !shape.drops);
        ensure!(passed.iter().all(right), "{}: {passed:?}", tell("the line itself"));
        println!("{} | carrier {carrier} | passes | {} | {passed:?}", shape.name, pair.a.status()?.doors.join(", "));
        pair.stop()?;
    }
    Ok(())
}

#[test]
fn a_long_line_carries() -> Result<()> {
    carries(Shape {
        name: "50 ms round trip",
        disciplines: &["root netem delay 25ms limit 10000"],
        line: Line::Sound,
        least: Duration::from_millis(50),
        drops: false,
    })
}

#[test]
fn a_lossy_line_carries() -> Result<()> {
    carries(Shape {
        name: "1 % loss",
        disciplines: &["root netem loss 1% limit 10000"],
        line: Line::Lossy,
        least: Duration::ZERO,
        drops: true,
    })
}

/// A quarter of the packets overtakes earlier ones.
#[test]
fn a_line_out_of_order_carries() -> Result<()> {
    carries(Shape {
        name: "reordering",
        disciplines: &["root netem delay 5ms reorder 25% 50% limit 10000"],
        line: Line::Lossy,
        least: Duration::ZERO,
        drops: false,
    })
}

/// 100 Mbit/s and a queue of 50 ms; a tenth of the rate or less on an emulated machine.
#[test]
fn a_narrow_line_carries() -> Result<()> {
    let rate = 100_000 / slowness();
    let bucket = format!("parent 1: handle 2: tbf rate {rate}kbit burst 20kb latency 50ms");
    carries(Shape {
        name: &format!("{rate} kbit/s, queue of 50 ms"),
        disciplines: &["root handle 1: netem delay 25ms limit 10000", &bucket],
        line: Line::Lossy,
        least: Duration::from_millis(50),
        drops: false,
    })
}
