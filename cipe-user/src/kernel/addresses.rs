//! Addresses of a tunnel device, and the routes that the kernel makes for them.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE};

use super::netlink::{Netlink, Result};

/// The configuration of a tunnel device other than its own address and the peer's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressConfiguration {
    /// Whether it gets addresses.
    pub addresses: bool,
    /// Metric of the routes that come with them; 0 and 1 mean the kernel's default.
    pub metric: u32,
    /// Prefix length of the network around the peer's address that is routed into the device; `None`: that address
    /// alone. IPv4 only.
    pub prefix: Option<u8>,
    /// Broadcast address.
    pub broadcast: Option<Ipv4Addr>,
}

impl Default for AddressConfiguration {
    fn default() -> Self {
        Self { addresses: true, metric: 0, prefix: None, broadcast: None }
    }
}

impl Netlink {
    /// Gives a device its own address and the peer's (unspecified: none), according to `configuration`. The kernel
    /// routes the peer's address into the device, and the network around it if there is a prefix.
    ///
    /// # Errors
    /// The kernel refuses an address.
    pub(super) async fn set_addresses(
        &self,
        name: &str,
        index: u32,
        (local, peer): (IpAddr, IpAddr),
        configuration: &AddressConfiguration,
    ) -> Result<()> {
        let mut message = AddressMessage::default();
        (message.header.family, message.header.prefix_len) = match local {
            IpAddr::V4(_) => (AddressFamily::Inet, configuration.prefix.unwrap_or(32).min(32)),
            IpAddr::V6(_) => (AddressFamily::Inet6, 128),
        };
        message.header.index = index;
        let peer = if peer.is_unspecified() { local } else { peer };
        message.attributes = vec![AddressAttribute::Local(local), AddressAttribute::Address(peer)];
        message.attributes.extend(configuration.broadcast.map(AddressAttribute::Broadcast));
        if configuration.metric > 1 {
            message.attributes.push(AddressAttribute::RoutePriority(configuration.metric));
        }
        let what = || format!("{name}: cannot set the address {local} peer {peer}");
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.request(what, RouteNetlinkMessage::NewAddress(message), flags).await.map(drop)
    }
}
