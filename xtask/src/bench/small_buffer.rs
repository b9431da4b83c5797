//! `cargo xtask bench small-buffer`: one TCP stream from ours, and from another original, to an original with a socket buffer
//! of 64 KiB.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{self, Daemon};
use cipe_tests::original::{Original, Originals};
use cipe_tests::peer::{Cipher, Config};
use cipe_tests::topology::{Side, Topology};
use cipe_tests::traffic;

use super::files::binary;
use super::record::Series;
use super::tunnel;
use crate::tools;

/// Arguments of the measurement.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Number of measurements of each of the two, in turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Measure this `cipe` binary instead of building one
    #[arg(long, value_name = "FILE")]
    cipe: Option<PathBuf>,
}

/// Octets of the receive buffer.
const BUFFER: usize = 64 * 1024;

const WARM_UP: Duration = Duration::from_secs(1);
const MEASURED_TIME: Duration = Duration::from_secs(4);

/// The result of one TCP stream from lanA to lanB.
struct Stream {
    /// Octets that arrived, in Mbit/s.
    rate: f64,
    /// Segments that were retransmitted, in percent of all.
    retransmitted: f64,
}

/// Measures and prints each round, and the medians.
///
/// # Errors
/// A tunnel does not start or carries nothing.
pub(super) fn run(args: &Args) -> Result<()> {
    tools::need_namespaces()?;
    gateway::use_binary(&binary(args.cipe.as_deref())?)?;
    tools::clean_up_on_signals(tunnel::remove_sockets)?;
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=args.rounds.max(1) {
        let original = Original::start(Daemon::Blowfish, |options| options, configure)?;
        original.wait_for_pings()?;
        ours.push(stream(&original.net).with_context(|| format!("from ours, round {round}"))?);
        drop(original);
        let originals = Originals::start(Cipher::Blowfish, configure)?;
        theirs.push(stream(&originals.net).with_context(|| format!("from an original, round {round}"))?);
        println!("round {round} of {}", args.rounds.max(1));
        print("from ours", &ours[round - 1..]);
        print("from an original", &theirs[round - 1..]);
    }
    println!("medians");
    print("from ours", &ours);
    print("from an original", &theirs);
    Ok(())
}

fn configure(config: &mut Config) {
    config.receive_buffer = Some(BUFFER);
}

fn print(from: &str, streams: &[Stream]) {
    let median = |value: fn(&Stream) -> f64| Series::new(streams.iter().map(value).collect()).median();
    let (rate, retransmitted) = (median(|stream| stream.rate), median(|stream| stream.retransmitted));
    println!("  {from:<16} {rate:>6.0} Mbit/s, {retransmitted:>4.1} % retransmitted");
}

fn stream(net: &Topology) -> Result<Stream> {
    let to = (net.lan(Side::B), Side::B.host());
    // The first packets make the keys.
    traffic::tcp(net.lan(Side::A), to, 1, WARM_UP, |_, _| ())?;
    let before = segments(net)?;
    let report = traffic::tcp(net.lan(Side::A), to, 1, MEASURED_TIME, |_, _| ())?;
    let after = segments(net)?;
    let (sent, again) = (after.0 - before.0, after.1 - before.1);
    if sent == 0 {
        bail!("no segment was sent");
    }
    Ok(Stream { rate: report.total.mbit(), retransmitted: 100.0 * again as f64 / sent as f64 })
}

/// Segments that lanA has sent, and how many of them were retransmissions.
fn segments(net: &Topology) -> Result<(u64, u64)> {
    let text = net.lan(Side::A).run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"))?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let value = |wanted: &str| -> Result<u64> {
        let found = names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == wanted);
        Ok(found.with_context(|| format!("no counter {wanted}"))?.1.parse()?)
    };
    Ok((value("OutSegs")?, value("RetransSegs")?))
}
