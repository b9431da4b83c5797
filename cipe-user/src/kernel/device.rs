//! Tunnel devices (`cipcb0`): the operator routes packets into them. Each is a macvlan in private mode on a [`Hub`]; it
//! costs a fraction of a veth pair, and can count, filter and capture like one.
//!
//! Outbound, the device hands its frames unchanged to the hub: superframes stay whole, checksums partial. Inbound, a
//! frame that the engine injects at the hidden end goes to the device with the frame's destination address.
//!
//! # Frames on the hidden end (seen on Linux 6.18, AF_PACKET with PACKET_VNET_HDR)
//! | [`Offloads`](super::ethtool::Offloads) of the hub | TCP and UDP checksums | frames |
//! | --- | --- | --- |
//! | none | complete | cut to the MTU |
//! | `tx_checksum` | partial (pseudo header only) | cut to the MTU |
//! | `tx_checksum`, `tso`, `uso` | partial | superframes |
//!
//! A macvlan itself never segments. The hub segments frames and completes checksums after its tc egress hook: a TC
//! program there sees superframes with partial checksums whatever the offloads are, and each segment has a copy of the
//! Ethernet header that the program wrote.

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

use super::addresses::AddressConfiguration;
use super::events::NetlinkEvents;
use super::hub::{self, Hub};
use super::links::{self, Card};
use super::netlink::{Error, Netlink, Result};
use super::owner::Owner;
use super::sysctl::Family;

/// Maximum octets of a device's name (IFNAMSIZ without the final zero).
const MAX_NAME_OCTETS: usize = 15;

/// How long an IPv6 address may take to become usable; usually milliseconds.
const ADDRESS_DEADLINE: Duration = Duration::from_secs(5);

/// Switches under net.ipv6.conf: a peer must not be able to give this host addresses and routes.
const IPV6: [(&str, &str); 1] = [("accept_ra", "0")];

/// Group of devices (`ip link show group 1667854437`) that are about to be deleted: "cipe" in ASCII, a number that
/// nobody else uses.
const DELETED_GROUP: u32 = 0x6369_7065;

/// First words of a device's alias.
const ALIAS: &str = "cipe tunnel";

/// The requested tunnel device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelDevice {
    /// Its name; `None`: the next free one of `prefix`.
    pub name: Option<String>,
    /// Such as `cipcb`.
    pub prefix: String,
    /// Whether it is for an Ethernet tunnel: with ARP, and with a pair of its own.
    pub ethernet: bool,
    /// Its MAC address when it is made: no other device of the hub may have it.
    pub mac: [u8; 6],
    /// Own address on the tunnel.
    pub local: IpAddr,
    /// The peer's address on the tunnel, of the same IP version; unspecified: none.
    pub peer: IpAddr,
    /// MTU in octets.
    pub mtu: u32,
    /// The process that it is made for: when the process ends, the device is a leftover.
    pub owner: u32,
    /// The rest of its configuration.
    pub configuration: AddressConfiguration,
}

