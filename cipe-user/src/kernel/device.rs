//! Tunnel devices: a veth pair whose visible end (`cipcb0`) is what the operator routes into, and whose hidden end is the
//! engine's.
//!
//! # Fail closed
//! The kernel drops a packet that was routed into the visible end and met no program on the hidden end, whoever is dead:
//! - The visible end has no ARP, so the kernel writes the visible end's own address as the destination of each frame
//!   (or the TC program its stamp). Neither is the hidden end's: the frame counts as for another host and IP drops it.
//! - Multicast frames are for everybody, but the hidden end has no address, no route and a strict reverse path filter:
//!   no source address can be right there. `forwarding` is off too; alone that would not do, because writing
//!   `net.ipv4.ip_forward` sets it on every device again.
//! - IPv6 is disabled on the hidden end, and nobody listens for other protocols.
//!
//! All this is state of the devices: nothing must run for it to hold.
//!
//! # What arrives on the hidden end (seen on Linux 6.18, AF_PACKET with PACKET_VNET_HDR)
//! | [`Offloads`](super::ethtool::Offloads) | TCP and UDP checksums | frames |
//! | --- | --- | --- |
//! | none | complete | cut to the MTU |
//! | `tx_checksum` | partial (pseudo header only) | cut to the MTU |
//! | `tx_checksum`, `tso`, `uso` | partial | superframes |
//!
//! The kernel cuts and completes after the tc egress hook (seen by mirroring there: 65,160 octets with TSO off): a TC
//! program on the visible end sees superframes with partial checksums whatever the offloads are, and each cut frame
//! carries a copy of what it wrote into the Ethernet header.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL};
use rustix::io::Errno;

use super::addresses::Configuration;
use super::events::Events;
use super::links::Card;
use super::netlink::{Error, Netlink, Result};
use super::owner::{self, Owner};
use super::sysctl::{self, Family};

/// Octets that a device's name may have (IFNAMSIZ without the final zero).
const NAME_MAX: usize = 15;
/// The largest MTU that veth takes: no frame of the engine is ever too large for its own end.
const HIDDEN_MTU: u32 = 65_535;

/// How long an IPv6 address may take to become usable; milliseconds as a rule.
const ADDRESS_DEADLINE: Duration = Duration::from_secs(5);

/// Switches of the hidden end, under net.ipv4.conf. The module's documentation says why.
const HIDDEN_IPV4: [(&str, &str); 4] =
    [("forwarding", "0"), ("rp_filter", "1"), ("accept_local", "0"), ("drop_unicast_in_l2_multicast", "1")];
/// Switches of the hidden end, under net.ipv6.conf.
const HIDDEN_IPV6: [(&str, &str); 1] = [("disable_ipv6", "1")];
/// Switches of the visible end, under net.ipv6.conf: a peer cannot hand out addresses and routes.
const VISIBLE_IPV6: [(&str, &str); 1] = [("accept_ra", "0")];

/// What a tunnel device shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Its name; `None`: the next free one of `prefix`.
    pub name: Option<String>,
    /// Such as `cipcb`.
    pub prefix: String,
    /// Own address on the tunnel.
    pub local: IpAddr,
    /// The peer's address on the tunnel, of the same IP version; unspecified: none.
    pub peer: IpAddr,
    /// MTU of the visible end in octets.
    pub mtu: u32,
    /// Transmit and receive queues of either end; at least 1.
    pub queues: u32,
    /// The process that it is made for: when that ends, the device is a leftover.
    pub owner: u32,
    /// How it is configured beside that.
    pub configuration: Configuration,
}

/// A tunnel device that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name of the visible end when it was made.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// Its address.
    pub mac: [u8; 6],
    /// Name of the hidden end.
    pub hidden_name: String,
    /// Its index.
    pub hidden_index: u32,
    /// Its address.
    pub hidden_mac: [u8; 6],
}

/// A pair of ours as found in the kernel.
struct Pair {
    name: Option<String>,
    index: Option<u32>,
    hidden_index: u32,
    /// The process that it was made for, if it was finished.
    owner: Option<u32>,
    /// That process is gone.
    dead: bool,
}

impl Netlink {
    /// Makes a tunnel device, up, with its addresses. On an error nothing is left behind.
    ///
    /// # Errors
    /// The name is taken or impossible, or the kernel refuses the MTU, an address, or the pair.
    pub async fn make(&self, wanted: &TunnelDevice) -> Result<Device> {
        let name = match &wanted.name {
            Some(name) => valid(name)?.to_owned(),
            // The kernel picks the number, so that two engines never race for one.
            None => format!("{}%d", valid(&wanted.prefix)?),
        };
        let (index, hidden_index) = self.make_pair(&name, wanted).await?;
        match self.configure(wanted, index, hidden_index).await {
            Ok(device) => Ok(device),
            Err(error) => {
                // The error at hand says more than one of the clean-up would.
                self.delete(hidden_index).await.ok();
                Err(error)
            }
        }
    }

