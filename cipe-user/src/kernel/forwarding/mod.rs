//! A copy of the kernel's forwarding data: its routes and its neighbours, followed live.
//!
//! A task listens to the kernel's notifications. A notification of a neighbour has its new state. After a change of
//! routes, rules, addresses or devices, the task reads everything again, since the kernel does not report each removed
//! route (such as those of a device that goes down). Changes that come together cause one reading.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::Stream;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::NLM_F_DUMP;
use rustix::io::Errno;
use tokio::sync::watch;
use tokio::time::Instant;

use super::events::{Changes, FORWARDING, NetlinkEvent, NetlinkEvents};
use super::neighbours::Neighbour;
use super::netlink::{Netlink, Result};
use super::sysctl::{self, Family};
pub use prefix::{Prefix, PrefixMap};
pub use routes::{DeviceRoute, PrefixTarget};

mod prefix;
mod routes;

/// From the first change to the reading that includes the changes after it.
const SETTLE_DELAY: Duration = Duration::from_millis(10);

/// Reachable neighbours, by device and address.
pub type Neighbours = HashMap<(u32, IpAddr), Near>;

/// The link-layer data of a neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Near {
    /// Its address.
    pub mac: [u8; 6],
    /// Whether it was set by hand or is not needed: such an entry is never resolved.
    pub fixed: bool,
}

/// The kernel's forwarding data at one moment.
#[derive(Clone, Debug, Default)]
pub struct Picture {
    /// The destinations of prefixes.
    pub routes: Arc<PrefixMap<PrefixTarget>>,
    /// Whether rules for IPv4, for IPv6 decide more than the routes: then the path of a packet is unknown.
    pub ruled: [bool; 2],
    /// The neighbours.
    pub neighbours: Arc<Neighbours>,
}

/// Follows routes and neighbours from now on. The task ends when the receiver is dropped.
///
/// # Errors
/// No netlink socket can be opened, or the tables cannot be read.
pub async fn follow(netlink: &Netlink) -> Result<watch::Receiver<Picture>> {
    let events = NetlinkEvents::open(&FORWARDING)?;
    let mut follower = ForwardingFollower { netlink: netlink.clone(), picture: Picture::default() };
    follower.read_neighbours().await?;
    follower.read_routes().await?;
    let (sender, receiver) = watch::channel(follower.picture.clone());
    tokio::spawn(follower.run(events, sender));
    Ok(receiver)
}

/// Whether the kernel forwards packets that it receives on a device, by `net.ipv4.conf.DEVICE.forwarding` or its IPv6
/// equivalent.
pub fn is_on(device: &str, v6: bool) -> bool {
    let family = if v6 { Family::Ipv6 } else { Family::Ipv4 };
    sysctl::get(family, device, "forwarding").is_some_and(|value| value != "0")
}

struct ForwardingFollower {
    netlink: Netlink,
    picture: Picture,
}

/// The changes since the last reading.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Changed {
    routes: bool,
    neighbours: bool,
    /// Notifications were lost.
    all: bool,
}

impl ForwardingFollower {
    async fn run<E>(mut self, events: E, pictures: watch::Sender<Picture>)
    where
        E: Stream<Item = NetlinkEvent> + Unpin,
    {
        let mut notifications = Changes::new(events);
        let mut changed = Changed::default();
        let mut due = Instant::now();
        loop {
            let waits = changed != Changed::default();
            tokio::select! {
                event = notifications.next() => {
                    match event {
                        Some(NetlinkEvent::Message(message)) => self.handle_message(&message, &mut changed),
                        Some(NetlinkEvent::Lost) => changed.all = true,
                        None => {
                            tracing::error!("netlink notifications ended: routes of short cuts are not followed any longer");
                            pictures.send_replace(Picture { ruled: [true; 2], ..self.picture });
                            return;
                        }
                    }
                    if !waits {
                        due = Instant::now() + SETTLE_DELAY;
                    }
                }
                () = tokio::time::sleep_until(due), if waits => {
                    if let Err(error) = self.read(std::mem::take(&mut changed)).await {
                        tracing::warn!("{error}; the kernel forwards all packets until its tables can be read");
                        self.picture.ruled = [true; 2];
                        changed.all = true;
                        due = Instant::now() + Duration::from_secs(1);
                    }
                    pictures.send_replace(self.picture.clone());
                }
                () = pictures.closed() => return,
            }
        }
    }

