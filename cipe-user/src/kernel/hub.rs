//! Hubs: veth pairs that carry tunnel devices. The visible end (`cipehub0`) carries the devices; the engine uses the
//! hidden end (`cipehub0x`). A thousand tunnels share one XDP program, one AF_XDP socket per queue and one injector;
//! with a veth pair each, they would need a thousand of them.
//!
//! # Fail closed
//! The kernel drops every packet that was routed into a tunnel device and that no program took, even if daemon and
//! engine are dead:
//! - Tunnel devices have no ARP, so the kernel writes the device's own address as the destination of each frame (or the
//!   TC program writes its stamp). Neither is the hidden end's address: the frame counts as for another host, and IP
//!   drops it.
//! - Multicast frames are for all hosts, but the hidden end has no address, no route and a strict reverse path filter,
//!   which accepts no source address there. `forwarding` is off too; that alone is not enough, because writing
//!   `net.ipv4.ip_forward` sets it again on every device.
//! - IPv6 is disabled on the hidden end, and no program listens for other protocols.
//! - A frame that leaves the visible end and is for no tunnel device is dropped for the same reasons.
//!
//! An Ethernet tunnel has its own pair; the visible end is the tunnel's device. Frames in this pair, even those to the
//! hidden end's own address, are dropped for the same reasons: no address, no route, no ARP.
//!
//! All this is state of the devices, so no process has to run.

use std::collections::HashSet;
use std::fmt;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::device::Device;
use super::ethtool::{self, Offloads};
use super::links::{self, Card, CardKind};
use super::netlink::{Error, Netlink, Result};
use super::owner::{self, Owner};
use super::sysctl::Family;

/// The kernel chooses the number, so that processes never compete for a name.
const NAME_TEMPLATE: &str = "cipehub%d";
/// The maximum MTU of a veth: no frame of a tunnel is too large for a hub.
pub(super) const MTU: u32 = 65_535;

/// Switches of both ends, under net.ipv4.conf. The module's documentation gives the reasons.
const IPV4: [(&str, &str); 4] =
    [("forwarding", "0"), ("rp_filter", "1"), ("accept_local", "0"), ("drop_unicast_in_l2_multicast", "1")];
/// The same under net.ipv6.conf.
const IPV6: [(&str, &str); 1] = [("disable_ipv6", "1")];

/// The kind of frames that tunnel devices send to a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Framing {
    /// Superframes with partial checksums, for generic XDP: the engine segments them.
    Superframes,
    /// Single frames with complete checksums, for native XDP.
    SingleFrames,
    /// A pair of one Ethernet tunnel, whose device is the visible end: single frames as on a wire, until the engine
    /// takes superframes.
    Ethernet,
}

impl Framing {
    const ALL: [Self; 3] = [Self::Superframes, Self::SingleFrames, Self::Ethernet];

    fn offloads(self) -> Offloads {
        match self {
            Self::Superframes => Offloads::SUPERFRAMES,
            Self::SingleFrames | Self::Ethernet => Offloads::SINGLE_FRAMES,
        }
    }
}

impl fmt::Display for Framing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Superframes => "superframes",
            Self::SingleFrames => "single frames",
            Self::Ethernet => "Ethernet frames",
        })
    }
}

/// An existing hub.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hub {
    /// Name of the visible end at its creation.
    pub name: String,
    /// Index of the visible end, on which tunnel devices are made.
    pub index: u32,
    /// Index of the hidden end.
    pub hidden_index: u32,
    /// Address of the hidden end: the source of frames to tunnel devices.
    pub hidden_mac: [u8; 6],
    /// The kind of frames that arrive at the hidden end.
    pub framing: Framing,
}

/// A tunnel device that a dead engine left, and whose owner lived then.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// The device.
    pub device: Device,
    /// Index of the visible end of its hub.
    pub hub: u32,
    owner: Owner,
}

impl Waiting {
    /// Whether its owner has ended since.
    pub fn is_leftover(&self) -> bool {
        self.owner.is_dead()
    }
}

