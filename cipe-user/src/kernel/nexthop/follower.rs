//! The table of peers, and the task that keeps it up to date.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use futures_util::Stream;
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior};

use super::super::events::{Changes, NetlinkEvent};
use super::super::links::{CardKind, LinkTable};
use super::super::local_addresses::local_of;
use super::super::neighbours::Neighbour;
use super::super::netlink::{Error, Netlink, Result};
use super::super::routes::{self, Route};
use super::{Command, NextHop, NextHopState, NextHopTiming, Peer, least_mtu};

/// A neighbour: index of the device that reaches it, and its IP address.
type Hop = (u32, IpAddr);

/// A peer in the table.
struct Entry {
    route: std::result::Result<Route, Arc<str>>,
    watchers: Vec<watch::Sender<NextHopState>>,
}

impl Entry {
    /// Returns the neighbour that gets the frames to the peer.
    fn hop(&self, peer: IpAddr) -> Option<Hop> {
        let route = self.route.as_ref().ok().filter(|route| !route.local)?;
        Some((route.oif, route.gateway.unwrap_or(peer)))
    }
}

/// A neighbour that is the next hop of some peers.
#[derive(Default)]
struct NeighbourUse {
    neighbour: Option<Neighbour>,
    peers: HashSet<Peer>,
}

/// The task behind [`super::NextHops`].
pub(super) struct NextHopFollower {
    netlink: Netlink,
    links: LinkTable,
    /// Whether the last attempt to read the links has failed.
    links_are_old: bool,
    peers: HashMap<Peer, Entry>,
    hops: HashMap<Hop, NeighbourUse>,
    /// Peers that have to be looked up again.
    marked: HashSet<Peer>,
    /// Indexes of all devices that have ever been the egress device of a peer.
    carriers: HashSet<u32>,
    /// Proven path MTUs by peer address, in octets, and when they expire.
    path_mtus: HashMap<IpAddr, (u32, Instant)>,
}

impl NextHopFollower {
    /// Creates an empty table of peers, and reads all devices.
    pub(super) async fn new(netlink: &Netlink) -> Result<Self> {
        let mut links = LinkTable::default();
        links.reload(netlink).await?;
        Ok(Self {
            netlink: netlink.clone(),
            links,
            links_are_old: false,
            peers: HashMap::new(),
            hops: HashMap::new(),
            marked: HashSet::new(),
            carriers: HashSet::new(),
            path_mtus: HashMap::new(),
        })
    }

