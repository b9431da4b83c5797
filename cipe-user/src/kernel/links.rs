//! Network devices as the kernel reports them, and their changes.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::Stream;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NLM_F_DUMP;
use tokio::sync::mpsc;

use super::ethtool;
use super::events::{Changes, NetlinkEvent, NetlinkEvents};
use super::netlink::{Error, Netlink, Result};

/// The link-layer header of a device's frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CardKind {
    /// A 14-octet Ethernet header; frames can be built for AF_XDP.
    Ethernet,
    /// Another header, or none (ppp, tun, another tunnel, loopback): only a socket can send there.
    Other,
}

/// The device below a VLAN device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VlanParent {
    /// Its index.
    pub ifindex: u32,
    /// VLAN number, 1 to 4094.
    pub vlan: u16,
}

/// A network device that may carry tunnels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Card {
    /// Its index.
    pub ifindex: u32,
    /// Its current name.
    pub name: String,
    /// Its address, if it is an Ethernet device.
    pub mac: Option<[u8; 6]>,
    /// Maximum IP packet in octets.
    pub mtu: u32,
    /// Ethernet or not.
    pub kind: CardKind,
    /// Set if this is a VLAN device.
    pub vlan: Option<VlanParent>,
    /// Receive queues in use; at least 1.
    pub receive_queues: u32,
    /// Whether it may deliver superframes: the other end is another device or host on this machine, which need not
    /// segment them.
    pub superframes: bool,
    /// Whether it is an end of a veth pair.
    pub veth: bool,
    /// Its driver, if it is hardware and sysfs is available.
    pub driver: Option<String>,
    /// Whether the operator has set it up, its cable (or peer) is present, and the kernel is ready to send.
    pub running: bool,
    /// Whether the operator has set it up.
    pub up: bool,
    /// Whether it is a part of another device: a port of a bridge or bond, or in a VRF.
    pub enslaved: bool,
}

impl Card {
    /// Reads a link message; `None` if it has no name. The numbers of queues are those allocated, not those in use.
    pub(super) fn from_message(message: &LinkMessage) -> Option<Self> {
        let flags = message.header.flags;
        let ethernet = message.header.link_layer_type == LinkLayerType::Ether;
        let mut card = Self {
            ifindex: message.header.index,
            name: String::new(),
            mac: None,
            mtu: 0,
            kind: if ethernet { CardKind::Ethernet } else { CardKind::Other },
            vlan: None,
            receive_queues: 1,
            superframes: false,
            veth: false,
            driver: None,
            running: flags.contains(LinkFlags::Up | LinkFlags::LowerUp | LinkFlags::Running),
            up: flags.contains(LinkFlags::Up),
            enslaved: false,
        };
        let mut lower = None;
        let mut vlan = None;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => card.name.clone_from(name),
                LinkAttribute::Address(mac) if ethernet => card.mac = mac.as_slice().try_into().ok(),
                LinkAttribute::Mtu(mtu) => card.mtu = *mtu,
                LinkAttribute::NumRxQueues(queues) => card.receive_queues = (*queues).max(1),
                LinkAttribute::Link(index) => lower = Some(*index),
                LinkAttribute::Controller(index) => card.enslaved = *index != 0,
                LinkAttribute::LinkInfo(infos) => {
                    vlan = vlan_number(infos);
                    card.superframes = infos.iter().any(|info| matches!(info, LinkInfo::Kind(_)));
                    card.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        card.vlan = lower.zip(vlan).map(|(ifindex, vlan)| VlanParent { ifindex, vlan });
        (!card.name.is_empty()).then_some(card)
    }

    /// Replaces the numbers of queues by those in use. Drivers allocate queues for the largest machine, but AF_XDP can
    /// only bind to queues in use.
    pub(super) fn with_queues_in_use(self) -> Self {
        let receive_queues = ethtool::receive_queues(self.ifindex).unwrap_or(self.receive_queues);
        Self { receive_queues, ..self }
    }
}

/// Drivers of virtual network cards that deliver superframes of other guests.
const VIRTUAL_DRIVERS: [&str; 4] = ["virtio_net", "xen-netfront", "hv_netvsc", "vmxnet3"];

/// Returns the index of the device with this name, or an unused index if there is none.
pub fn index_of(name: &str) -> u32 {
    let socket = rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None);
    socket.and_then(|socket| rustix::net::netdevice::name_to_index(socket, name)).unwrap_or(NO_DEVICE)
}