/// The devices that a dead engine left.
#[derive(Debug, Default)]
pub struct Inheritance {
    /// Names of tunnel devices whose owners have ended; they were removed.
    pub swept: Vec<String>,
    /// Hubs of tunnel devices whose owners live: adopt the devices by [`Netlink::adopt`]. The other hubs were removed.
    pub hubs: Vec<Hub>,
    /// Those devices.
    pub waiting: Vec<Waiting>,
}

impl Netlink {
    /// Makes a hub and sets it up, with `queues` transmit and receive queues at either end. After an error nothing is
    /// left behind.
    ///
    /// # Errors
    /// The kernel refuses the pair or one of its settings.
    pub async fn make_hub(&self, framing: Framing, queues: u32) -> Result<Hub> {
        let visible = vec![LinkAttribute::IfName(NAME_TEMPLATE.to_owned()), LinkAttribute::Mtu(MTU)];
        let (index, hidden_index) = self.make_pair(visible, queues).await?;
        match self.configure_hub(framing, index, hidden_index).await {
            Ok(hub) => Ok(hub),
            Err(error) => {
                // The first error is more useful than an error of the clean-up.
                self.delete(hidden_index).await.ok();
                Err(error)
            }
        }
    }

    /// Removes a hub and all devices on it. A missing hub is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove_hub(&self, hub: &Hub) -> Result<()> {
        self.delete(hub.hidden_index).await
    }

    /// Whether a hub has tunnel devices, in this network namespace.
    ///
    /// # Errors
    /// Devices cannot be listed.
    pub async fn is_in_use(&self, hub: &Hub) -> Result<bool> {
        Ok(self.links().await?.iter().any(|link| links::lower_of(link) == Some(hub.index) && is_macvlan(link)))
    }

    /// Adopts the hubs of dead engines, with the tunnel devices whose owners live, and removes the rest. Those that are `known` are
    /// as their engine has set them up, and get a new owner only.
    ///
    /// # Errors
    /// Devices cannot be listed, or the kernel refuses to delete one.
    pub async fn inherit(&self, known: &[Hub]) -> Result<Inheritance> {
        let links = self.links().await?;
        let mut inheritance = Inheritance::default();
        for hidden in &links {
            let framing = match hub_of(hidden) {
                Some(Found::Hub(framing)) => Some(framing),
                Some(Found::Unfinished) => None,
                None => continue,
            };
            let index = links::lower_of(hidden);
            // A hub carries devices; the visible end of an Ethernet tunnel's pair is itself the device.
            let on_it = |link: &&LinkMessage| match framing {
                Some(Framing::Ethernet) => index == Some(link.header.index),
                _ => index.is_some() && links::lower_of(link) == index && is_macvlan(link),
            };
            let (dead, alive): (Vec<_>, Vec<_>) = links.iter().filter(on_it).partition(|link| is_leftover(link));
            inheritance.swept.extend(dead.iter().filter_map(|link| Some(Card::from_message(link)?.name)));
            match framing.zip(index).filter(|_| !alive.is_empty()) {
                Some((framing, index)) => {
                    inheritance.waiting.extend(alive.into_iter().filter_map(|link| waiting(link, index)));
                    for link in dead {
                        self.delete(link.header.index).await?;
                    }
                    let hidden = hidden.header.index;
                    let known = known.iter().find(|hub| (hub.index, hub.hidden_index) == (index, hidden));
                    inheritance.hubs.push(match (known, framing) {
                        (Some(hub), _) => {
                            self.own(&hub.name, framing, hidden).await?;
                            hub.clone()
                        }
                        (None, Framing::Ethernet) => self.configure_ends(framing, index, hidden).await?,
                        (None, _) => self.configure_hub(framing, index, hidden).await?,
                    });
                }
                // All devices on it are removed with it.
                None => self.delete(hidden.header.index).await?,
            }
        }
        Ok(inheritance)
    }

    /// Returns the maximum number of receive queues in use of all Ethernet devices except hubs, whether up or not; 0:
    /// there is no device.
    ///
    /// # Errors
    /// Devices cannot be listed.
    pub async fn most_receive_queues(&self) -> Result<u32> {
        let links = self.links().await?;
        let hidden = links.iter().filter(|link| links::alias_of(link).is_some_and(is_alias));
        let hubs: HashSet<u32> =
            hidden.flat_map(|link| [Some(link.header.index), links::lower_of(link)]).flatten().collect();
        let is_of_hub = |card: &Card| hubs.contains(&card.ifindex);
        let cards = links.iter().filter(|link| !is_macvlan(link)).filter_map(Card::from_message);
        let cards = cards.filter(|card| card.kind == CardKind::Ethernet && !is_of_hub(card));
        // Most devices can have one queue only, and need no request.
        Ok(cards
            .map(|card| if card.receive_queues > 1 { card.with_queues_in_use().receive_queues } else { 1 })
            .max()
            .unwrap_or(0))
    }

    /// Makes a pair whose visible end has these attributes, including its name; returns the indexes of both ends.
    pub(super) async fn make_pair(&self, visible: Vec<LinkAttribute>, queues: u32) -> Result<(u32, u32)> {
        let name = visible.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        let name = name.unwrap_or_default();
        let end = |mut attributes: Vec<LinkAttribute>| {
            attributes.extend([LinkAttribute::NumTxQueues(queues), LinkAttribute::NumRxQueues(queues)]);
            let mut end = LinkMessage::default();
            end.attributes = attributes;
            end
        };
        let hidden = end(vec![LinkAttribute::IfName(owner::unfinished_template()), LinkAttribute::Mtu(MTU)]);
        let mut visible = end(visible);
        let veth = LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(hidden)));
        visible.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), veth]));
        let what = || format!("{}: cannot make a veth pair", name.replace("%d", "N"));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        let answers = self.request(what, RouteNetlinkMessage::NewLink(visible), flags).await;
        let answers = answers.map_err(|error| match error.is(Errno::EXIST) {
            true => Error::NameTaken(name.clone()),
            false => error,
        })?;
        // The echo has the name and index that the kernel chose (Linux 6.2 and later).
        let made = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some((link.header.index, links::lower_of(&link)?)),
            _ => None,
        });
        match made {
            Some(made) => Ok(made),
            None => self.unfinished().await?.ok_or_else(|| Error::Answer(what())),
        }
    }

    /// Finds the last pair that this process made and did not finish: visible and hidden end.
    async fn unfinished(&self) -> Result<Option<(u32, u32)>> {
        let ours = |link: &&LinkMessage| {
            links::alias_of(link).is_none()
                && Card::from_message(link).is_some_and(|card| owner::unfinished_is_own(&card.name))
        };
        let links = self.links().await?;
        let hidden = links.iter().filter(ours).max_by_key(|link| link.header.index);
        Ok(hidden.and_then(|hidden| Some((links::lower_of(hidden)?, hidden.header.index))))
    }

    /// Configures a new or adopted pair for this process.
    async fn configure_hub(&self, framing: Framing, index: u32, hidden_index: u32) -> Result<Hub> {
        let name = self.card(index).await?.name;
        self.silence(&name, index).await?;
        let hub = self.configure_ends(framing, index, hidden_index).await?;
        let what = || format!("{name}: cannot set it up");
        self.set_link(what, index, Vec::new(), Some(LinkFlags::Noarp | LinkFlags::Up)).await?;
        Ok(hub)
    }

    /// Configures the hidden end of a new or adopted pair for this process, and sets the offloads of the visible end.
    /// The caller configures the rest of the visible end.
    pub(super) async fn configure_ends(&self, framing: Framing, index: u32, hidden_index: u32) -> Result<Hub> {
        let name = self.card(index).await?.name;
        let what = || format!("{name}: cannot configure its hidden end");
        self.own(&name, framing, hidden_index).await?;
        let hidden_name = self.rename_hidden(&name, hidden_index).await?;
        self.silence(&hidden_name, hidden_index).await?;
        ethtool::set_offloads(&name, index, framing.offloads())?;
        if framing == Framing::Ethernet {
            ethtool::tag_in_the_frame(&name, index)?;
        }
        self.set_link(what, hidden_index, Vec::new(), Some(LinkFlags::Noarp | LinkFlags::Up)).await?;
        let hidden_mac = self.card(hidden_index).await?.mac;
        let hidden_mac = hidden_mac.ok_or_else(|| Error::Answer(format!("{hidden_name}: has no address")))?;
        Ok(Hub { name, index, hidden_index, hidden_mac, framing })
    }

    /// Makes this process the owner of a pair.
    async fn own(&self, name: &str, framing: Framing, hidden_index: u32) -> Result<()> {
        let what = || format!("{name}: cannot take it over");
        let alias = Owner::of(std::process::id())?.alias(&alias_for(framing));
        self.set_link(what, hidden_index, vec![LinkAttribute::IfAlias(alias)], None).await
    }

    /// Configures an end so that it sends no packets of its own and accepts none.
    async fn silence(&self, name: &str, index: u32) -> Result<()> {
        for (switch, value) in IPV4 {
            self.set_switch(Family::Ipv4, (name, index), switch, value).await?;
        }
        for (switch, value) in IPV6 {
            self.set_switch(Family::Ipv6, (name, index), switch, value).await?;
        }
        self.without_own_addresses(index).await?;
        let what = || format!("{name}: cannot silence it");
        self.set_link(what, index, Vec::new(), Some(LinkFlags::Noarp)).await
    }

    /// Renames the hidden end after the visible one. If the name is taken, or the end is up on a kernel before 6.2
    /// (which cannot rename it), it keeps its name. Returns its name.
    async fn rename_hidden(&self, name: &str, hidden_index: u32) -> Result<String> {
        let wanted = format!("{name}x");
        let present = self.card(hidden_index).await?.name;
        if present == wanted {
            return Ok(wanted);
        }
        let what = || format!("{name}: cannot rename its hidden end to {wanted}");
        match self.set_link(what, hidden_index, vec![LinkAttribute::IfName(wanted.clone())], None).await {
            Ok(()) => Ok(wanted),
            Err(error) if error.is(Errno::EXIST) || error.is(Errno::BUSY) => Ok(present),
            Err(error) => Err(error),
        }
    }
}

