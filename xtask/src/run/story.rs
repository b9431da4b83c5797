//! The first part: the network, the key exchange as it happens, and one packet on the carrier.

use std::time::Duration;

use anyhow::{Context, Result};
use cipe_tests::SOON;
use cipe_tests::capture::Captured;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::net::{Frame, in_clear};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};

use super::paint;

/// Draws the network and prints A's option file.
pub(super) fn introduce(daemon: Daemon) -> Result<()> {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let processors = std::thread::available_parallelism()?;
    paint::heading(&format!("CIPE: two LANs, two gateways, one tunnel (Linux {}, {processors} CPUs)", kernel.trim()));
    let device = daemon.device();
    println!(
        "
    lanA                gwA                                      gwB                lanB
  ┌────────────┐    ┌────────────────────┐                 ┌────────────────────┐    ┌────────────┐
  │ 10.210.1.2 ├────┤ 10.210.1.1         │                 │         10.210.2.1 ├────┤ 10.210.2.2 │
  └────────────┘    │   {device} 10.201.0.1┝━━━━━━━━━━━━━━━━━┥10.201.0.2 {device}   │    └────────────┘
                    │    wire0 10.200.0.1├─────────────────┤10.200.0.2 wire0    │
                    └────────────────────┘  UDP port 6789  └────────────────────┘
"
    );
    println!("Option file of gwA ({} -o FILE), and of gwB with the addresses swapped:\n", daemon.program());
    for line in Options::of(Side::A).to_string().lines() {
        println!("    {line}");
    }
    Ok(())
}

/// Starts both gateways on a carrier that can be captured, and shows exchange and first packets.
pub(super) fn exchange_and_packet(daemon: Daemon) -> Result<()> {
    paint::heading("Key exchange, as both daemons log it and as the carrier sees it");
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    let capture = net.capture_carrier(1000)?;
    let pair = Pair::start(&net, daemon, |_, options| options)?;
    let first = Plan { timeout: Duration::from_millis(300), ..Plan::count(1) };
    ping::run(net.lan(Side::A), Side::B.host(), &first)?;
    pair.wait_for_keys(&net)?;
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(3))?;
    capture.wait_for(SOON, |frame| datagram(frame).is_some()).context("no CIPE packet arrived at the carrier")?;
    let frames = capture.finish()?;
    print_exchange(&pair, daemon, &frames)?;
    println!("\n  Ping from lanA to lanB, through both: {} of {} answered.", report.received(), report.sent);

    paint::heading("A packet on the carrier, and its content");
    show_packet(&pair, daemon, &frames)?;
    for status in pair.stop()? {
        anyhow::ensure!(status.success(), "a daemon ended with {status}");
    }
    Ok(())
}

/// Packets of the carrier to show beside the log.
const PACKETS: usize = 24;

/// The log lines of both daemons and the packets of the carrier, in the order of time.
fn print_exchange(pair: &Pair, daemon: Daemon, frames: &[Captured]) -> Result<()> {
    let mut lines = Vec::new();
    for side in [Side::A, Side::B] {
        let gateway = pair.of(side);
        let name = format!("gw{}", side.letter());
        lines.extend(gateway.log().lines().into_iter().map(|line| (line.at, paint::bold(&name), line.text)));
    }
    let packets = frames.iter().filter_map(|frame| Some((frame, datagram(&frame.octets)?))).take(PACKETS);
    for (frame, datagram) in packets {
        let to_b = Frame::parse(&frame.octets).and_then(|f| f.ipv4()).is_some_and(|p| p.source == Side::A.carrier());
        let arrow = if to_b { "A►B" } else { "B►A" };
        let what = if is_static(datagram) {
            let decoded = decode(pair, daemon, datagram)?;
            let payload = decoded.lines().find_map(|line| line.strip_prefix("payload")).unwrap_or_default().trim();
            format!("static key: {}", payload.rsplit_once("octets: ").map_or(payload, |(_, what)| what))
        } else {
            "dynamic key".to_owned()
        };
        lines.push((frame.at, paint::faint(arrow), format!("UDP, {} octets, {what}", datagram.len())));
    }
    lines.sort_by_key(|(at, ..)| *at);
    let Some(&(start, ..)) = lines.first() else { return Ok(()) };
    for (at, who, text) in lines {
        println!("  {}  {who}  {text}", paint::faint(&format!("{:>7.4} s", (at - start).as_secs_f64())));
    }
    Ok(())
}

/// Bit 7 of the first octet of a datagram is its key flag.
fn is_static(datagram: &[u8]) -> bool {
    datagram[0] & 0x80 == 0
}

/// A datagram of the carrier and its kind.
struct Found {
    what: &'static str,
    datagram: Vec<u8>,
}

fn show_packet(pair: &Pair, daemon: Daemon, frames: &[Captured]) -> Result<()> {
    let leaks = frames.iter().filter(|frame| in_clear(&frame.octets)).count();
    let datagrams: Vec<&[u8]> = frames.iter().filter_map(|frame| datagram(&frame.octets)).collect();
    // This program knows only the static key, so it shows a packet from before the end of the exchange: the first ping if it
    // was sent under the static key, else the first message of the exchange.
    let under_static: Vec<&[u8]> = datagrams.iter().copied().filter(|datagram| is_static(datagram)).collect();
    let chosen = under_static.iter().find(|datagram| datagram.len() == SEALED_PING);
    let found = match (chosen, under_static.first()) {
        (Some(ping), _) => Found { what: "the first ping, under the static key", datagram: ping.to_vec() },
        (None, Some(first)) => Found { what: "the first message of the exchange", datagram: first.to_vec() },
        (None, None) => anyhow::bail!("no packet under the static key was captured"),
    };
    println!(
        "{} datagrams captured, {} of them under dynamic keys; {leaks} with clear text. This is {}:\n",
        datagrams.len(),
        datagrams.len() - under_static.len(),
        found.what
    );
    for line in decode(pair, daemon, &found.datagram)?.lines() {
        println!("  {line}");
    }
    Ok(())
}

/// Octets of a datagram that carries a ping of 84 octets: IV 8, padding 7, P 1, CRC 4.
const SEALED_PING: usize = 104;

fn datagram(frame: &[u8]) -> Option<&[u8]> {
    let (_, _, payload) = Frame::parse(frame)?.ipv4()?.udp()?;
    (payload.len() >= 16).then_some(payload)
}

/// The output of `cipe decode` for a datagram under the static key.
fn decode(pair: &Pair, daemon: Daemon, datagram: &[u8]) -> Result<String> {
    let file = pair.a.directory().join("key");
    std::fs::write(&file, KEY)?;
    let file = file.to_str().context("the bed's paths are ASCII")?;
    let cipher = match daemon {
        Daemon::Blowfish | Daemon::EthernetBlowfish => "blowfish",
        Daemon::Idea | Daemon::EthernetIdea => "idea",
    };
    let output = pair.a.cipe(&["decode", "--cipher", cipher, "--key", file, &hex::encode(datagram)]).output()?;
    anyhow::ensure!(output.status.success(), "cipe decode: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