/// Pause before another attempt to read the devices.
const RELOAD_INTERVAL: Duration = Duration::from_secs(1);

/// An index that no device has. 0 would mean any device.
const NO_DEVICE: u32 = i32::MAX as u32;

/// Returns the driver of a card; `None` if sysfs of this network namespace is not mounted.
fn driver_of(name: &str) -> Option<String> {
    let driver = std::fs::read_link(format!("/sys/class/net/{name}/device/driver")).ok()?;
    Some(driver.file_name()?.to_str()?.to_owned())
}

fn vlan_number(infos: &[LinkInfo]) -> Option<u16> {
    if !infos.contains(&LinkInfo::Kind(InfoKind::Vlan)) {
        return None;
    }
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vlan(data)) => Some(data),
        _ => None,
    })?;
    data.iter().find_map(|info| match info {
        InfoVlan::Id(number) => Some(*number),
        _ => None,
    })
}

impl Netlink {
    /// Returns the properties of the device with this index.
    ///
    /// # Errors
    /// There is no such device.
    pub async fn card(&self, ifindex: u32) -> Result<Card> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        let what = || format!("no network device has the index {ifindex}");
        let card = Card::from_message(&self.link(what, message).await?).ok_or_else(|| Error::Answer(what()))?;
        let mut card = card.with_queues_in_use();
        card.driver = driver_of(&card.name);
        card.superframes |= card.driver.as_deref().is_some_and(|driver| VIRTUAL_DRIVERS.contains(&driver));
        Ok(card)
    }

    /// Returns the properties of the device with this name.
    ///
    /// # Errors
    /// There is no such device.
    pub async fn card_named(&self, name: &str) -> Result<Card> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let link = self.link(|| format!("{name}: no such network device"), message).await?;
        self.card(link.header.index).await
    }

    pub(super) async fn link(&self, what: impl Fn() -> String, message: LinkMessage) -> Result<LinkMessage> {
        let answers = self.request(&what, RouteNetlinkMessage::GetLink(message), 0).await?;
        let link = answers.into_iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        link.ok_or_else(|| Error::Answer(what()))
    }

    /// All devices.
    pub(super) async fn links(&self) -> Result<Vec<LinkMessage>> {
        let what = || "cannot list network devices".to_owned();
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.request(what, request, NLM_F_DUMP).await?;
        let links = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(link),
            _ => None,
        });
        Ok(links.collect())
    }

    /// Follows all devices from now on. The task ends when the receiver is dropped.
    ///
    /// # Errors
    /// No netlink socket can be opened, or devices cannot be listed.
    pub async fn watch_links(&self) -> Result<mpsc::UnboundedReceiver<LinkEvent>> {
        self.watch_links_by(NetlinkEvents::open(&[MulticastGroup::Link])?).await
    }

    async fn watch_links_by<E>(&self, events: E) -> Result<mpsc::UnboundedReceiver<LinkEvent>>
    where
        E: Stream<Item = NetlinkEvent> + Send + Unpin + 'static,
    {
        let mut table = LinkTable::default();
        table.reload(self).await?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let (netlink, mut notifications) = (self.clone(), Changes::new(events));
        tokio::spawn(async move {
            loop {
                let event = tokio::select! {
                    event = notifications.next() => event,
                    () = sender.closed() => return,
                };
                let changes = match event {
                    Some(NetlinkEvent::Message(message)) => table.apply(&message),
                    // Notifications were lost: reading all devices again shows the changes.
                    Some(NetlinkEvent::Lost) => loop {
                        match table.reload(&netlink).await {
                            Ok(changes) => break changes,
                            Err(error) => tracing::warn!("{error}; read again in {} s", RELOAD_INTERVAL.as_secs()),
                        }
                        tokio::time::sleep(RELOAD_INTERVAL).await;
                        if sender.is_closed() {
                            return;
                        }
                    },
                    None => {
                        tracing::error!("netlink notifications ended: network devices are not followed any longer");
                        return;
                    }
                };
                for change in changes {
                    if sender.send(change).is_err() {
                        return;
                    }
                }
            }
        });
        Ok(receiver)
    }
}

