//! What every carrier must do, whatever it stands on: pings, TCP and UDP from either side, another MTU, a link that goes down and
//! comes up, offloads off.

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

/// A carrier device at either end, as the gateways have it.
#[derive(Clone, Copy, Debug)]
pub struct Device<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its MTU.
    pub mtu: usize,
}

/// Share of what is sent that may be lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Line {
    /// Nothing is lost.
    Sound,
    /// Some packets are.
    Lossy,
}

/// Pings of all sizes, 1 MB of TCP and some UDP, from either side.
///
/// # Errors
/// What did not pass.
pub fn everything_passes(net: &Topology, line: Line) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (from, to) = (net.lan(side), (net.lan(side.other()), side.other().host()));
        // A host learns of a smaller path by a packet that is lost: this one by the first, the other one by its answer to the second.
        let large = Plan { timeout: Duration::from_secs(1), ..Plan::sizes(vec![MTU]) };
        for _ in 0..2 {
            ping::run(from, to.1, &large)?;
        }
        let mut plan = Plan::sizes((ping::HEADERS..=MTU).step_by(101).chain([MTU]).collect());
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

/// A smaller MTU of the carrier devices and the old one again, a link that goes down and comes up, offloads off: each time
/// everything passes.
///
/// # Errors
/// What did not pass, and when.
pub fn changes_are_borne(net: &Topology, pair: &Pair, device: Device<'_>) -> Result<()> {
    for mtu in [1300, device.mtu] {
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