    /// Runs until the last sender of commands is dropped.
    pub(super) async fn run<E>(
        mut self,
        events: E,
        mut commands: mpsc::UnboundedReceiver<Command>,
        timing: NextHopTiming,
    ) where
        E: Stream<Item = NetlinkEvent> + Unpin,
    {
        let mut notifications = Changes::new(events);
        let mut refresh = tokio::time::interval(timing.refresh);
        let mut retry = tokio::time::interval(timing.retry);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let marked = self.marked.iter().next().copied();
            tokio::select! {
                event = notifications.next() => match event {
                    Some(NetlinkEvent::Message(message)) => self.handle_message(*message),
                    Some(NetlinkEvent::Lost) => self.start_over().await,
                    None => {
                        tracing::error!("netlink notifications ended: carrier routes are not followed any longer");
                        return;
                    }
                },
                command = commands.recv() => match command {
                    Some(Command::Watch(peer, state)) => self.add(peer, state),
                    Some(Command::LookAgain(address)) => self.mark(|peer, _| peer.to == address),
                    Some(Command::PathMtu { to, mtu, life }) => self.set_path_mtu(to, mtu, Instant::now() + life),
                    None => return,
                },
                _ = refresh.tick() => self.refresh().await,
                _ = retry.tick() => self.retry().await,
                // Always ready, so that new notifications and commands are handled between two look-ups.
                () = async {}, if marked.is_some() => if let Some(peer) = marked {
                    self.look_up(peer).await;
                },
            }
        }
    }

    fn add(&mut self, peer: Peer, state: watch::Sender<NextHopState>) {
        // A known peer that is marked publishes to the new watcher after its look-up.
        if !self.marked.contains(&peer)
            && let Some(known) = self.state(peer)
        {
            state.send_replace(known);
        }
        match self.peers.get_mut(&peer) {
            Some(entry) => entry.watchers.push(state),
            None => {
                let route = Err(Arc::from("not looked up yet"));
                self.peers.insert(peer, Entry { route, watchers: vec![state] });
                self.marked.insert(peer);
            }
        }
    }

    /// Returns the state of a peer in the table.
    fn state(&self, peer: Peer) -> Option<NextHopState> {
        let entry = self.peers.get(&peer)?;
        Some(match &entry.route {
            Ok(route) => self.next_hop(route, entry.hop(peer.to), self.path_mtus.get(&peer.to)),
            Err(reason) => NextHopState::Unreachable(reason.clone()),
        })
    }

    fn handle_message(&mut self, message: RouteNetlinkMessage) {
        match &message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => {
                if let Some(neighbour) = Neighbour::from_message(neighbour) {
                    self.set_neighbour((neighbour.ifindex, neighbour.address), Some(neighbour));
                }
            }
            RouteNetlinkMessage::DelNeighbour(neighbour) => {
                if let Some(neighbour) = Neighbour::from_message(neighbour) {
                    let hop = (neighbour.ifindex, neighbour.address);
                    self.set_neighbour(hop, None);
                    // Somebody flushed the entry. The look-up of one peer makes the kernel resolve it again, for all
                    // peers.
                    self.marked.extend(self.hops.get(&hop).and_then(|neighbour_use| neighbour_use.peers.iter().next()));
                }
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                let inside = prefix_of(route);
                self.mark(|peer, _| inside(peer.to));
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                // The kernel removes routes with this preferred source address without a notification.
                let (ifindex, changed) = (address.header.index, local_of(address));
                self.mark(|peer, entry| {
                    let source = entry.route.as_ref().ok().map(|route| route.source);
                    changed.is_some_and(|ip| peer.from == Some(ip) || source == Some(ip) || peer.to == ip)
                        || entry.route.as_ref().is_ok_and(|route| route.oif == ifindex)
                });
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => self.mark(|_, _| true),
            _ => {
                // A carrier device that goes up or down may remove or restore routes without a notification. Other
                // devices do not matter: the kernel reports their new routes, and 10,000 new tunnel devices cost
                // nothing here.
                if self.links.apply(&message).iter().any(|event| self.carriers.contains(&event.ifindex)) {
                    self.mark(|_, _| true);
                }
            }
        }
    }

    fn set_path_mtu(&mut self, to: IpAddr, mtu: u32, until: Instant) {
        let mtu = mtu.max(least_mtu(to));
        if self.path_mtus.get(&to).is_some_and(|(known, _)| *known < mtu) {
            return;
        }
        self.path_mtus.insert(to, (mtu, until));
        for peer in self.peers.keys().filter(|peer| peer.to == to) {
            self.publish(*peer);
        }
    }

    fn mark(&mut self, concerned: impl Fn(&Peer, &Entry) -> bool) {
        let concerned = self.peers.iter().filter(|(peer, entry)| concerned(peer, entry)).map(|(peer, _)| *peer);
        self.marked.extend(concerned);
    }

    fn set_neighbour(&mut self, hop: Hop, neighbour: Option<Neighbour>) {
        let Some(neighbour_use) = self.hops.get_mut(&hop) else { return };
        if neighbour_use.neighbour == neighbour {
            return;
        }
        neighbour_use.neighbour = neighbour;
        for peer in neighbour_use.peers.iter().copied().collect::<Vec<_>>() {
            self.publish(peer);
        }
    }

    /// Looks up the route of one peer, and its neighbour if that is a new one.
    async fn look_up(&mut self, peer: Peer) {
        self.marked.remove(&peer);
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let route = self.netlink.route_of(peer).await;
        let old = entry.hop(peer.to);
        entry.route = route.map_err(|error| error.to_string().into());
        let new = entry.hop(peer.to);
        self.carriers.extend(new.map(|(ifindex, _)| ifindex));
        if old != new {
            if let Some(old) = old {
                self.leave(old, peer);
            }
            if let Some(new) = new {
                self.hops.entry(new).or_default().peers.insert(peer);
            }
        }
        if let Some(hop) =
            new.filter(|hop| self.hops.get(hop).is_some_and(|neighbour_use| neighbour_use.neighbour.is_none()))
        {
            self.use_neighbour(hop).await;
        }
        self.publish(peer);
    }

    fn leave(&mut self, hop: Hop, peer: Peer) {
        if let Some(neighbour_use) = self.hops.get_mut(&hop) {
            neighbour_use.peers.remove(&peer);
            if neighbour_use.peers.is_empty() {
                self.hops.remove(&hop);
            }
        }
    }

    /// Reads a neighbour's entry, and reports to the kernel that it is in use, unless an operator has set it.
    async fn use_neighbour(&mut self, hop: Hop) {
        let (ifindex, address) = hop;
        if self.links.get(ifindex).is_none_or(|card| card.kind != CardKind::Ethernet || !card.up) {
            return;
        }
        let result = async {
            let neighbour = self.netlink.neighbour(ifindex, address).await?;
            if neighbour.is_none_or(|neighbour| !neighbour.fixed) {
                self.netlink.use_neighbour(ifindex, address).await?;
            }
            Ok::<_, Error>(neighbour)
        };
        match result.await {
            Ok(neighbour) => self.set_neighbour(hop, neighbour),
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Removes peers without watchers and path MTUs that have expired, looks up all others again, and uses all
    /// neighbours.
    async fn refresh(&mut self) {
        let mut left = Vec::new();
        self.peers.retain(|peer, entry| {
            entry.watchers.retain(|watcher| !watcher.is_closed());
            if entry.watchers.is_empty() {
                left.extend(entry.hop(peer.to).map(|hop| (hop, *peer)));
            }
            !entry.watchers.is_empty()
        });
        for (hop, peer) in left {
            self.leave(hop, peer);
        }
        let now = Instant::now();
        self.path_mtus.retain(|_, (_, until)| now < *until);
        self.mark(|_, _| true);
        for hop in self.hops.keys().copied().collect::<Vec<_>>() {
            self.use_neighbour(hop).await;
        }
    }

    /// Uses neighbours that do not answer again, and reads the devices again if that has failed.
    async fn retry(&mut self) {
        if self.links_are_old {
            self.start_over().await;
        }
        let silent = self
            .hops
            .iter()
            .filter(|(_, neighbour_use)| neighbour_use.neighbour.is_none_or(|neighbour| neighbour.mac.is_none()));
        for hop in silent.map(|(hop, _)| *hop).collect::<Vec<_>>() {
            self.use_neighbour(hop).await;
        }
    }

    /// Reads everything again, because notifications were lost.
    async fn start_over(&mut self) {
        tracing::debug!("netlink notifications were lost; reading everything again");
        let read = self.links.reload(&self.netlink).await;
        if let Err(error) = &read {
            tracing::warn!("{error}; read again soon");
        }
        self.links_are_old = read.is_err();
        self.refresh().await;
    }

    fn publish(&self, peer: Peer) {
        let (Some(entry), Some(state)) = (self.peers.get(&peer), self.state(peer)) else { return };
        for watcher in &entry.watchers {
            watcher.send_if_modified(|old| {
                let changed = *old != state;
                if changed {
                    old.clone_from(&state);
                }
                changed
            });
        }
    }

    fn next_hop(&self, route: &Route, hop: Option<Hop>, path_mtu: Option<&(u32, Instant)>) -> NextHopState {
        let Some(card) = self.links.get(route.oif) else {
            return NextHopState::Unreachable("the carrier device is gone".into());
        };
        let neighbour = hop.and_then(|hop| self.hops.get(&hop)).and_then(|neighbour_use| neighbour_use.neighbour);
        NextHopState::Found(NextHop {
            ifindex: route.oif,
            source: route.source,
            source_mac: card.mac,
            destination_mac: neighbour.and_then(|neighbour| neighbour.mac).filter(|_| card.mac.is_some()),
            mtu: path_mtu.map_or(u32::MAX, |(mtu, _)| *mtu).min(route.mtu.unwrap_or(card.mtu)).min(card.mtu),
            running: card.running,
            local: route.local,
        })
    }
}

/// Whether an address is inside a route's prefix.
fn prefix_of(route: &RouteMessage) -> impl Fn(IpAddr) -> bool + use<> {
    let bits = u32::from(route.header.destination_prefix_length);
    let family = u8::from(route.header.address_family);
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => routes::ip(address),
        _ => None,
    });
    // A default route has no destination.
    move |address| match (address, destination) {
        (IpAddr::V4(a), Some(IpAddr::V4(d))) => {
            (a.to_bits() ^ d.to_bits()).checked_shr(32u32.saturating_sub(bits)).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), Some(IpAddr::V6(d))) => {
            (a.to_bits() ^ d.to_bits()).checked_shr(128u32.saturating_sub(bits)).unwrap_or(0) == 0
        }
        (IpAddr::V4(_), None) => family == u8::from(AddressFamily::Inet),
        (IpAddr::V6(_), None) => family == u8::from(AddressFamily::Inet6),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inside(prefix: Option<&str>, bits: u8, address: &str) -> bool {
        let mut route = RouteMessage::default();
        route.header.address_family = if address.contains(':') { AddressFamily::Inet6 } else { AddressFamily::Inet };
        route.header.destination_prefix_length = bits;
        route.attributes.extend(prefix.map(|ip| RouteAttribute::Destination(ip.parse::<IpAddr>().unwrap().into())));
        prefix_of(&route)(address.parse().unwrap())
    }

    #[test]
    fn a_route_concerns_the_peers_inside_its_prefix() {
        assert!(inside(None, 0, "192.0.2.1"));
        assert!(inside(None, 0, "2001:db8::1"));
        assert!(inside(Some("0.0.0.0"), 0, "192.0.2.1"));
        assert!(inside(Some("192.0.2.0"), 24, "192.0.2.255"));
        assert!(!inside(Some("192.0.2.0"), 24, "192.0.3.0"));
        assert!(inside(Some("192.0.2.1"), 32, "192.0.2.1"));
        assert!(!inside(Some("192.0.2.1"), 32, "192.0.2.0"));
        assert!(inside(Some("2001:db8::"), 32, "2001:db8:ffff::1"));
        assert!(!inside(Some("2001:db8::"), 32, "2001:db9::1"));
        assert!(!inside(Some("2001:db8::"), 0, "192.0.2.1"));
    }
}
