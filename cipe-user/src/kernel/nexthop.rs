//! Next hops of many peers, followed live.
//!
//! One task holds a table of peers and listens to the kernel's notifications of routes, rules, addresses, links and
//! neighbours. A change marks the peers that it can affect; a route, for example, those inside its prefix. The task
//! looks up the marked peers again, one by one; a peer that is marked twice is looked up once.
//!
//! AF_XDP bypasses the kernel's neighbour table, so the kernel does not see that an entry is in use. The task reports
//! the use every [`NextHopTiming::refresh`], and every [`NextHopTiming::retry`] while a neighbour does not answer. The
//! entries stay ordinary ones (`NTF_USE`); managed entries would stay after a crash of the engine, and the kernel would
//! resolve them for ever.
//!
//! Path MTUs that the kernel has learned from ICMP do not count, because anybody can send ICMP errors.
//! [`NextHops::set_path_mtu`] sets those that are proven.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::{mpsc, watch};

use super::events::{FORWARDING, NetlinkEvent, NetlinkEvents};
use super::netlink::{Netlink, Result};
use super::routes::Flow;
use follower::NextHopFollower;

mod follower;

/// The next hop towards a peer, with the addresses of the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the egress device.
    pub ifindex: u32,
    /// Source IP address of the packets.
    pub source: IpAddr,
    /// Source address of the frames; `None` if the device is not an Ethernet device.
    pub source_mac: Option<[u8; 6]>,
    /// Destination address of the frames; `None` until the neighbour answers, and if the device is not an Ethernet
    /// device.
    pub destination_mac: Option<[u8; 6]>,
    /// Maximum IP packet on this path in octets.
    pub mtu: u32,
    /// Whether the device is up and its cable present.
    pub running: bool,
    /// Whether the peer's address is one of this host's own.
    pub local: bool,
}

/// The state of the look-up for a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHopState {
    /// Not yet looked up.
    Unknown,
    /// There is no next hop; the reason in words for an operator.
    Unreachable(Arc<str>),
    /// The next hop.
    Found(NextHop),
}

/// The polling intervals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHopTiming {
    /// Interval between two uses of each neighbour, and between two look-ups of each route.
    pub refresh: Duration,
    /// Interval between two uses of a neighbour that does not answer.
    pub retry: Duration,
}

impl Default for NextHopTiming {
    /// 15 s: the kernel trusts a confirmed entry for at least 15 s (half of base_reachable_time). 1 s: the kernel's own
    /// interval between requests (retrans_time).
    fn default() -> Self {
        Self { refresh: Duration::from_secs(15), retry: Duration::from_secs(1) }
    }
}

/// Returns the minimum path MTU that an ICMP error may claim, in octets: for IPv4 that of Linux itself
/// (`net.ipv4.route.min_pmtu`), for IPv6 the minimum of each link (RFC 8200, section 5).
pub(crate) fn least_mtu(to: IpAddr) -> u32 {
    if to.is_ipv4() { 552 } else { 1280 }
}

/// Follows the next hops of all peers. Clones share one task, which ends with the last clone.
#[derive(Clone, Debug)]
pub struct NextHops {
    commands: mpsc::UnboundedSender<Command>,
}

/// A peer, and the properties of the datagrams to it.
type Peer = Flow;

#[derive(Debug)]
enum Command {
    Watch(Peer, watch::Sender<NextHopState>),
    LookAgain(IpAddr),
    PathMtu { to: IpAddr, mtu: u32, life: Duration },
}

impl NextHops {
    /// Starts following; call it inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// No netlink socket can be opened, or devices cannot be listed.
    pub async fn new(netlink: &Netlink, timing: NextHopTiming) -> Result<Self> {
        let events = NetlinkEvents::open(&FORWARDING)?;
        Self::with_events(netlink, events, timing).await
    }

    async fn with_events<E>(netlink: &Netlink, events: E, timing: NextHopTiming) -> Result<Self>
    where
        E: Stream<Item = NetlinkEvent> + Send + Unpin + 'static,
    {
        let follower = NextHopFollower::new(netlink).await?;
        let (commands, receiver) = mpsc::unbounded_channel();
        tokio::spawn(follower.run(events, receiver, timing));
        Ok(Self { commands })
    }

    /// Follows the next hop of these datagrams. The state is [`NextHopState::Unknown`] at first. Following ends when
    /// the receiver is dropped.
    pub fn watch(&self, flow: Flow) -> watch::Receiver<NextHopState> {
        let (state, receiver) = watch::channel(NextHopState::Unknown);
        // Fails only if the task has ended, which it has logged; the state then stays unknown.
        self.commands.send(Command::Watch(flow, state)).ok();
        receiver
    }

    /// Waits until the task has ended; it has logged the reason.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }

    /// Returns an instance whose task has ended, for tests.
    #[cfg(test)]
    pub fn that_has_ended() -> Self {
        Self { commands: mpsc::unbounded_channel().0 }
    }

    /// Limits the MTU of all paths to `peer` to `mtu` octets during `life`, but not below the minimum ([`least_mtu`]). A
    /// larger MTU than the known one changes nothing.
    pub fn set_path_mtu(&self, peer: IpAddr, mtu: u32, life: Duration) {
        // As in `watch`.
        self.commands.send(Command::PathMtu { to: peer, mtu, life }).ok();
    }

    /// Looks up the next hop of `peer` again now: it may have changed without a notification. Watchers are notified of
    /// a change.
    pub fn look_again(&self, peer: IpAddr) {
        // As in `watch`.
        self.commands.send(Command::LookAgain(peer)).ok();
    }
}

#[cfg(test)]
mod tests;
