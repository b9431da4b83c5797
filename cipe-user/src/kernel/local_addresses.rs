//! The addresses of this host, and their changes.

use std::collections::HashSet;
use std::net::IpAddr;

use futures_util::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NLM_F_DUMP;
use tokio::sync::watch;

use super::events::NetlinkEvents;
use super::netlink::{Netlink, Result};
use super::whole::{self, KernelTable};

struct Addresses {
    netlink: Netlink,
    events: NetlinkEvents,
}

impl KernelTable for Addresses {
    type Content = HashSet<IpAddr>;
    const NAME: &'static str = "addresses";

    async fn changed(&mut self) -> Option<()> {
        self.events.next().await.map(drop)
    }

    async fn read(&mut self) -> Result<HashSet<IpAddr>> {
        self.netlink.addresses().await
    }
}

impl Netlink {
    /// Follows the addresses of all devices of the network namespace from now on. The task ends when the receiver is
    /// dropped.
    ///
    /// # Errors
    /// No netlink socket can be opened, or addresses cannot be listed.
    pub async fn watch_addresses(&self) -> Result<watch::Receiver<HashSet<IpAddr>>> {
        let events = NetlinkEvents::open(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])?;
        whole::follow(Addresses { netlink: self.clone(), events }).await
    }

    async fn addresses(&self) -> Result<HashSet<IpAddr>> {
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.request(|| "cannot list addresses".to_owned(), request, NLM_F_DUMP).await?;
        let addresses = answers.iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewAddress(message) => local_of(message),
            _ => None,
        });
        Ok(addresses.collect())
    }
}

/// Returns the host's own address in a message. On a point-to-point device, the message also has the peer's address.
pub(super) fn local_of(message: &AddressMessage) -> Option<IpAddr> {
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