/// A hidden end whose engine has ended.
enum Found {
    Hub(Framing),
    /// The engine died while it made the pair.
    Unfinished,
}

fn hub_of(link: &LinkMessage) -> Option<Found> {
    if let Some(alias) = links::alias_of(link) {
        let (what, owner) = Owner::from_alias(alias)?;
        let framing = Framing::ALL.into_iter().find(|framing| what == alias_for(*framing))?;
        return owner.is_dead().then_some(Found::Hub(framing));
    }
    let name = Card::from_message(link)?.name;
    owner::unfinished_is_dead(&name).filter(|dead| *dead).map(|_| Found::Unfinished)
}

/// Whether an alias is that of a hub's hidden end, of whichever engine.
fn is_alias(alias: &str) -> bool {
    Owner::from_alias(alias).is_some_and(|(what, _)| Framing::ALL.into_iter().any(|framing| what == alias_for(framing)))
}

fn alias_for(framing: Framing) -> String {
    format!("cipe hub of {framing}")
}

/// Whether a device on a dead engine's hub has no living owner. A device without an alias was never finished. If an
/// operator has changed the alias, the owner is unknown, and the device stays.
fn is_leftover(link: &LinkMessage) -> bool {
    links::alias_of(link).is_none_or(|alias| Owner::from_alias(alias).is_some_and(|(_, owner)| owner.is_dead()))
}

/// A device with a known owner on the hub of this index.
fn waiting(link: &LinkMessage, hub: u32) -> Option<Waiting> {
    let (_, owner) = Owner::from_alias(links::alias_of(link)?)?;
    let card = Card::from_message(link)?;
    let device = Device { name: card.name, index: card.ifindex, mac: card.mac? };
    Some(Waiting { device, hub, owner })
}

/// Whether a network device is one end of a veth pair.
pub(super) fn is_veth(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    })
}

pub(super) fn is_macvlan(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::MacVlan)),
        _ => false,
    })
}

#[cfg(test)]
mod tests;