    fn handle_message(&mut self, message: &RouteNetlinkMessage, changed: &mut Changed) {
        match message {
            RouteNetlinkMessage::NewNeighbour(neighbour) => {
                if let Some(neighbour) = Neighbour::from_message(neighbour) {
                    changed.neighbours |= self.set(neighbour);
                }
            }
            RouteNetlinkMessage::DelNeighbour(neighbour) => {
                if let Some(neighbour) = Neighbour::from_message(neighbour) {
                    changed.neighbours |= self.set(Neighbour { mac: None, ..neighbour });
                }
            }
            _ => changed.routes = true,
        }
    }

    /// Stores the new state of a neighbour; returns whether it has changed.
    fn set(&mut self, neighbour: Neighbour) -> bool {
        let key = (neighbour.ifindex, neighbour.address);
        let near = neighbour.mac.map(|mac| Near { mac, fixed: neighbour.fixed });
        if self.picture.neighbours.get(&key).copied() == near {
            return false;
        }
        let neighbours = Arc::make_mut(&mut self.picture.neighbours);
        match near {
            Some(near) => neighbours.insert(key, near),
            None => neighbours.remove(&key),
        };
        true
    }

    async fn read(&mut self, changed: Changed) -> Result<()> {
        if changed.all {
            self.read_neighbours().await?;
        }
        if changed.all || changed.routes {
            self.read_routes().await?;
        }
        Ok(())
    }

    async fn read_neighbours(&mut self) -> Result<()> {
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        let answers = self.dump("neighbours", request).await?;
        let neighbours = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(message) => Neighbour::from_message(message),
            _ => None,
        });
        let near = |neighbour: Neighbour| {
            let near = Near { mac: neighbour.mac?, fixed: neighbour.fixed };
            Some(((neighbour.ifindex, neighbour.address), near))
        };
        self.picture.neighbours = Arc::new(neighbours.filter_map(near).collect());
        Ok(())
    }

    async fn read_routes(&mut self) -> Result<()> {
        let mut routes = Vec::new();
        let mut ruled = [false; 2];
        for (ruled, family) in ruled.iter_mut().zip([AddressFamily::Inet, AddressFamily::Inet6]) {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let rules = match self.dump("routing rules", RouteNetlinkMessage::GetRule(message)).await {
                // A kernel without policy routing, or without IPv6, has no rules.
                Err(error) if error.is(Errno::OPNOTSUPP) || error.is(Errno::AFNOSUPPORT) => Vec::new(),
                rules => rules?,
            };
            *ruled = rules.iter().any(|rule| match rule {
                RouteNetlinkMessage::NewRule(rule) => !routes::is_usual(rule),
                _ => false,
            });
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let found = match self.dump("routes", RouteNetlinkMessage::GetRoute(message)).await {
                Err(error) if error.is(Errno::OPNOTSUPP) || error.is(Errno::AFNOSUPPORT) => Vec::new(),
                found => found?,
            };
            let before = routes.len();
            routes.extend(found.into_iter().filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(route) => Some(route),
                _ => None,
            }));
            *ruled |= routes::goes_by_source(&routes[before..], family);
        }
        self.picture.routes = Arc::new(routes::collect(&routes));
        self.picture.ruled = ruled;
        Ok(())
    }

    async fn dump(&self, what: &str, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.netlink.request(|| format!("cannot read the {what}"), request, NLM_F_DUMP).await
    }
}

#[cfg(test)]
mod tests;
