//! Two LANs joined by an Ethernet tunnel (protocol 4) and a bridge in each gateway.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::bridge::{self, Port, host};
use crate::gateway::{Daemon, Gateway, Pair};
use crate::offload::Offload;
use crate::options::Options;
use crate::ping::{self, HEADERS, Plan};
use crate::topology::{Carrier, Side, Topology};
use crate::{SOON, process, traffic};

/// The device MTU by default: 1442 less an Ethernet header.
pub const MTU: usize = 1428;

/// Two LANs joined by bridges and a tunnel between them.
pub struct Joined {
    /// The gateways' programs.
    pub pair: Pair,
    /// A port of the test's own in each bridge.
    pub ports: [Port; 2],
    /// LANs, gateways and the carrier.
    pub net: Topology,
}

/// Sets the options for a tunnel device in a bridge: without addresses on the tunnel.
pub fn addressless(options: Options) -> Options {
    options.without("ipaddr").without("ptpaddr")
}

impl Joined {
    /// Joins the LANs of a topology with a direct carrier, and waits until both ends have keys.
    ///
    /// # Errors
    /// Those of [`Pair::start`], or `ip` fails.
    pub fn new(daemon: Daemon, offload: Offload, change: impl Fn(Side, Options) -> Options) -> Result<Self> {
        Self::over(Carrier::Direct, daemon, offload, change)
    }

    /// Does the same over any carrier.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn over(
        carrier: Carrier,
        daemon: Daemon,
        offload: Offload,
        change: impl Fn(Side, Options) -> Options,
    ) -> Result<Self> {
        let net = Topology::new(carrier, offload)?;
        bridge::join_lans(&net)?;
        let pair = Pair::start(&net, daemon, |side, options| change(side, addressless(options)))?;
        for side in [Side::A, Side::B] {
            bridge::join(net.gw(side), daemon.device())?;
        }
        let ports = [Port::new(net.gw(Side::A), "port0")?, Port::new(net.gw(Side::B), "port0")?];
        let joined = Self { pair, ports, net };
        joined.wait_for_keys()?;
        Ok(joined)
    }

    /// Pings from both sides until both have keys for both directions.
    fn wait_for_keys(&self) -> Result<()> {
        let deadline = Instant::now() + process::patient(SOON);
        let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
        loop {
            for side in [Side::A, Side::B] {
                ping::run(self.net.lan(side), host(side.other()), &one)?;
            }
            let both = [self.pair.a.status()?, self.pair.b.status()?];
            if both.iter().all(|status| self.pair.has_keys(status)) {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("no keys\n{both:?}\n{}\n{}", self.pair.a.log().text(), self.pair.b.log().text());
            }
        }
    }

    /// The program of one side.
    pub fn gateway(&self, side: Side) -> &Gateway {
        self.pair.of(side)
    }

    /// The test's port of one side.
    pub fn port(&self, side: Side) -> &Port {
        &self.ports[usize::from(side == Side::B)]
    }

    /// Sends pings and streams both ways.
    ///
    /// # Errors
    /// A packet or a stream does not arrive.
    pub fn everything_passes(&self) -> Result<()> {
        lans_reach_each_other(&self.net)
    }

    /// Sends a frame into the bridge of each side and waits for it at the other, octet for octet.
    ///
    /// # Errors
    /// It does not arrive.
    pub fn passes(&self, frame: &[u8], what: &str) -> Result<()> {
        for side in [Side::A, Side::B] {
            self.port(side).send(frame)?;
            let came = self.port(side.other()).wait_for(SOON, |came| came == frame)?;
            came.with_context(|| format!("{what} from {side:?}\n{:?}", self.gateway(side).status()))?;
        }
        Ok(())
    }
}

/// Sends pings of many sizes up to the MTU, and 2 MB of TCP, from either side.
///
/// # Errors
/// A packet or a stream does not arrive.
pub fn lans_reach_each_other(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let plan = Plan::sizes((HEADERS..=MTU).step_by(17).chain([MTU]).collect());
        let report = ping::run(net.lan(side), host(side.other()), &plan)?;
        ensure!((report.received(), report.damaged) == (report.sent, 0), "from {side:?}, lost: {:?}", report.lost);
        let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        let to = (net.lan(side.other()), host(side.other()));
        ensure!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "2 MB from {side:?}");
    }
    Ok(())
}
