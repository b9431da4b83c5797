//! Two gateways with a [`Relay`] of the bed's own between them, and the sums that must hold at their counters.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::SOON;
use crate::gateway::{Daemon, Pair};
use crate::impair::{Passed, Relay};
use crate::offload::Offload;
use crate::options::{Options, PORT};
use crate::status::Status;
use crate::topology::{Carrier, Side, Topology};

/// Gateways that take the relay, in the namespace of the tap, for each other.
pub struct Relayed {
    /// The gateways.
    pub pair: Pair,
    /// What stands between them; side 0 is A.
    pub relay: Relay,
    /// The network.
    pub net: Topology,
}

impl Relayed {
    /// Starts all three; `change` is made to the options of both gateways.
    ///
    /// # Errors
    /// What the network, the sockets or the gateways say.
    pub fn start(daemon: Daemon, seed: u64, change: impl Fn(Options) -> Options) -> Result<Self> {
        let net = Topology::new(Carrier::Tapped, Offload::On)?;
        for side in [Side::A, Side::B] {
            net.gw(side).ip(&["route", "add", &port_of(side).ip().to_string(), "dev", "wire0"])?;
        }
        let tap = net.tap().context("a tapped carrier has a tap")?;
        let bind = |side| tap.run(|| UdpSocket::bind(port_of(side)));
        let ends = [Side::A, Side::B].map(carrier_of);
        let relay = Relay::start([bind(Side::A)?, bind(Side::B)?], ends, seed)?;
        let pair = Pair::start(&net, daemon, |side, options| change(options.set("peer", port_of(side))))?;
        Ok(Self { pair, relay, net })
    }

    /// Waits until nothing is on the way any more: every datagram that the relay took was counted by the end that sent
    /// it, and every one that it sent on by the end that got it. Returns what the ends and the relay have counted.
    ///
    /// # Errors
    /// All counters, if they do not add up within [`SOON`].
    pub fn settle(&self) -> Result<([Status; 2], [Passed; 2])> {
        let deadline = Instant::now() + SOON;
        loop {
            let before = self.relay.passed();
            let ends = [self.pair.a.status()?, self.pair.b.status()?];
            let passed = self.relay.passed();
            let [a, b] = &ends;
            let counted = [outbound(a), inbound(b), outbound(b), inbound(a)];
            // Equal before and after: none was on its way while the ends were asked.
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

/// The tap's own address towards a gateway: what that gateway takes for its peer.
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

/// Datagrams that an end has received: the sum of everything that may become of one.
pub fn inbound(status: &Status) -> u64 {
    INBOUND.iter().map(|verdict| status.count(verdict)).sum()
}

/// Verdicts on what comes from the carrier.
const INBOUND: &[&str] = &[
    "delivered",
    "control-received",
    "bad-length",
    "no-receive-key",
    "bad-crc",
    "bad-padding",
    "bad-type",
    "bad-inner",
    "replayed",
    "reflected",
    "wrong-peer",
    "bad-message",
    "clear-control",
    "control-full",
    "private-full",
];