/// An existing tunnel device.
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
            // The kernel chooses the number, so that two engines never compete for one.
            None => format!("{}%d", valid(&wanted.prefix)?),
        };
        let card = self.make_macvlan(&name, hub, wanted).await?;
        match self.configure(wanted, card.ifindex, &card.name).await {
            Ok(()) => Ok(Device { name: card.name, index: card.ifindex, mac: wanted.mac }),
            Err(error) => {
                // The first error is more useful than an error of the clean-up.
                self.delete(card.ifindex).await.ok();
                Err(error)
            }
        }
    }

    /// Adopts the device of this name that an engine left on one of `hubs` when it died: a device that was made for the
    /// same owner, or whose owner has ended. Returns it with the index of its hub in `hubs`; `None` if there is none. One that is up,
    /// with this owner and MTU, stays as it is.
    ///
    /// # Errors
    /// The kernel refuses the MTU or an address. The device then stays as it is.
    pub async fn adopt(&self, name: &str, wanted: &TunnelDevice, hubs: &[&Hub]) -> Result<Option<(usize, Device)>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(valid(name)?.to_owned()));
        let link = match self.link(|| format!("{name}: cannot read its state"), message).await {
            Ok(link) if hub::is_macvlan(&link) => link,
            Err(error) if !error.is(Errno::NODEV) => return Err(error),
            _ => return Ok(None),
        };
        let lower = links::lower_of(&link);
        let ours = |owner: &Owner| owner.pid() == wanted.owner || owner.is_dead();
        let owned = owner_of(&link).is_some_and(|owner| ours(&owner));
        let (Some(hub), true) = (hubs.iter().position(|hub| Some(hub.index) == lower), owned) else { return Ok(None) };
        let card = Card::from_message(&link).ok_or_else(|| Error::Answer(format!("{name}: cannot read its state")))?;
        let mac = card.mac.ok_or_else(|| Error::Answer(format!("{name}: has no address")))?;
        let device = Device { name: card.name, index: card.ifindex, mac };
        // An engine has set it up for this very process: with thousands of devices each request counts, and each change is an event
        // for all daemons.
        let is_set_up = owner_of(&link).is_some_and(|owner| Owner::of(wanted.owner).is_ok_and(|own| own == owner))
            && card.mtu == wanted.mtu
            && link.header.flags.contains(LinkFlags::Up | LinkFlags::Noarp);
        if !is_set_up {
            self.take_over(&device, wanted).await?;
        }
        Ok(Some((hub, device)))
    }

    /// Makes a device that is there already, of either kind, the wanted one, up, with its addresses.
    ///
    /// # Errors
    /// The kernel refuses the MTU or an address. The device then stays as it is.
    pub async fn take_over(&self, device: &Device, wanted: &TunnelDevice) -> Result<()> {
        let what = || format!("{}: cannot set the MTU to {}", device.name, wanted.mtu);
        let flags = (!wanted.ethernet).then_some(LinkFlags::Noarp);
        self.set_link(what, device.index, vec![LinkAttribute::Mtu(wanted.mtu)], flags).await?;
        self.configure(wanted, device.index, &device.name).await
    }

    /// Sets an end of a hub up that somebody has taken down.
    ///
    /// # Errors
    /// It has gone, or the kernel refuses.
    pub async fn set_up_again(&self, index: u32) -> Result<()> {
        let what = || format!("device {index}: cannot set it up again");
        self.set_link(what, index, Vec::new(), Some(LinkFlags::Noarp | LinkFlags::Up)).await
    }

    /// Removes a tunnel device, even if an operator has moved it to another network namespace. A missing device is no
    /// error.
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

    /// The index of a tunnel device in another network namespace, if it is in one.
    ///
    /// # Errors
    /// The namespaces cannot be listed.
    pub async fn index_elsewhere(&self, device: &Device) -> Result<Option<u32>> {
        Ok(self.elsewhere(device).await?.map(|(_, index)| index))
    }

    /// The number of the other network namespace that a tunnel device is in, and the device's index there.
    async fn elsewhere(&self, device: &Device) -> Result<Option<(i32, u32)>> {
        let what = || format!("{}: cannot look for it in other network namespaces", device.name);
        // The kernel gave the namespace a number when the device moved there.
        for namespace in self.namespaces().await? {
            let mut message = LinkMessage::default();
            message.attributes.push(LinkAttribute::IfNetnsId(namespace));
            let links = match self.request(what, RouteNetlinkMessage::GetLink(message), NLM_F_DUMP).await {
                Ok(links) => links,
                // The namespace may have gone since it was listed.
                Err(error) => {
                    tracing::debug!("{error}");
                    continue;
                }
            };
            for link in links {
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

    /// Removes several tunnel devices together: the kernel waits some 20 ms for each deletion request, whatever the
    /// number of devices in it.
    ///
    /// # Errors
    /// As [`Self::remove`], for the first refused device; the others are removed anyway.
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
                || self.set_link(what, device.index, vec![LinkAttribute::Group(DELETED_GROUP)], None).await.is_err()
            {
                // It is in another namespace, or already removed.
                alone.push(*device);
            }
        }
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(DELETED_GROUP));
        let what = || format!("{} and {} others: cannot delete them", first.name, devices.len() - 1);
        let mut result = match self.request(what, RouteNetlinkMessage::DelLink(message), NLM_F_ACK).await {
            // All of them were removed already.
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
        // The echo has the name and index that the kernel chose (Linux 6.2 and later).
        let made = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Card::from_message(&link),
            _ => None,
        });
        match made {
            Some(made) => Ok(made),
            None => self.on_hub(hub, wanted.mac).await?.ok_or_else(|| Error::Answer(what())),
        }
    }

    /// The device on a hub with this address, which is unique there.
    pub(super) async fn on_hub(&self, hub: &Hub, mac: [u8; 6]) -> Result<Option<Card>> {
        let links = self.links().await?;
        let on_it = links.iter().filter(|link| links::lower_of(link) == Some(hub.index) && hub::is_macvlan(link));
        Ok(on_it.filter_map(Card::from_message).find(|card| card.mac == Some(mac)))
    }

    /// Configures a new or adopted device; sets it up only after all settings that keep it silent.
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
        let what = || format!("{name}: cannot set it up");
        self.set_link(what, index, Vec::new(), Some(flags)).await?;
        // IPv6 makes the route to the peer only while the device is up.
        let events = NetlinkEvents::open(&[MulticastGroup::Ipv6Route])?;
        if wanted.configuration.addresses && !wanted.local.is_unspecified() {
            self.set_addresses(name, index, (wanted.local, wanted.peer), &wanted.configuration).await?;
        }
        if wanted.configuration.addresses && !wanted.ethernet && wanted.peer.is_ipv6() && !wanted.peer.is_unspecified()
        {
            self.wait_until_routed(events, name, index, wanted.peer).await;
        }
        Ok(())
    }

    /// Waits until the kernel routes packets to the peer into the device: an IPv6 address is usable only some time
    /// after it is set, and the operator's scripts that follow may add routes that need it.
    async fn wait_until_routed(&self, mut events: NetlinkEvents, name: &str, index: u32, peer: IpAddr) {
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

/// The process that a device was made for.
fn owner_of(link: &LinkMessage) -> Option<Owner> {
    links::alias_of(link).and_then(Owner::from_alias).map(|(_, owner)| owner)
}

/// Whether a device is a tunnel's, of either protocol.
fn is_tunnel_device(link: &LinkMessage) -> bool {
    let is_named_so = links::alias_of(link).and_then(Owner::from_alias).is_some_and(|(what, _)| what == ALIAS);
    hub::is_macvlan(link) || (hub::is_veth(link) && is_named_so)
}

/// The names that the kernel's dev_valid_name() accepts, without the percent sign, which would make a template.
pub(super) fn valid(name: &str) -> Result<&str> {
    let bad = |octet: u8| matches!(octet, b'/' | b':' | b'%') || octet.is_ascii_whitespace() || octet == 0;
    if name.is_empty() || name.len() > MAX_NAME_OCTETS || matches!(name, "." | "..") || name.bytes().any(bad) {
        return Err(Error::NameInvalid(name.to_owned()));
    }
    Ok(name)
}

#[cfg(test)]
pub(super) mod tests;
