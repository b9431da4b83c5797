//! The tests for a carrier on any device: pings, TCP and UDP from either side, another MTU, a link that goes down and comes up,
//! offloads off.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::gateway::Pair;
use crate::offload::Offload;
use crate::ping::{self, Plan};
use crate::topology::{Side, Topology};
use crate::traffic::{self, Pace};
use crate::{SOON, namespace::Namespace};

/// MTU of the tunnel devices.
const MTU: usize = 1442;

/// Rounds of pings in a row, all of them answered, after which every party knows the largest packet size: one more than there
/// are parties.
const SETTLED_ROUNDS: usize = 4;

/// Octets that every path takes, with an MTU of [`SMALL_MTU`], too.
const MIN_PATH_OCTETS: usize = 1200;

/// A temporary MTU of the carrier devices.
const SMALL_MTU: usize = 1300;

/// A carrier device of a gateway.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its MTU.
    pub mtu: usize,
}

/// How many packets may be lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Line {
    /// Nothing is lost.
    Sound,
    /// Some packets are lost.
    Lossy,
}

/// Sends pings of all sizes, 1 MB of TCP and some UDP, from either side.
///
/// # Errors
/// A packet or a stream does not pass.
pub fn everything_passes(net: &Topology, line: Line) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (from, to) = (net.lan(side), (net.lan(side.other()), side.other().host()));
        let mut plan = Plan::sizes((ping::HEADERS..=MTU).step_by(101).chain([MTU]).collect());
        let large = plan.sizes.iter().copied().filter(|size| *size > MIN_PATH_OCTETS).rev().collect();
        learn_path(from, to.1, large, line).with_context(|| format!("pings from {side:?}"))?;
        if line == Line::Lossy {
            plan.timeout = Duration::from_secs(2);
        }
        let report = ping::run(from, to.1, &plan)?;
        let enough = if line == Line::Sound { report.sent } else { report.sent / 2 };
        ensure!(report.received() >= enough && report.damaged == 0, "pings from {side:?} lost: {:?}", report.lost);
        let octets: Vec<u8> = (0..250_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        let arrived = traffic::tcp_transfer(from, to, &octets).with_context(|| format!("TCP from {side:?}"))?;
        ensure!(arrived == octets, "TCP from {side:?} arrived damaged");
        let report = traffic::udp(from, to, 1200, Pace::Fixed(200), Duration::from_secs(1), |_, _| {})?;
        let most = if line == Line::Sound { 0.02 } else { 0.5 };
        ensure!(report.damaged == 0 && report.loss() <= most, "UDP from {side:?}: {report:?}");
    }
    Ok(())
}

/// Sends pings of these `sizes`, the largest first, until [`SETTLED_ROUNDS`] times in a row each was answered.
///
/// Three parties learn the path MTU only by the loss of a packet that was too large: the kernel of the gateway (from a device
/// such as VXLAN), the engine (from the kernel), and the host (from the engine). The same three at the other end learn it for
/// the answers. A packet that the host itself fragments teaches it nothing, so one size is not enough.
fn learn_path(from: &Namespace, to: Ipv4Addr, sizes: Vec<usize>, line: Line) -> Result<()> {
    let large = Plan { timeout: Duration::from_secs(1), ..Plan::sizes(sizes) };
    let mut in_a_row = 0;
    for _ in 0..4 * SETTLED_ROUNDS {
        in_a_row = if ping::run(from, to, &large)?.lost.is_empty() { in_a_row + 1 } else { 0 };
        if in_a_row == SETTLED_ROUNDS {
            return Ok(());
        }
    }
    ensure!(line == Line::Lossy, "of {} rounds no {SETTLED_ROUNDS} in a row were answered", 4 * SETTLED_ROUNDS);
    Ok(())
}

/// Sets a smaller MTU of the carrier devices and the old one again, sets a link down and up, and switches offloads off: each
/// time everything must pass.
///
/// # Errors
/// A packet or a stream does not pass; the error names the step.
pub fn changes_are_borne(net: &Topology, pair: &Pair, device: Device<'_>) -> Result<()> {
    for mtu in [SMALL_MTU, device.mtu] {
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["link", "set", device.name, "mtu", &mtu.to_string()])?;
        }
        answers(net.lan(Side::A), Side::B.host()).with_context(|| format!("after the MTU became {mtu}"))?;
        everything_passes(net, Line::Sound).with_context(|| format!("with an MTU of {mtu}"))?;
    }
    net.gw(Side::A).ip(&["link", "set", device.name, "down"])?;
    net.gw(Side::A).ip(&["link", "set", device.name, "up"])?;
    answers(net.lan(Side::A), Side::B.host()).context("after the link was down")?;
    pair.wait_for_keys(net)?;
    everything_passes(net, Line::Sound).context("after the link was down")?;
    for side in [Side::A, Side::B] {
        if let Err(error) = Offload::Off.apply(net.gw(side), device.name) {
            eprintln!("{}: offloads stay as they are: {error:#}", device.name);
            return Ok(());
        }
    }
    answers(net.lan(Side::A), Side::B.host()).context("with offloads off")?;
    everything_passes(net, Line::Sound).context("with offloads off")
}

/// Waits until a ping is answered.
fn answers(from: &Namespace, to: Ipv4Addr) -> Result<()> {
    let answered = ping::wait_for_answer(from, to, Duration::from_millis(200), SOON)?;
    ensure!(answered, "no ping was answered");
    Ok(())
}
