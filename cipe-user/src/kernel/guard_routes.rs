//! Guard routes: for each route into a tunnel's device, an `unreachable` route to the same destination with the highest metric.
//! It decides for a packet only when the first one is gone, which the kernel removes with the device.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::FutureExt;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::events::{Changes, NetlinkEvent, NetlinkEvents};
use super::netlink::{Netlink, Result};
use super::routes::{ip, priority, table};

/// The protocol of guard routes (`ip route show proto 67`); rt_protos of iproute2 has no such number.
pub const PROTOCOL: u8 = 67;
/// Their metric: every other route to the same destination comes first.
const METRIC: u32 = u32::MAX;
/// Pause before routes that could not be read are read again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// `RT_TABLE_LOCAL`.
const LOCAL: u32 = 255;

/// The packets that a route decides for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Destination {
    /// Prefix of destinations.
    pub to: (IpAddr, u8),
    /// Prefix of sources, for IPv6 only.
    pub from: Option<(IpAddr, u8)>,
    /// Routing table.
    pub table: u32,
    /// TOS; 0: any.
    pub tos: u8,
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to: (to, bits), from, table, tos } = self;
        write!(f, "{to}/{bits}")?;
        if let Some((from, bits)) = from {
            write!(f, " from {from}/{bits}")?;
        }
        if *tos != 0 {
            write!(f, " tos {tos:#x}")?;
        }
        write!(f, " table {table}")
    }
}

impl Destination {
    /// Whether a route to it may be guarded: link-local and multicast destinations never leave by another device.
    fn is_guarded(&self) -> bool {
        let is_local = match self.to.0 {
            IpAddr::V4(to) => to.is_link_local() || to.is_multicast() || to.is_broadcast() || to.is_loopback(),
            IpAddr::V6(to) => to.is_unicast_link_local() || to.is_multicast() || to.is_loopback(),
        };
        self.table != LOCAL && !is_local
    }

    fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.address_family = if self.to.0.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.destination_prefix_length = self.to.1;
        message.header.tos = self.tos;
        message.header.kind = RouteType::Unreachable;
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
        message.attributes = vec![
            RouteAttribute::Destination(self.to.0.into()),
            RouteAttribute::Priority(METRIC),
            RouteAttribute::Table(self.table),
        ];
        if let Some((from, bits)) = self.from {
            message.header.source_prefix_length = bits;
            message.attributes.push(RouteAttribute::Source(from.into()));
        }
        message
    }
}

impl Netlink {
    /// Adds the guard route of a destination. One that is there is no error.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub async fn add_guard_route(&self, guarded: &Destination) -> Result<()> {
        let what = || format!("{guarded}: cannot add a guard route");
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        match self.request(what, RouteNetlinkMessage::NewRoute(guarded.message()), flags).await {
            Err(error) if error.is(Errno::EXIST) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Removes the guard route of a destination. A missing one is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove_guard_route(&self, guarded: &Destination) -> Result<()> {
        let what = || format!("{guarded}: cannot remove its guard route");
        match self.request(what, RouteNetlinkMessage::DelRoute(guarded.message()), NLM_F_ACK).await {
            Err(error) if error.is(Errno::SRCH) || error.is(Errno::NOENT) => Ok(()),
            result => result.map(drop),
        }
    }

    /// The destinations of all guard routes in this network namespace.
    ///
    /// # Errors
    /// Routes cannot be listed.
    pub async fn guard_routes(&self) -> Result<Vec<Destination>> {
        let mut pattern = RouteMessage::default();
        pattern.header.protocol = RouteProtocol::Other(PROTOCOL);
        let routes = self.routes_like(&pattern).await?;
        let guards = routes.iter().filter(|route| route.header.protocol == pattern.header.protocol);
        Ok(guards.filter_map(Leading::from_message).map(|guard| guard.destination).collect())
    }

    /// Lists the routes of both families that the kernel's filter passes: by protocol, type, table or device, whichever is set. All
    /// routes of a gateway with 1,000 tunnels take 20 MB, which each of its daemons would need.
    async fn routes_like(&self, pattern: &RouteMessage) -> Result<Vec<RouteMessage>> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = pattern.clone();
            message.header.address_family = family;
            let what = || "cannot list routes".to_owned();
            let answers = match self.request(what, RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP).await {
                // A kernel without IPv6.
                Err(error) if error.is(Errno::OPNOTSUPP) || error.is(Errno::AFNOSUPPORT) => continue,
                answers => answers?,
            };
            routes.extend(answers.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(route) => Some(route),
                _ => None,
            }));
        }
        Ok(routes)
    }
}

