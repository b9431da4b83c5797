//! The addresses that this host has, and their changes.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NLM_F_DUMP;
use tokio::sync::watch;

use super::events::Events;
use super::netlink::{Netlink, Result};

/// From the first change to the reading of all that came with it.
const SETTLE: Duration = Duration::from_millis(10);

/// Pause before addresses that could not be read are read again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl Netlink {
    /// Follows the addresses of all devices of the network namespace from now on. The task behind it ends when the receiver is
    /// dropped.
    ///
    /// # Errors
    /// No netlink socket can be opened, or addresses cannot be listed.
    pub async fn watch_addresses(&self) -> Result<watch::Receiver<HashSet<IpAddr>>> {
        let mut events = Events::open(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])?;
        let (sender, receiver) = watch::channel(self.addresses().await?);
        let netlink = self.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = events.next() => if event.is_none() {
                        tracing::error!("netlink notifications ended: addresses are not followed any longer");
                        return;
                    },
                    () = sender.closed() => return,
                }
                // What comes together is read together.
                tokio::time::sleep(SETTLE).await;
                let addresses = loop {
                    match netlink.addresses().await {
                        Ok(addresses) => break addresses,
                        Err(error) => tracing::warn!("{error}; read again in {} s", RETRY_INTERVAL.as_secs()),
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                    if sender.is_closed() {
                        return;
                    }
                };
                sender.send_if_modified(|old| std::mem::replace(old, addresses.clone()) != addresses);
            }
        });
        Ok(receiver)
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

/// The host's own address in a message: on a point-to-point device the other one is the peer's.
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
