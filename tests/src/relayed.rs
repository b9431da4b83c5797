//! Two gateways with the bed's [`Relay`] between them, and the equations that their counters must satisfy.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::SOON;
use crate::gateway::{Daemon, Pair};
use crate::impair::{Attack, Passed, Relay};
use crate::offload::Offload;
use crate::options::{Options, PORT};
use crate::process::patient;
use crate::status::{INBOUND, Status};
use crate::topology::{Carrier, Side, Topology};

/// Gateways whose peer is the relay, in the namespace of the tap.
pub struct Relayed {
    /// The gateways.
    pub pair: Pair,
    /// The relay between them; side 0 is A.
    pub relay: Relay,
    /// The network.
    pub net: Topology,
}

impl Relayed {
    /// Starts all three; `change` sets the options of both gateways.
    ///
    /// # Errors
    /// The network or a socket cannot be made, or a gateway does not start.
    pub fn start(daemon: Daemon, seed: u64, change: impl Fn(Options) -> Options) -> Result<Self> {
        Self::over(Topology::new(Carrier::Tapped, Offload::On)?, daemon, seed, change)
    }

    /// Does the same over a network with a tapped carrier.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn over(net: Topology, daemon: Daemon, seed: u64, change: impl Fn(Options) -> Options) -> Result<Self> {
        Self::under(net, daemon, seed, None, change)
    }

    /// Does the same with somebody on the path from the first datagram on.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn under(
        net: Topology,
        daemon: Daemon,
        seed: u64,
        attack: Option<Attack>,
        change: impl Fn(Options) -> Options,
    ) -> Result<Self> {
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["route", "add", &port_of(side).ip().to_string(), "dev", "wire0"])?;
        }
        let tap = net.tap().context("a tapped carrier has a tap")?;
        let bind = |side| tap.run(|| UdpSocket::bind(port_of(side)));
        let ends = [Side::A, Side::B].map(carrier_of);
        let relay = Relay::start([bind(Side::A)?, bind(Side::B)?], ends, seed)?;
        relay.attack(attack);
        let pair = Pair::start(&net, daemon, |side, options| change(options.set("peer", port_of(side))))?;
        Ok(Self { pair, relay, net })
    }

    /// Waits until no datagram is in flight: its sender has counted every datagram that the relay received, and its receiver
    /// has counted every datagram that the relay forwarded. Returns the counters of the ends and the relay.
    ///
    /// # Errors
    /// All counters, if they do not add up within [`SOON`].
    pub fn settle(&self) -> Result<([Status; 2], [Passed; 2])> {
        let deadline = Instant::now() + patient(SOON);
        loop {
            let before = self.relay.passed();
            let ends = [self.pair.a.status()?, self.pair.b.status()?];
            let passed = self.relay.passed();
            let [a, b] = &ends;
            let counted = [outbound(a), inbound(b), outbound(b), inbound(a)];
            // If the counts before and after are equal, no datagram was in flight while the ends were asked.
            let relayed = [passed[0].received, passed[0].sent, passed[1].received, passed[1].sent];
            if before == passed && self.relay.waiting() == 0 && counted == relayed {
                return Ok((ends, passed));
            }
            if Instant::now() > deadline {
                bail!(
                    "sent by A, got by B, sent by B, got by A: {counted:?}\nby the relay: {relayed:?}\n{passed:?}\n\
                     A {a:?}\nB {b:?}\n{}\n{}",
                    self.pair.a.log().text(),
                    self.pair.b.log().text()
                );
            }
        }
    }
}

/// The carrier address of a gateway.
pub fn carrier_of(side: Side) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(side.carrier()), PORT)
}

/// The tap's own address towards a gateway, which is that gateway's peer.
pub fn port_of(side: Side) -> SocketAddr {
    let number = match side {
        Side::A => 1,
        Side::B => 2,
    };
    SocketAddr::from(([192, 0, 2, number], PORT))
}

/// Datagrams that an end has sent.
pub fn outbound(status: &Status) -> u64 {
    status.count("sent") + status.count("control-sent")
}

/// Datagrams that an end has received: the sum of all inbound verdicts.
pub fn inbound(status: &Status) -> u64 {
    INBOUND.iter().map(|verdict| status.count(verdict)).sum()
}
