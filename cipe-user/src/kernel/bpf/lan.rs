//! The maps for the program of LAN cards with a short cut: cards, their sockets, and the routes of prefixes.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, MapData, XskMap};
use aya::{Ebpf, Pod};
use cipe_common::maps::{Lan, LanRoute, names};

use super::{AttachedMode, Error, Programs, XdpMode, forgotten, in_map, map};
use crate::kernel::forwarding::Prefix;

/// [`Lan`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct LanValue(Lan);

/// [`LanRoute`] in a type of ours, for which aya's trait can be implemented.
#[repr(transparent)]
#[derive(Clone, Copy)]
struct RouteValue(LanRoute);

// SAFETY: a u64, two u32 and octets, no padding, every bit pattern valid.
unsafe impl Pod for LanValue {}
// SAFETY: two u32, every bit pattern valid.
unsafe impl Pod for RouteValue {}

/// The maps of LAN cards.
pub(super) struct LanMaps {
    devices: HashMap<MapData, u32, LanValue>,
    sockets: XskMap<MapData>,
    routes4: LpmTrie<MapData, [u8; 4], RouteValue>,
    routes6: LpmTrie<MapData, [u8; 16], RouteValue>,
}

impl LanMaps {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, Error> {
        Ok(Self {
            devices: map(ebpf, names::LAN_DEVICES)?,
            sockets: map(ebpf, names::LAN_SOCKETS)?,
            routes4: map(ebpf, names::LAN_ROUTES4)?,
            routes6: map(ebpf, names::LAN_ROUTES6)?,
        })
    }
}

impl Programs {
    /// Attaches the short cut to a LAN card. No packet takes it before [`Self::set_lan_device`]. Call it once per
    /// device.
    ///
    /// # Errors
    /// As [`Self::attach_carrier`] and [`Self::load_lan`].
    pub fn attach_lan(&mut self, ifindex: u32, preference: XdpMode) -> Result<AttachedMode, Error> {
        self.load_lan()?;
        let (link, mode) = self.attach_xdp(names::LAN_XDP, ifindex, preference)?;
        self.links.lan.insert(ifindex, link);
        Ok(mode)
    }

    /// Detaches it; does nothing if it was not attached.
    pub fn detach_lan(&mut self, ifindex: u32) {
        self.links.lan.remove(&ifindex);
    }

    /// Opens the short cut on a card, or changes its data.
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn set_lan_device(&mut self, ifindex: u32, lan: Lan) -> Result<(), Error> {
        self.lans.devices.insert(ifindex, LanValue(lan), 0).map_err(in_map(names::LAN_DEVICES))
    }

    /// Closes the short cut on a card: the kernel forwards all packets. No error if it was not open.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_lan_device(&mut self, ifindex: u32) -> Result<(), Error> {
        forgotten(self.lans.devices.remove(&ifindex)).map_err(in_map(names::LAN_DEVICES))
    }

    /// Puts an AF_XDP socket at index [`Lan::sockets`] of its card plus its queue.
    ///
    /// # Errors
    /// As [`Self::set_carrier_socket`].
    pub fn set_lan_socket(&mut self, index: u32, socket: impl AsFd) -> Result<(), Error> {
        self.lans.sockets.set(index, socket.as_fd().as_raw_fd(), 0).map_err(in_map(names::LAN_SOCKETS))
    }

    /// Sets the route of a prefix.
    ///
    /// # Errors
    /// [`Error::Map`] if the table is full.
    pub fn set_lan_route(&mut self, prefix: Prefix, route: LanRoute) -> Result<(), Error> {
        let (bits, value) = (u32::from(prefix.bits), RouteValue(route));
        match prefix.address {
            IpAddr::V4(ip) => self.lans.routes4.insert(&Key::new(bits, ip.octets()), value, 0),
            IpAddr::V6(ip) => self.lans.routes6.insert(&Key::new(bits, ip.octets()), value, 0),
        }
        .map_err(in_map(names::LAN_ROUTES4))
    }

    /// Removes a prefix; no error if it was not there.
    ///
    /// # Errors
    /// [`Error::Map`] with the kernel's answer.
    pub fn remove_lan_route(&mut self, prefix: Prefix) -> Result<(), Error> {
        let bits = u32::from(prefix.bits);
        let removed = match prefix.address {
            IpAddr::V4(ip) => self.lans.routes4.remove(&Key::new(bits, ip.octets())),
            IpAddr::V6(ip) => self.lans.routes6.remove(&Key::new(bits, ip.octets())),
        };
        forgotten(removed).map_err(in_map(names::LAN_ROUTES4))
    }
}