/// A route, and where it leads.
#[derive(Debug)]
struct Leading {
    destination: Destination,
    metric: u32,
    /// Indexes of the devices; none, if it leads nowhere.
    devices: Vec<u32>,
}

impl Leading {
    /// Reads a message; `None` if it is no route of IPv4 or IPv6, or a copy that the kernel made for one destination.
    fn from_message(message: &RouteMessage) -> Option<Self> {
        let header = &message.header;
        let any = match header.address_family {
            AddressFamily::Inet => IpAddr::from([0; 4]),
            AddressFamily::Inet6 => IpAddr::from([0; 16]),
            _ => return None,
        };
        if header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let (mut to, mut from, mut devices) = (any, any, Vec::new());
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(address) => to = ip(address)?,
                RouteAttribute::Source(address) => from = ip(address)?,
                RouteAttribute::Oif(index) => devices.push(*index),
                RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
                _ => {}
            }
        }
        if header.kind != RouteType::Unicast {
            devices.clear();
        }
        let destination = Destination {
            to: (to, header.destination_prefix_length),
            from: (header.source_prefix_length > 0).then_some((from, header.source_prefix_length)),
            table: table(message),
            tos: header.tos,
        };
        Some(Self { destination, metric: priority(message), devices })
    }
}

/// What has changed about the routes into a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteChange {
    /// Packets to this destination are routed into it.
    Led(Destination),
    /// Somebody has removed, or led elsewhere, the last route to this destination. A route that goes with the device is not
    /// told of.
    Withdrawn(Destination),
}

/// The routes into one device, followed.
pub struct DeviceRoutes {
    netlink: Netlink,
    events: Changes<NetlinkEvents>,
    routes: RoutesIn,
    /// Not taken yet.
    changes: Vec<RouteChange>,
    /// Notifications do not tell all of it.
    is_to_be_read: bool,
    /// They could not be read; the next attempt is not before this time.
    next_attempt: Option<Instant>,
}

impl DeviceRoutes {
    /// Follows the routes into the device of this index from now on; those of now are changes, too.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub fn follow(netlink: &Netlink, index: u32) -> Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Route, MulticastGroup::Ipv6Route];
        let events = Changes::new(NetlinkEvents::open(&groups)?);
        let routes = RoutesIn { index, is_up: true, known: HashMap::new() };
        Ok(Self {
            netlink: netlink.clone(),
            events,
            routes,
            changes: Vec::new(),
            is_to_be_read: true,
            next_attempt: None,
        })
    }

    /// Waits until something has changed; `None`: there will be no word of it. Cancel safe.
    pub async fn changed(&mut self) -> Option<()> {
        if let Some(at) = self.next_attempt {
            tokio::time::sleep_until(at).await;
            self.next_attempt = None;
        }
        while self.changes.is_empty() && !self.is_to_be_read {
            let event = self.events.next().await?;
            self.apply(event);
        }
        self.drain();
        Some(())
    }

    /// Takes all changes up to now, also those that nobody has waited for.
    ///
    /// # Errors
    /// Routes cannot be listed.
    pub async fn take(&mut self) -> Result<Vec<RouteChange>> {
        self.drain();
        if self.is_to_be_read {
            self.next_attempt = Some(Instant::now() + RETRY_INTERVAL);
            let mut pattern = RouteMessage::default();
            pattern.attributes.push(RouteAttribute::Oif(self.routes.index));
            let routes = self.netlink.routes_like(&pattern).await?;
            self.next_attempt = None;
            self.routes.read(&routes, &mut self.changes);
            self.is_to_be_read = false;
        }
        Ok(std::mem::take(&mut self.changes))
    }

    /// Applies what has come already.
    fn drain(&mut self) {
        while let Some(event) = self.events.next().now_or_never().flatten() {
            self.apply(event);
        }
    }

    fn apply(&mut self, event: NetlinkEvent) {
        self.is_to_be_read |= match event {
            NetlinkEvent::Message(message) => self.routes.apply(&message, &mut self.changes),
            NetlinkEvent::Lost => true,
        };
    }
}

