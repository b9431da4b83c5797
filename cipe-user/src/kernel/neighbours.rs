//! Link-layer addresses of neighbouring routers and hosts.

use std::net::IpAddr;

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_CREATE};
use rustix::io::Errno;

use super::netlink::{Netlink, Result};

/// An entry of the kernel's neighbour table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Index of its device.
    pub ifindex: u32,
    /// Its IP address.
    pub address: IpAddr,
    /// Its link-layer address, unless it did not answer.
    pub mac: Option<[u8; 6]>,
    /// Whether it was set by hand or is not needed (no ARP): such an entry is never resolved.
    pub fixed: bool,
}

impl Neighbour {
    /// Reads a neighbour message; `None` if it is not for an IP neighbour (bridges and proxies use the same messages).
    pub(super) fn from_message(message: &NeighbourMessage) -> Option<Self> {
        if message.header.flags.contains(NeighbourFlags::Proxy) {
            return None;
        }
        let (mut address, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(*ip)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(*ip)),
                NeighbourAttribute::LinkLayerAddress(octets) => mac = octets.as_slice().try_into().ok(),
                _ => {}
            }
        }
        // A failed entry may still have an address that no longer answers.
        let valid =
            !matches!(message.header.state, NeighbourState::None | NeighbourState::Incomplete | NeighbourState::Failed);
        let fixed = matches!(message.header.state, NeighbourState::Permanent | NeighbourState::Noarp);
        Some(Self { ifindex: message.header.ifindex, address: address?, mac: mac.filter(|_| valid), fixed })
    }
}

impl Netlink {
    /// The entry of one neighbour, if there is one.
    ///
    /// # Errors
    /// The kernel cannot answer. A missing entry is no error.
    pub async fn neighbour(&self, ifindex: u32, address: IpAddr) -> Result<Option<Neighbour>> {
        let message = message(ifindex, address);
        let what = || format!("cannot look up the neighbour {address}");
        match self.request(what, RouteNetlinkMessage::GetNeighbour(message), 0).await {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                RouteNetlinkMessage::NewNeighbour(message) => Neighbour::from_message(&message),
                _ => None,
            })),
            Err(error) if error.errno() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Tells the kernel that the neighbour is in use, as a packet to it would: the kernel makes and resolves a missing
    /// entry, and confirms an old one. Not for a `fixed` entry: the kernel (`__neigh_update`, seen on 6.18) would then
    /// treat it as an ordinary one.
    ///
    /// # Errors
    /// The kernel refuses, for example because its table is full (`net.ipv4.neigh.default.gc_thresh3`).
    pub async fn use_neighbour(&self, ifindex: u32, address: IpAddr) -> Result<()> {
        let mut message = message(ifindex, address);
        message.header.flags = NeighbourFlags::Use;
        let what = || format!("cannot ask for the link-layer address of {address}");
        let flags = NLM_F_ACK | NLM_F_CREATE;
        self.request(what, RouteNetlinkMessage::NewNeighbour(message), flags).await.map(drop)
    }
}

fn message(ifindex: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = ifindex;
    let address = match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes.push(NeighbourAttribute::Destination(address));
    message
}
