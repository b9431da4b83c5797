//! Next hops of many peers, followed live.
//!
//! One task holds a table of peers and listens to the kernel's notifications of routes, rules, addresses, links and
//! neighbours. A change touches the peers that it can concern, a route for example those inside its prefix. They are marked and asked for again one by one; what is marked twice is asked for once.
//!
//! AF_XDP bypasses the kernel's neighbour table, so the kernel does not see that an entry is in use. The task says so
//! every [`Timing::refresh`], and asks again every [`Timing::retry`] while a neighbour does not answer. The entries stay
//! ordinary ones (`NTF_USE`, not the kernel's managed ones, which would outlive a crashed engine and be asked for for
//! ever). What the kernel changes without a word, such as a learned path MTU, is found at the same pace.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::MulticastGroup;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::events::{Event, Events};
use super::links::{CardKind, LinkTable};
use super::neighbours::Neighbour;
use super::netlink::{Netlink, Result};
use super::routes::{self, Route};

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
pub enum State {
    /// Not yet looked up.
    Unknown,
    /// There is none; says why in words for an operator.
    Unreachable(Arc<str>),
    /// There is one.
    Found(NextHop),
}

/// How often to look without being told to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Between two uses of each neighbour, and two look-ups of each route.
    pub refresh: Duration,
    /// Between two uses of a neighbour that does not answer.
    pub retry: Duration,
}

impl Default for Timing {
    /// 15 s: the shortest time that the kernel trusts a confirmed entry is 15 s (half of base_reachable_time).
    /// 1 s: the kernel's own pace of asking (retrans_time).
    fn default() -> Self {
        Self { refresh: Duration::from_secs(15), retry: Duration::from_secs(1) }
    }
}

/// The follower of all peers. Clones share it; its task ends with the last clone.
#[derive(Clone, Debug)]
pub struct NextHops {
    commands: mpsc::UnboundedSender<Command>,
}

type Peer = (IpAddr, Option<IpAddr>);
type Hop = (u32, IpAddr);

#[derive(Debug)]
struct Command {
    peer: Peer,
    state: watch::Sender<State>,
}

impl NextHops {
    /// Starts following; call it inside a tokio runtime with I/O and time.
    ///
    /// # Errors
    /// No netlink socket can be opened, or devices cannot be listed.
    pub async fn new(netlink: &Netlink, timing: Timing) -> Result<Self> {
        let events = Events::open(&[
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ])?;
        Self::with_events(netlink, events, timing).await
    }

    async fn with_events<E>(netlink: &Netlink, events: E, timing: Timing) -> Result<Self>
    where
        E: Stream<Item = Event> + Send + Unpin + 'static,
    {
        let mut links = LinkTable::default();
        links.reload(netlink).await?;
        let follower = Follower {
            netlink: netlink.clone(),
            links,
            peers: HashMap::new(),
            hops: HashMap::new(),
            marked: HashSet::new(),
            carriers: HashSet::new(),
        };
        let (commands, receiver) = mpsc::unbounded_channel();
        tokio::spawn(follower.run(events, receiver, timing));
        Ok(Self { commands })
    }

    /// Follows the way to `peer`, for packets from the own address `from` if that is given. Starts as
    /// [`State::Unknown`]; the peer is forgotten when the receiver is dropped.
    pub fn watch(&self, peer: IpAddr, from: Option<IpAddr>) -> watch::Receiver<State> {
        let (state, receiver) = watch::channel(State::Unknown);
        // Fails only if the task has ended, which it says in the log; the state stays unknown then.
        self.commands.send(Command { peer: (peer, from), state }).ok();
        receiver
    }
}

/// A peer in the table.
struct Entry {
    route: std::result::Result<Route, Arc<str>>,
    watchers: Vec<watch::Sender<State>>,
}

impl Entry {
    /// The neighbour that frames to the peer go to.
    fn hop(&self, peer: IpAddr) -> Option<Hop> {
        let route = self.route.as_ref().ok().filter(|route| !route.local)?;
        Some((route.oif, route.gateway.unwrap_or(peer)))
    }
}

/// A neighbour that peers are reached by.
#[derive(Default)]
struct Via {
    neighbour: Option<Neighbour>,
    peers: HashSet<Peer>,
}