/// Returns the index of the device below this one in the same namespace, or of a veth's other end.
pub(super) fn lower_of(link: &LinkMessage) -> Option<u32> {
    let foreign = |attribute: &LinkAttribute| matches!(attribute, LinkAttribute::LinkNetNsId(_));
    if link.attributes.iter().any(foreign) {
        return None;
    }
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    })
}

/// A device's alias.
pub(super) fn alias_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias.as_str()),
        _ => None,
    })
}

/// A change of one device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkEvent {
    /// The device; stays the same when it is renamed.
    pub ifindex: u32,
    /// Its name, the new one if it was renamed.
    pub name: String,
    /// Its address, if it is an Ethernet device.
    pub mac: Option<[u8; 6]>,
    /// Maximum IP packet in octets.
    pub mtu: u32,
    /// What happened.
    pub change: LinkChange,
}

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkChange {
    /// Made, or moved into this network namespace.
    Added,
    /// Set up by the operator.
    Up,
    /// Set down by the operator.
    Down,
    /// Deleted, or moved to another network namespace.
    Deleted,
    /// Has another name.
    Renamed,
    /// Address, MTU or the presence of the cable changed.
    Changed,
}

/// All devices of the network namespace.
#[derive(Debug, Default)]
pub(super) struct LinkTable {
    cards: HashMap<u32, Card>,
}

impl LinkTable {
    pub(super) fn get(&self, ifindex: u32) -> Option<&Card> {
        self.cards.get(&ifindex)
    }

    /// Reads all devices again; returns what changed since the last reading.
    pub(super) async fn reload(&mut self, netlink: &Netlink) -> Result<Vec<LinkEvent>> {
        let links = netlink.links().await?;
        let present: HashSet<u32> = links.iter().map(|link| link.header.index).collect();
        let gone: Vec<u32> = self.cards.keys().copied().filter(|index| !present.contains(index)).collect();
        let mut changes: Vec<_> = gone.into_iter().filter_map(|index| self.remove(index)).collect();
        for link in &links {
            self.update(link, &mut changes);
        }
        Ok(changes)
    }

    /// Applies one message; returns the changes, in order.
    pub(super) fn apply(&mut self, message: &RouteNetlinkMessage) -> Vec<LinkEvent> {
        let mut changes = Vec::new();
        match message {
            RouteNetlinkMessage::NewLink(link) if is_device(link) => self.update(link, &mut changes),
            RouteNetlinkMessage::DelLink(link) if is_device(link) => changes.extend(self.remove(link.header.index)),
            _ => {}
        }
        changes
    }

    fn remove(&mut self, ifindex: u32) -> Option<LinkEvent> {
        let card = self.cards.remove(&ifindex)?;
        Some(LinkEvent { ifindex, name: card.name, mac: card.mac, mtu: card.mtu, change: LinkChange::Deleted })
    }

