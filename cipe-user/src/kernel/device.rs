//! Tunnel devices: what the operator routes into (`cipcb0`). Each is a macvlan in private mode on a [`Hub`], which costs
//! a fraction of a veth pair of its own, and counts, filters and captures like one.
//!
//! Outbound the device hands its frames to the hub as they are: superframes stay whole, checksums partial. Inbound a frame
//! that the engine injects at the hidden end goes to the device whose address is its destination.
//!
//! # What arrives on the hidden end (seen on Linux 6.18, AF_PACKET with PACKET_VNET_HDR)
//! | [`Offloads`](super::ethtool::Offloads) of the hub | TCP and UDP checksums | frames |
//! | --- | --- | --- |
//! | none | complete | cut to the MTU |
//! | `tx_checksum` | partial (pseudo header only) | cut to the MTU |
//! | `tx_checksum`, `tso`, `uso` | partial | superframes |
//!
//! A macvlan itself never cuts. The hub cuts and completes after its tc egress hook: a TC program there sees superframes
//! with partial checksums whatever the offloads are, and each cut frame carries a copy of what it wrote into the Ethernet
//! header.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoMacVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, MacVlanMode,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_ECHO, NLM_F_EXCL};
use rustix::io::Errno;

use super::addresses::Configuration;
use super::events::Events;
use super::hub::{self, Hub};
use super::links::{self, Card};
use super::netlink::{Error, Netlink, Result};
use super::owner::Owner;
use super::sysctl::Family;

/// Octets that a device's name may have (IFNAMSIZ without the final zero).
const NAME_MAX: usize = 15;

/// How long an IPv6 address may take to become usable; milliseconds as a rule.
const ADDRESS_DEADLINE: Duration = Duration::from_secs(5);

/// Switches under net.ipv6.conf: a peer cannot hand out addresses and routes.
const IPV6: [(&str, &str); 1] = [("accept_ra", "0")];

/// Group of devices (`ip link show group 1667854437`) that are about to be deleted: "cipe" in ASCII, so that it is nobody
/// else's.
const GOING: u32 = 0x6369_7065;

/// What a device is, in its alias.
const ALIAS: &str = "cipe tunnel";

/// What a tunnel device shall be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Its name; `None`: the next free one of `prefix`.
    pub name: Option<String>,
    /// Such as `cipcb`.
    pub prefix: String,
    /// It is an Ethernet tunnel's: with ARP, and with a pair of its own.
    pub ethernet: bool,
    /// Its MAC address when it is made: no other device of the hub has it.
    pub mac: [u8; 6],
    /// Own address on the tunnel.
    pub local: IpAddr,
    /// The peer's address on the tunnel, of the same IP version; unspecified: none.
    pub peer: IpAddr,
    /// MTU in octets.
    pub mtu: u32,
    /// The process that it is made for: when that ends, the device is a leftover.
    pub owner: u32,
    /// How it is configured beside that.
    pub configuration: Configuration,
}

/// A tunnel device that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its index; 0: it is in another network namespace.
    pub index: u32,
    /// Its address.
    pub mac: [u8; 6],
}

impl Netlink {
    /// Makes a tunnel device on a hub, up, with its addresses. On an error nothing is left behind.
    ///
    /// # Errors
    /// The name is taken or impossible, or the kernel refuses the MTU, the MAC address, an address, or the device.
    pub async fn make(&self, hub: &Hub, wanted: &TunnelDevice) -> Result<Device> {
        let name = match &wanted.name {
            Some(name) => valid(name)?.to_owned(),
            // The kernel picks the number, so that two engines never race for one.
            None => format!("{}%d", valid(&wanted.prefix)?),
        };
        let card = self.make_macvlan(&name, hub, wanted).await?;
        match self.configure(wanted, card.ifindex, &card.name).await {
            Ok(()) => Ok(Device { name: card.name, index: card.ifindex, mac: wanted.mac }),
            Err(error) => {
                // The error at hand says more than one of the clean-up would.
                self.delete(card.ifindex).await.ok();
                Err(error)
            }
        }
    }