struct Follower {
    netlink: Netlink,
    links: LinkTable,
    peers: HashMap<Peer, Entry>,
    hops: HashMap<Hop, Via>,
    /// Peers whose route is to be asked for.
    marked: HashSet<Peer>,
    /// Devices that a peer was ever reached by.
    carriers: HashSet<u32>,
}

impl Follower {
    async fn run<E>(mut self, mut events: E, mut commands: mpsc::UnboundedReceiver<Command>, timing: Timing)
    where
        E: Stream<Item = Event> + Unpin,
    {
        let mut refresh = tokio::time::interval(timing.refresh);
        let mut retry = tokio::time::interval(timing.retry);
        refresh.set_missed_tick_behavior(MissedTickBehavior::Delay);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let marked = self.marked.iter().next().copied();
            tokio::select! {
                event = events.next() => match event {
                    Some(Event::Message(message)) => self.take_in(*message),
                    Some(Event::Lost) => self.start_over().await,
                    None => {
                        tracing::error!("netlink notifications ended: carrier routes are not followed any longer");
                        return;
                    }
                },
                command = commands.recv() => match command {
                    Some(command) => self.add(command),
                    None => return,
                },
                _ = refresh.tick() => self.refresh().await,
                _ = retry.tick() => self.retry().await,
                // Ready at once: what has been notified meanwhile gets its turn between two look-ups.
                () = async {}, if marked.is_some() => if let Some(peer) = marked {
                    self.look_up(peer).await;
                },
            }
        }
    }

    fn add(&mut self, Command { peer, state }: Command) {
        match self.peers.get_mut(&peer) {
            Some(entry) => entry.watchers.push(state),
            None => {
                let route = Err(Arc::from("not looked up yet"));
                self.peers.insert(peer, Entry { route, watchers: vec![state] });
                self.marked.insert(peer);
                return;
            }
        }
        // A known peer that is being looked up right now publishes to the new watcher as well.
        if !self.marked.contains(&peer) {
            self.publish(peer);
        }
    }

    fn take_in(&mut self, message: RouteNetlinkMessage) {
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
                    // Somebody flushed it: one peer's look-up asks for it again, for all.
                    self.marked.extend(self.hops.get(&hop).and_then(|via| via.peers.iter().next()));
                }
            }
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => {
                let inside = prefix_of(route);
                self.mark(|peer, _| inside(peer.0));
            }
            RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
                // Routes that prefer an address go with it without a notification.
                let (ifindex, changed) = (address.header.index, address_of(address));
                self.mark(|peer, entry| {
                    let source = entry.route.as_ref().ok().map(|route| route.source);
                    changed.is_some_and(|ip| peer.1 == Some(ip) || source == Some(ip) || peer.0 == ip)
                        || entry.route.as_ref().is_ok_and(|route| route.oif == ifindex)
                });
            }
            RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_) => self.mark(|_, _| true),
            _ => {
                // A carrier that comes or goes may take routes along, or bring them back, without a notification. Other
                // devices do not matter: their new routes are told, and making 10,000 tunnel devices costs nothing here.
                if self.links.apply(&message).iter().any(|event| self.carriers.contains(&event.ifindex)) {
                    self.mark(|_, _| true);
                }
            }
        }
    }

    fn mark(&mut self, concerned: impl Fn(&Peer, &Entry) -> bool) {
        let concerned = self.peers.iter().filter(|(peer, entry)| concerned(peer, entry)).map(|(peer, _)| *peer);
        self.marked.extend(concerned);
    }

    fn set_neighbour(&mut self, hop: Hop, neighbour: Option<Neighbour>) {
        let Some(via) = self.hops.get_mut(&hop) else { return };
        if via.neighbour == neighbour {
            return;
        }
        via.neighbour = neighbour;
        for peer in via.peers.iter().copied().collect::<Vec<_>>() {
            self.publish(peer);
        }
    }

    /// Asks for the route of one peer, and for its neighbour if that is a new one.
    async fn look_up(&mut self, peer: Peer) {
        self.marked.remove(&peer);
        let Some(entry) = self.peers.get_mut(&peer) else { return };
        let route = self.netlink.route(peer.0, peer.1).await;
        let old = entry.hop(peer.0);
        entry.route = route.map_err(|error| error.to_string().into());
        let new = entry.hop(peer.0);
        self.carriers.extend(new.map(|(ifindex, _)| ifindex));
        if old != new {
            if let Some(old) = old {
                self.leave(old, peer);
            }
            if let Some(new) = new {
                self.hops.entry(new).or_default().peers.insert(peer);
            }
        }
        if let Some(hop) = new.filter(|hop| self.hops.get(hop).is_some_and(|via| via.neighbour.is_none())) {
            self.use_neighbour(hop).await;
        }
        self.publish(peer);
    }

    fn leave(&mut self, hop: Hop, peer: Peer) {
        if let Some(via) = self.hops.get_mut(&hop) {
            via.peers.remove(&peer);
            if via.peers.is_empty() {
                self.hops.remove(&hop);
            }
        }
    }

    /// Reads a neighbour's entry and tells the kernel that it is in use, unless an operator has set it.
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
            Ok::<_, super::netlink::Error>(neighbour)
        };
        match result.await {
            Ok(neighbour) => self.set_neighbour(hop, neighbour),
            Err(error) => tracing::debug!("{error}"),
        }
    }

    /// Forgets peers that nobody watches, looks up all others again, and uses all neighbours.
    async fn refresh(&mut self) {
        let mut left = Vec::new();
        self.peers.retain(|peer, entry| {
            entry.watchers.retain(|watcher| !watcher.is_closed());
            if entry.watchers.is_empty() {
                left.extend(entry.hop(peer.0).map(|hop| (hop, *peer)));
            }
            !entry.watchers.is_empty()
        });
        for (hop, peer) in left {
            self.leave(hop, peer);
        }
        self.mark(|_, _| true);
        for hop in self.hops.keys().copied().collect::<Vec<_>>() {
            self.use_neighbour(hop).await;
        }
    }

    /// Asks again for neighbours that do not answer.
    async fn retry(&mut self) {
        let silent = self.hops.iter().filter(|(_, via)| via.neighbour.is_none_or(|neighbour| neighbour.mac.is_none()));
        for hop in silent.map(|(hop, _)| *hop).collect::<Vec<_>>() {
            self.use_neighbour(hop).await;
        }
    }

    /// Notifications were lost: reads everything again.
    async fn start_over(&mut self) {
        tracing::debug!("netlink notifications were lost; reading everything again");
        if let Err(error) = self.links.reload(&self.netlink).await {
            tracing::warn!("{error}");
        }
        self.refresh().await;
    }

    fn publish(&self, peer: Peer) {
        let Some(entry) = self.peers.get(&peer) else { return };
        let state = match &entry.route {
            Ok(route) => self.next_hop(route, entry.hop(peer.0)),
            Err(reason) => State::Unreachable(reason.clone()),
        };
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

    fn next_hop(&self, route: &Route, hop: Option<Hop>) -> State {
        let Some(card) = self.links.get(route.oif) else {
            return State::Unreachable("the carrier device is gone".into());
        };
        let neighbour = hop.and_then(|hop| self.hops.get(&hop)).and_then(|via| via.neighbour);
        State::Found(NextHop {
            ifindex: route.oif,
            source: route.source,
            source_mac: card.mac,
            destination_mac: neighbour.and_then(|neighbour| neighbour.mac).filter(|_| card.mac.is_some()),
            mtu: route.mtu.unwrap_or(card.mtu).min(card.mtu),
            running: card.running,
            local: route.local,
        })
    }
}

/// Whether an address lies inside a route's prefix.
fn prefix_of(route: &RouteMessage) -> impl Fn(IpAddr) -> bool + use<> {
    let bits = u32::from(route.header.destination_prefix_length);
    let family = u8::from(route.header.address_family);
    let destination = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(address) => routes::ip(address),
        _ => None,
    });
    // A default route has no destination.
    move |address| match (address, destination) {
        (IpAddr::V4(a), Some(IpAddr::V4(d))) => (a.to_bits() ^ d.to_bits()).checked_shr(32 - bits).unwrap_or(0) == 0,
        (IpAddr::V6(a), Some(IpAddr::V6(d))) => (a.to_bits() ^ d.to_bits()).checked_shr(128 - bits).unwrap_or(0) == 0,
        (IpAddr::V4(_), None) => family == u8::from(netlink_packet_route::AddressFamily::Inet),
        (IpAddr::V6(_), None) => family == u8::from(netlink_packet_route::AddressFamily::Inet6),
        _ => false,
    }
}

fn address_of(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    // IPv6 addresses without a peer have the address attribute only.
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests;