    fn update(&mut self, link: &LinkMessage, changes: &mut Vec<LinkEvent>) {
        let Some(new) = Card::from_message(link) else { return };
        let (ifindex, mac, mtu) = (new.ifindex, new.mac, new.mtu);
        let mut tell = |change| changes.push(LinkEvent { ifindex, name: new.name.clone(), mac, mtu, change });
        match self.cards.get(&ifindex) {
            None => {
                tell(LinkChange::Added);
                if new.up {
                    tell(LinkChange::Up);
                }
            }
            Some(old) => {
                if old.name != new.name {
                    tell(LinkChange::Renamed);
                }
                if old.up != new.up {
                    tell(if new.up { LinkChange::Up } else { LinkChange::Down });
                }
                if (old.mac, old.mtu, old.running) != (new.mac, new.mtu, new.running) {
                    tell(LinkChange::Changed);
                }
            }
        }
        self.cards.insert(ifindex, new);
    }
}

/// Bridges report their ports as links of another family, and a port that leaves a bridge as deleted.
fn is_device(link: &LinkMessage) -> bool {
    u8::from(link.header.interface_family) == 0
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::kernel::testnet::{Other, in_namespace};

    /// A kernel without VLAN support cannot make such a device.
    #[test]
    fn a_vlan_device_knows_its_parent() {
        let mut link = LinkMessage::default();
        link.header.index = 7;
        link.header.link_layer_type = LinkLayerType::Ether;
        let data = LinkInfo::Data(InfoData::Vlan(vec![InfoVlan::Id(100)]));
        link.attributes = vec![
            LinkAttribute::IfName("eth0.100".to_owned()),
            LinkAttribute::Link(2),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vlan), data]),
        ];
        let card = Card::from_message(&link).unwrap();
        assert_eq!(card.vlan, Some(VlanParent { ifindex: 2, vlan: 100 }));
    }

    #[test]
    fn a_card_tells_ethernet_from_others() {
        in_namespace(|netlink| async move {
            let other = Other::new();
            netlink.cable("wire0", [192, 0, 2, 1], &other, "far0", [192, 0, 2, 2]).await;
            let card = netlink.card_named("wire0").await.unwrap();
            assert_eq!((card.kind, card.mtu, card.receive_queues, card.vlan), (CardKind::Ethernet, 1500, 1, None));
            assert!(card.up && card.mac.is_some());
            let index = netlink.route(Ipv4Addr::LOCALHOST.into(), None).await.unwrap().oif;
            let loopback = netlink.card(index).await.unwrap();
            assert_eq!((loopback.kind, loopback.mac), (CardKind::Other, None));
        });
    }

    /// Notifications that were queued before an overrun must not be applied after everything is read again (fault B7).
    #[test]
    fn what_is_older_than_a_new_reading_is_not_applied_over_it() {
        in_namespace(|netlink| async move {
            let other = Other::new();
            netlink.cable("wire0", [192, 0, 2, 1], &other, "far0", [192, 0, 2, 2]).await;
            let (tell, mut told) = mpsc::unbounded_channel();
            let events = futures_util::stream::poll_fn(move |context| told.poll_recv(context));
            let mut changes = netlink.watch_links_by(events).await.unwrap();
            netlink.set_attribute("wire0", LinkAttribute::Mtu(1400)).await;
            let mut old = LinkMessage::default();
            old.header.index = netlink.index("wire0").await;
            for event in [NetlinkEvent::Lost, NetlinkEvent::Message(Box::new(RouteNetlinkMessage::DelLink(old)))] {
                tell.send(event).unwrap();
            }
            drop(tell);
            let change = changes.recv().await.unwrap();
            assert_eq!((change.name.as_str(), change.mtu, change.change), ("wire0", 1400, LinkChange::Changed));
            assert_eq!(changes.recv().await, None, "it is still there, and nothing else has changed");
        });
    }

    #[test]
    fn a_missing_device_is_named() {
        in_namespace(|netlink| async move {
            let error = netlink.card_named("eth9").await.unwrap_err().to_string();
            assert_eq!(error, "eth9: no such network device: No such device (os error 19)");
        });
    }
}