/// The routes into a device as far as they are known.
#[derive(Debug)]
struct RoutesIn {
    index: u32,
    /// The device is up: the kernel removes no route of its own accord.
    is_up: bool,
    /// Metrics of the routes to each destination, and whether another route has come in the place of one.
    known: HashMap<Destination, HashMap<u32, bool>>,
}

impl RoutesIn {
    /// Takes in a notification; returns whether it leaves open what has become of a route, so that all are to be read.
    fn apply(&mut self, message: &RouteNetlinkMessage, changes: &mut Vec<RouteChange>) -> bool {
        match message {
            RouteNetlinkMessage::NewLink(link) if link.header.index == self.index => {
                self.set_up(link.header.flags.contains(LinkFlags::Up));
            }
            // A port that leaves a bridge is reported as a deleted link of the bridge's family.
            RouteNetlinkMessage::DelLink(link)
                if link.header.index == self.index && u8::from(link.header.interface_family) == 0 =>
            {
                self.set_up(false);
            }
            RouteNetlinkMessage::NewRoute(route) => {
                let Some(Leading { destination, metric, devices }) = Leading::from_message(route) else { return false };
                if devices.contains(&self.index) {
                    self.lead(destination, metric, changes);
                } else if let Some(replaced) = self.known.get_mut(&destination).and_then(|known| known.get_mut(&metric))
                {
                    // It replaces ours, or stands behind it: the kernel tells both in one way.
                    *replaced = true;
                    return true;
                }
            }
            RouteNetlinkMessage::DelRoute(route) => {
                let Some(Leading { destination, metric, devices }) = Leading::from_message(route) else { return false };
                if self.is_up && devices.contains(&self.index) {
                    self.withdraw(destination, metric, changes);
                }
            }
            _ => {}
        }
        false
    }

    /// The kernel tells that the device goes down before it removes its routes.
    fn set_up(&mut self, is_up: bool) {
        self.is_up = is_up;
        if !is_up {
            self.known.clear();
        }
    }

    fn lead(&mut self, destination: Destination, metric: u32, changes: &mut Vec<RouteChange>) {
        if !destination.is_guarded() {
            return;
        }
        let known = self.known.entry(destination).or_default();
        if known.is_empty() {
            changes.push(RouteChange::Led(destination));
        }
        known.insert(metric, false);
    }

    fn withdraw(&mut self, destination: Destination, metric: u32, changes: &mut Vec<RouteChange>) {
        let Some(known) = self.known.get_mut(&destination) else { return };
        known.remove(&metric);
        if known.is_empty() {
            self.known.remove(&destination);
            changes.push(RouteChange::Withdrawn(destination));
        }
    }

    fn read(&mut self, routes: &[RouteMessage], changes: &mut Vec<RouteChange>) {
        let mut present = HashSet::new();
        for Leading { destination, metric, devices } in routes.iter().filter_map(Leading::from_message) {
            if devices.contains(&self.index) {
                self.lead(destination, metric, changes);
                present.insert((destination, metric));
            }
        }
        let replaced = self.known.iter().flat_map(|(destination, known)| {
            known.iter().filter(|(_, replaced)| **replaced).map(|(metric, _)| (*destination, *metric))
        });
        let replaced: Vec<_> = replaced.filter(|route| !present.contains(route)).collect();
        for (destination, metric) in replaced {
            self.withdraw(destination, metric, changes);
        }
    }
}

#[cfg(test)]
mod tests;
