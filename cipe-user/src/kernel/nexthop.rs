//! Next hops of many peers, followed live.
//!
//! One task holds a table of peers and listens to the kernel's notifications of routes, rules, addresses, links and
//! neighbours. A change touches the peers that it can concern, a route for example those inside its prefix. They are
//! marked and asked for again one by one; what is marked twice is asked for once.
//!
//! AF_XDP bypasses the kernel's neighbour table, so the kernel does not see that an entry is in use. The task says so
//! every [`NextHopTiming::refresh`], and asks again every [`NextHopTiming::retry`] while a neighbour does not answer. The entries stay
//! ordinary ones (`NTF_USE`, not the kernel's managed ones, which would outlive a crashed engine and be asked for for
//! ever).
//!
//! Path MTUs that the kernel has learned from ICMP do not count: anybody may have sent that. Those that are proven are told by
//! [`NextHops::set_path_mtu`].

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

/// The way to a peer, down to the frame's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// Index of the device that packets leave by.
    pub ifindex: u32,
    /// Source IP address of packets.
    pub source: IpAddr,
    /// Source address of frames; `None` if the device is not an Ethernet one.
    pub source_mac: Option<[u8; 6]>,
    /// Destination address of frames; `None` while the neighbour is being asked for or does not answer, and if the
    /// device is not an Ethernet one.
    pub destination_mac: Option<[u8; 6]>,
    /// Largest IP packet on this way in octets.
    pub mtu: u32,
    /// The device is up and its cable present.
    pub running: bool,
    /// The peer's address is one of this host's own.
    pub local: bool,
}

/// What is known of the way to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NextHopState {
    /// Not yet looked up.
    Unknown,
    /// There is none; says why in words for an operator.
    Unreachable(Arc<str>),
    /// There is one.
    Found(NextHop),
}

/// How often to look without being told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHopTiming {
    /// Between two uses of each neighbour, and two look-ups of each route.
    pub refresh: Duration,
    /// Between two uses of a neighbour that does not answer.
    pub retry: Duration,
}

impl Default for NextHopTiming {
    /// 15 s: the shortest time that the kernel trusts a confirmed entry is 15 s (half of base_reachable_time).
    /// 1 s: the kernel's own pace of asking (retrans_time).
    fn default() -> Self {
        Self { refresh: Duration::from_secs(15), retry: Duration::from_secs(1) }
    }
}

/// The least path MTU that an ICMP error may claim, in octets: for IPv4 what Linux believes itself (`net.ipv4.route.min_pmtu`), for IPv6
/// what each link must take (RFC 8200, section 5).
pub(crate) fn least_mtu(to: IpAddr) -> u32 {
    if to.is_ipv4() { 552 } else { 1280 }
}

/// The follower of all peers. Clones share it; its task ends with the last clone.
#[derive(Clone, Debug)]
pub struct NextHops {
    commands: mpsc::UnboundedSender<Command>,
}

/// A peer, and what datagrams to it are like.
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

    /// Follows the way of datagrams. Starts as [`NextHopState::Unknown`]; they are forgotten when the receiver is dropped.
    pub fn watch(&self, flow: Flow) -> watch::Receiver<NextHopState> {
        let (state, receiver) = watch::channel(NextHopState::Unknown);
        // Fails only if the task has ended, which it says in the log; the state stays unknown then.
        self.commands.send(Command::Watch(flow, state)).ok();
        receiver
    }

    /// Waits until nothing is followed any more, which the log has said why.
    pub async fn ended(&self) {
        self.commands.closed().await;
    }

    /// One whose task has ended.
    #[cfg(test)]
    pub fn that_has_ended() -> Self {
        Self { commands: mpsc::unbounded_channel().0 }
    }

    /// Limits the MTU of the ways to `peer` to `mtu` octets for a time, and not to less than a path must take
    /// ([`least_mtu`]). A greater one than is known changes nothing.
    pub fn set_path_mtu(&self, peer: IpAddr, mtu: u32, life: Duration) {
        // As in `watch`.
        self.commands.send(Command::PathMtu { to: peer, mtu, life }).ok();
    }

    /// Looks up the way to `peer` now: it may have changed without a notification. The watchers hear of it if it has.
    pub fn look_again(&self, peer: IpAddr) {
        // As in `watch`.
        self.commands.send(Command::LookAgain(peer)).ok();
    }
}

#[cfg(test)]
mod tests;