    /// Takes over the pair of this name that an engine left behind when it died: one that was made for the same owner,
    /// or whose owner is gone, too. `None` if there is none.
    ///
    /// # Errors
    /// The kernel refuses the MTU or an address. The pair then stays as it is.
    pub async fn adopt(&self, name: &str, wanted: &TunnelDevice) -> Result<Option<Device>> {
        let pair = self
            .pairs()
            .await?
            .into_iter()
            .find(|pair| pair.name.as_deref() == Some(name) && (pair.dead || pair.owner == Some(wanted.owner)));
        match pair.and_then(|pair| pair.index.zip(Some(pair.hidden_index))) {
            Some((index, hidden_index)) => self.configure(wanted, index, hidden_index).await.map(Some),
            None => Ok(None),
        }
    }

    /// Removes a tunnel device. One that is gone already is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove(&self, device: &Device) -> Result<()> {
        // The hidden end cannot have been moved to another namespace by an operator who moved the visible end there.
        self.delete(device.hidden_index).await
    }

    /// Removes what is left of tunnels whose owners are gone; returns the names of the visible ends. [`Netlink::adopt`] first
    /// what shall live on.
    ///
    /// # Errors
    /// Devices cannot be listed, or the kernel refuses to delete one.
    pub async fn sweep(&self) -> Result<Vec<String>> {
        let mut swept = Vec::new();
        for pair in self.pairs().await?.into_iter().filter(|pair| pair.dead) {
            self.delete(pair.hidden_index).await?;
            swept.extend(pair.name);
        }
        Ok(swept)
    }

    async fn make_pair(&self, name: &str, wanted: &TunnelDevice) -> Result<(u32, u32)> {
        let end = |name: String| {
            let mut end = LinkMessage::default();
            end.attributes = vec![
                LinkAttribute::IfName(name),
                LinkAttribute::NumTxQueues(wanted.queues),
                LinkAttribute::NumRxQueues(wanted.queues),
            ];
            end
        };
        let hidden = end(owner::unfinished_template());
        let mut visible = end(name.to_owned());
        let veth = LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(hidden)));
        visible.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Veth), veth]));

        let what = || format!("{}: cannot make a veth pair", name.replace("%d", "N"));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        let answers = self.request(what, RouteNetlinkMessage::NewLink(visible), flags).await;
        let answers = answers.map_err(|error| match error.errno() {
            Some(errno) if errno == Errno::EXIST.raw_os_error() => Error::NameTaken(name.to_owned()),
            _ => error,
        })?;
        // The echo tells which name and index the kernel chose (Linux 6.2 and later).
        let made = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some((link.header.index, peer_of(&link)?)),
            _ => None,
        });
        made.ok_or_else(|| Error::Answer(what()))
    }

    /// Brings a fresh or adopted pair into the wanted state; the visible end goes up last.
    async fn configure(&self, wanted: &TunnelDevice, index: u32, hidden_index: u32) -> Result<Device> {
        let name = self.card(index).await?.name;
        let owner = Owner::of(wanted.owner).ok_or_else(|| Error::Io {
            what: format!("/proc/{}/stat: cannot read", wanted.owner),
            cause: std::io::ErrorKind::NotFound.into(),
        })?;
        let what = || format!("{name}: cannot configure its hidden end");
        self.set_link(what, hidden_index, vec![LinkAttribute::IfAlias(owner.alias(&name))], None).await?;
        let hidden_name = self.rename_hidden(&name, hidden_index).await?;
        for (switch, value) in HIDDEN_IPV4 {
            sysctl::set(Family::Ipv4, &hidden_name, switch, value)?;
        }
        for (switch, value) in HIDDEN_IPV6 {
            sysctl::set(Family::Ipv6, &hidden_name, switch, value)?;
        }
        self.without_own_addresses(hidden_index).await?;
        self.set_link(what, hidden_index, vec![LinkAttribute::Mtu(HIDDEN_MTU)], Some(LinkFlags::Noarp)).await?;
        self.set_link(what, hidden_index, Vec::new(), Some(LinkFlags::Noarp | LinkFlags::Up)).await?;

        let what = || format!("{name}: cannot set the MTU to {}", wanted.mtu);
        self.set_link(what, index, vec![LinkAttribute::Mtu(wanted.mtu)], Some(LinkFlags::Noarp)).await?;
        if let Some(mac) = wanted.configuration.mac {
            let what = || format!("{name}: cannot set its Ethernet address");
            self.set_link(what, index, vec![LinkAttribute::Address(mac.to_vec())], None).await?;
        }
        for (switch, value) in VISIBLE_IPV6 {
            sysctl::set(Family::Ipv6, &name, switch, value)?;
        }
        self.without_own_addresses(index).await?;
        let what = || format!("{name}: cannot take it up");
        self.set_link(what, index, Vec::new(), Some(LinkFlags::Noarp | LinkFlags::Up)).await?;
        // IPv6 makes the route to the peer only if the device is up.
        let events = Events::open(&[MulticastGroup::Ipv6Route])?;
        if wanted.configuration.addresses {
            self.set_addresses(&name, index, (wanted.local, wanted.peer), &wanted.configuration).await?;
        }
        if wanted.configuration.addresses && wanted.peer.is_ipv6() && !wanted.peer.is_unspecified() {
            self.routed(events, &name, index, wanted.peer).await;
        }

        let (visible, hidden) = (self.card(index).await?, self.card(hidden_index).await?);
        let mac = |card: &Card| card.mac.ok_or_else(|| Error::Answer(format!("{}: has no address", card.name)));
        let (mac, hidden_mac) = (mac(&visible)?, mac(&hidden)?);
        Ok(Device { name: visible.name, index, mac, hidden_name: hidden.name, hidden_index, hidden_mac })
    }

    /// Names the hidden end after the visible one, if that fits and is free; it has a name of its own else.
    async fn rename_hidden(&self, name: &str, hidden_index: u32) -> Result<String> {
        let wanted = format!("{name}x");
        if wanted.len() <= NAME_MAX {
            let what = || format!("{name}: cannot rename its hidden end to {wanted}");
            let rename = vec![LinkAttribute::IfName(wanted.clone())];
            match self.set_link(what, hidden_index, rename, None).await {
                Ok(()) => return Ok(wanted),
                Err(error) if error.errno() == Some(Errno::EXIST.raw_os_error()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(self.card(hidden_index).await?.name)
    }

    /// No IPv6 link-local address, hence no router solicitations and no duplicate address detection.
    async fn without_own_addresses(&self, index: u32) -> Result<()> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let what = || format!("device {index}: cannot turn off its link-local address");
        match self.set_link(what, index, vec![LinkAttribute::AfSpecUnspec(vec![mode])], None).await {
            // No IPv6 in the kernel, or none on a device with an MTU below 1280.
            Err(error) if error.errno() == Some(Errno::AFNOSUPPORT.raw_os_error()) => Ok(()),
            result => result,
        }
    }

    /// Sets attributes and, of the flags up, noarp and multicast, exactly those given.
    async fn set_link(
        &self,
        what: impl FnOnce() -> String,
        index: u32,
        attributes: Vec<LinkAttribute>,
        flags: Option<LinkFlags>,
    ) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        if let Some(flags) = flags {
            message.header.flags = flags;
            message.header.change_mask = flags | LinkFlags::Noarp | LinkFlags::Multicast;
        }
        self.request(what, RouteNetlinkMessage::SetLink(message), NLM_F_ACK).await.map(drop)
    }

    /// Waits until packets to the peer go into the device: an IPv6 address is usable a little later than set, and
    /// scripts of the operator that follow want to set routes by it.
    async fn routed(&self, mut events: Events, name: &str, index: u32, peer: IpAddr) {
        let wait = async {
            while !self.route(peer, None).await.is_ok_and(|route| route.oif == index) {
                events.next().await;
            }
        };
        if tokio::time::timeout(ADDRESS_DEADLINE, wait).await.is_err() {
            tracing::warn!("{name}: the kernel has no route to {peer} by it yet");
        }
    }

    async fn delete(&self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let what = || format!("device {index}: cannot delete it");
        match self.request(what, RouteNetlinkMessage::DelLink(message), NLM_F_ACK).await {
            Err(error) if error.errno() == Some(Errno::NODEV.raw_os_error()) => Ok(()),
            result => result.map(drop),
        }
    }

    async fn pairs(&self) -> Result<Vec<Pair>> {
        let links = self.links().await?;
        let pair = |hidden: &LinkMessage| {
            let (owner, dead) = hidden.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfAlias(alias) => {
                    Owner::from_alias(alias).map(|owner| (Some(owner.pid()), owner.is_dead()))
                }
                LinkAttribute::IfName(name) => owner::unfinished_is_dead(name).map(|dead| (None, dead)),
                _ => None,
            })?;
            let index = peer_of(hidden);
            let visible = links.iter().find(|link| Some(link.header.index) == index).and_then(Card::from_message);
            Some(Pair { name: visible.map(|card| card.name), index, hidden_index: hidden.header.index, owner, dead })
        };
        Ok(links.iter().filter_map(pair).collect())
    }
}

fn peer_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}

/// What the kernel's dev_valid_name() takes, without the percent sign, which would make it a template.
fn valid(name: &str) -> Result<&str> {
    let bad = |octet: u8| matches!(octet, b'/' | b':' | b'%') || octet.is_ascii_whitespace() || octet == 0;
    if name.is_empty() || name.len() > NAME_MAX || matches!(name, "." | "..") || name.bytes().any(bad) {
        return Err(Error::NameInvalid(name.to_owned()));
    }
    Ok(name)
}

#[cfg(test)]
mod tests;