    /// Takes over the device of this name that an engine left behind when it died, on one of `hubs`: one that was made
    /// for the same owner, or whose owner is gone. Returns it with the place of its hub in `hubs`; `None` if there is none.
    ///
    /// # Errors
    /// The kernel refuses the MTU or an address. The device then stays as it is.
    pub async fn adopt(&self, name: &str, wanted: &TunnelDevice, hubs: &[&Hub]) -> Result<Option<(usize, Device)>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(valid(name)?.to_owned()));
        let link = match self.link(|| format!("{name}: cannot look at it"), message).await {
            Ok(link) if hub::is_macvlan(&link) => link,
            Err(error) if !error.is(Errno::NODEV) => return Err(error),
            _ => return Ok(None),
        };
        let lower = links::lower_of(&link);
        let ours = |owner: &Owner| owner.pid() == wanted.owner || owner.is_dead();
        let owned = links::alias_of(&link).and_then(Owner::from_alias).is_some_and(|(_, owner)| ours(&owner));
        let (Some(hub), true) = (hubs.iter().position(|hub| Some(hub.index) == lower), owned) else { return Ok(None) };
        let card = Card::from_message(&link).ok_or_else(|| Error::Answer(format!("{name}: cannot look at it")))?;
        let mac = card.mac.ok_or_else(|| Error::Answer(format!("{name}: has no address")))?;
        let what = || format!("{name}: cannot set the MTU to {}", wanted.mtu);
        self.set_link(what, card.ifindex, vec![LinkAttribute::Mtu(wanted.mtu)], Some(LinkFlags::Noarp)).await?;
        self.configure(wanted, card.ifindex, name).await?;
        Ok(Some((hub, Device { name: card.name, index: card.ifindex, mac })))
    }

    /// Removes a tunnel device, also one that an operator has moved to another network namespace. One that is gone already
    /// is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn remove(&self, device: &Device) -> Result<()> {
        let what = || format!("{}: cannot delete it", device.name);
        if device.index != 0 {
            match self.delete_in(what, device.index, None).await {
                Err(error) if error.is(Errno::NODEV) => {}
                result => return result,
            }
        }
        match self.elsewhere(device).await? {
            Some((namespace, index)) => self.delete_in(what, index, Some(namespace)).await,
            None => Ok(()),
        }
    }

    /// The index that a tunnel device has in another network namespace, if it is in one.
    pub async fn index_elsewhere(&self, device: &Device) -> Option<u32> {
        self.elsewhere(device).await.ok().flatten().map(|(_, index)| index)
    }

    /// Number of the other network namespace that a tunnel device is in, and its index there.
    async fn elsewhere(&self, device: &Device) -> Result<Option<(i32, u32)>> {
        let what = || format!("{}: cannot look for it in other network namespaces", device.name);
        // The kernel gave the namespace a number when the device moved there.
        for namespace in self.namespaces().await? {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfNetnsId(namespace));
            let links = self.request(what, RouteNetlinkMessage::GetLink(message), NLM_F_DUMP).await;
            for link in links.unwrap_or_default() {
                if let RouteNetlinkMessage::NewLink(link) = link
                    && is_tunnel_device(&link)
                    && Card::from_message(&link).is_some_and(|card| card.mac == Some(device.mac))
                {
                    return Ok(Some((namespace, link.header.index)));
                }
            }
        }
        Ok(None)
    }

    /// Removes several tunnel devices. The kernel waits some 20 ms for each request that deletes, however many devices it is
    /// about, so they go together.
    ///
    /// # Errors
    /// As [`Self::remove`], of the first that is refused; the others are removed all the same.
    pub async fn remove_all(&self, devices: &[&Device]) -> Result<()> {
        let [first, _, ..] = devices else {
            return match devices {
                [only] => self.remove(only).await,
                _ => Ok(()),
            };
        };
        let mut alone = Vec::new();
        for device in devices {
            let what = || format!("{}: cannot put it into a group", device.name);
            if device.index == 0
                || self.set_link(what, device.index, vec![LinkAttribute::Group(GOING)], None).await.is_err()
            {
                // Moved to another namespace, or gone already.
                alone.push(*device);
            }
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(GOING));
        let what = || format!("{} and {} others: cannot delete them", first.name, devices.len() - 1);
        let mut result = match self.request(what, RouteNetlinkMessage::DelLink(message), NLM_F_ACK).await {
            // None was left.
            Err(error) if error.is(Errno::NODEV) => Ok(()),
            result => result.map(drop),
        };
        for device in alone {
            result = result.and(self.remove(device).await);
        }
        result
    }

    async fn delete_in(&self, what: impl FnOnce() -> String, index: u32, namespace: Option<i32>) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.extend(namespace.map(LinkAttribute::IfNetnsId));
        self.request(what, RouteNetlinkMessage::DelLink(message), NLM_F_ACK).await.map(drop)
    }

    /// Numbers of the network namespaces that this one knows.
    async fn namespaces(&self) -> Result<Vec<i32>> {
        let what = || "cannot list network namespaces".to_owned();
        let answers = self.request(what, RouteNetlinkMessage::GetNsId(NsidMessage::default()), NLM_F_DUMP).await?;
        let id = |answer| match answer {
            RouteNetlinkMessage::NewNsId(message) => message.attributes.iter().find_map(|attribute| match attribute {
                NsidAttribute::Id(id) => Some(*id),
                _ => None,
            }),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(id).collect())
    }

    async fn make_macvlan(&self, name: &str, hub: &Hub, wanted: &TunnelDevice) -> Result<Card> {
        let mut message = LinkMessage::default();
        message.header.flags = LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Noarp | LinkFlags::Multicast;
        let private = InfoData::MacVlan(vec![InfoMacVlan::Mode(MacVlanMode::Private)]);
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Link(hub.index),
            LinkAttribute::Address(wanted.mac.to_vec()),
            LinkAttribute::Mtu(wanted.mtu),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::MacVlan), LinkInfo::Data(private)]),
        ];
        let what = || format!("{}: cannot make it with MTU {} on {}", name.replace("%d", "N"), wanted.mtu, hub.name);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL | NLM_F_ECHO;
        let answers = self.request(what, RouteNetlinkMessage::NewLink(message), flags).await;
        let answers = answers.map_err(|error| match error.is(Errno::EXIST) {
            true => Error::NameTaken(name.to_owned()),
            false => error,
        })?;
        // The echo tells which name and index the kernel chose (Linux 6.2 and later).
        let made = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Card::from_message(&link),
            _ => None,
        });
        match made {
            Some(made) => Ok(made),
            None => self.on_hub(hub, wanted.mac).await?.ok_or_else(|| Error::Answer(what())),
        }
    }

    /// The device on a hub with this address, which no other there has.
    pub(super) async fn on_hub(&self, hub: &Hub, mac: [u8; 6]) -> Result<Option<Card>> {
        let links = self.links().await?;
        let on_it = links.iter().filter(|link| links::lower_of(link) == Some(hub.index) && hub::is_macvlan(link));
        Ok(on_it.filter_map(Card::from_message).find(|card| card.mac == Some(mac)))
    }

    /// Brings a fresh or adopted device into the wanted state; it goes up when all else that keeps it silent is set.
    pub(super) async fn configure(&self, wanted: &TunnelDevice, index: u32, name: &str) -> Result<()> {
        let alias = Owner::of(wanted.owner)?.alias(ALIAS);
        let what = || format!("{name}: cannot set its alias");
        self.set_link(what, index, vec![LinkAttribute::IfAlias(alias)], None).await?;
        for (switch, value) in IPV6 {
            self.set_switch(Family::Ipv6, (name, index), switch, value).await?;
        }
        let flags = if wanted.ethernet {
            LinkFlags::Up | LinkFlags::Multicast
        } else {
            self.without_own_addresses(index).await?;
            LinkFlags::Up | LinkFlags::Noarp
        };
        let what = || format!("{name}: cannot take it up");
        self.set_link(what, index, Vec::new(), Some(flags)).await?;
        // IPv6 makes the route to the peer only if the device is up.
        let events = Events::open(&[MulticastGroup::Ipv6Route])?;
        if wanted.configuration.addresses && !wanted.local.is_unspecified() {
            self.set_addresses(name, index, (wanted.local, wanted.peer), &wanted.configuration).await?;
        }
        if wanted.configuration.addresses && !wanted.ethernet && wanted.peer.is_ipv6() && !wanted.peer.is_unspecified()
        {
            self.routed(events, name, index, wanted.peer).await;
        }
        Ok(())
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
}

/// Whether a device is one of a tunnel, of either protocol, whatever stands on it.
fn is_tunnel_device(link: &LinkMessage) -> bool {
    let is_named_so = links::alias_of(link).and_then(Owner::from_alias).is_some_and(|(what, _)| what == ALIAS);
    hub::is_macvlan(link) || (hub::is_veth(link) && is_named_so)
}

/// What the kernel's dev_valid_name() takes, without the percent sign, which would make it a template.
pub(super) fn valid(name: &str) -> Result<&str> {
    let bad = |octet: u8| matches!(octet, b'/' | b':' | b'%') || octet.is_ascii_whitespace() || octet == 0;
    if name.is_empty() || name.len() > NAME_MAX || matches!(name, "." | "..") || name.bytes().any(bad) {
        return Err(Error::NameInvalid(name.to_owned()));
    }
    Ok(name)
}

#[cfg(test)]
pub(super) mod tests;
