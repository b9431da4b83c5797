//! The table that workers forward by: prefixes and neighbours at one moment.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::engine::carrier::outer::Hop;
use crate::kernel::forwarding::PrefixMap;

/// The destination of a prefix, for short cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShortCutTarget {
    /// Into a tunnel with a short cut.
    Tunnel {
        /// Its number.
        tunnel: u16,
        /// The ifindex of the LAN card of its short cut.
        lan: u32,
    },
    /// Out of a LAN card with a short cut.
    Lan {
        /// The ifindex of the card.
        lan: u32,
        /// The router, if the addresses are not on the link itself.
        gateway: Option<IpAddr>,
        /// Maximum packet in octets, if the route sets it.
        mtu: Option<usize>,
    },
    /// Elsewhere: the kernel forwards the packets.
    Kernel,
}

/// A LAN card with a short cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LanPort {
    /// Its slot in the worker's table.
    pub slot: usize,
    /// Its address.
    pub mac: [u8; 6],
    /// Maximum packet in octets.
    pub mtu: usize,
}

/// The egress of packets that leave directly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Slot of the LAN card.
    pub slot: usize,
    /// Link-layer addresses.
    pub hop: Hop,
    /// Maximum packet in octets.
    pub mtu: usize,
    /// Index of the neighbour in [`LanTable`].
    neighbour: usize,
}

struct Neighbour {
    key: (u32, IpAddr),
    mac: [u8; 6],
    used: AtomicBool,
}

/// All data that decides about short cuts.
#[derive(Default)]
pub struct LanTable {
    ways: PrefixMap<ShortCutTarget>,
    ports: HashMap<u32, LanPort>,
    places: HashMap<(u32, IpAddr), usize>,
    neighbours: Vec<Neighbour>,
}

impl LanTable {
    /// Creates a table of prefixes, cards by ifindex, and neighbours by card and address.
    pub fn new(
        ways: PrefixMap<ShortCutTarget>,
        ports: HashMap<u32, LanPort>,
        neighbours: impl IntoIterator<Item = ((u32, IpAddr), [u8; 6])>,
    ) -> Self {
        let near = neighbours.into_iter().map(|(key, mac)| Neighbour { key, mac, used: AtomicBool::new(false) });
        let neighbours: Vec<Neighbour> = near.collect();
        let places = neighbours.iter().enumerate().map(|(place, neighbour)| (neighbour.key, place)).collect();
        Self { ways, ports, places, neighbours }
    }

    /// Whether there is no card with a short cut.
    pub fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    /// Returns the egress for packets of a tunnel between two addresses. There is one if the kernel would send them by
    /// the tunnel's LAN card to a known neighbour, and packets from `source` come by this tunnel.
    pub fn exit(&self, tunnel: u16, source: IpAddr, destination: IpAddr) -> Option<Exit> {
        let ShortCutTarget::Lan { lan, gateway, mtu } = *self.ways.longest(destination)? else { return None };
        if *self.ways.longest(source)? != (ShortCutTarget::Tunnel { tunnel, lan }) {
            return None;
        }
        let port = self.ports.get(&lan)?;
        let neighbour = *self.places.get(&(lan, gateway.unwrap_or(destination)))?;
        let hop = Hop { source: port.mac, destination: self.neighbours[neighbour].mac };
        Some(Exit { slot: port.slot, hop, mtu: mtu.unwrap_or(port.mtu).min(port.mtu), neighbour })
    }

    /// Records that packets are sent to a neighbour, which the kernel does not see.
    pub fn note_use(&self, exit: &Exit) {
        if let Some(neighbour) = self.neighbours.get(exit.neighbour)
            && !neighbour.used.load(Ordering::Relaxed)
        {
            neighbour.used.store(true, Ordering::Relaxed);
        }
    }

    /// Copies what another table has recorded about the neighbours of both.
    pub fn keep_used(&self, before: &Self) {
        for key in before.take_used() {
            if let Some(place) = self.places.get(&key) {
                self.neighbours[*place].used.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Returns the neighbours, by card and address, that packets were sent to since the last call.
    pub fn take_used(&self) -> impl Iterator<Item = (u32, IpAddr)> {
        let used = self.neighbours.iter().filter(|neighbour| neighbour.used.swap(false, Ordering::Relaxed));
        used.map(|neighbour| neighbour.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::forwarding::Prefix;

    const LAN: u32 = 7;
    const TUNNEL: u16 = 3;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn table() -> LanTable {
        let lan = |gateway: Option<&str>, mtu| ShortCutTarget::Lan { lan: LAN, gateway: gateway.map(ip), mtu };
        let ways = [
            ("10.1.0.0", 16, lan(None, None)),
            ("10.1.9.0", 24, lan(Some("10.1.0.9"), Some(1300))),
            ("10.1.0.1", 32, ShortCutTarget::Kernel),
            ("10.2.0.0", 16, ShortCutTarget::Tunnel { tunnel: TUNNEL, lan: LAN }),
            ("10.2.3.0", 24, ShortCutTarget::Tunnel { tunnel: TUNNEL + 1, lan: LAN }),
            ("10.2.4.0", 24, ShortCutTarget::Tunnel { tunnel: TUNNEL, lan: LAN + 1 }),
        ];
        let ways = ways.map(|(address, bits, way)| (Prefix::new(ip(address), bits), way)).into_iter().collect();
        let ports = HashMap::from([(LAN, LanPort { slot: 2, mac: [1; 6], mtu: 1500 })]);
        let near = [("10.1.0.2", [2; 6]), ("10.1.0.9", [9; 6]), ("10.1.0.1", [3; 6])];
        LanTable::new(ways, ports, near.map(|(address, mac)| ((LAN, ip(address)), mac)))
    }

    #[test]
    fn a_packet_goes_straight_to_a_neighbour_or_a_router_that_is_known() {
        let table = table();
        let exit = |source, destination| table.exit(TUNNEL, ip(source), ip(destination));
        let near = exit("10.2.0.5", "10.1.0.2").unwrap();
        assert_eq!((near.slot, near.hop, near.mtu), (2, Hop { source: [1; 6], destination: [2; 6] }, 1500));
        let routed = exit("10.2.0.5", "10.1.9.77").unwrap();
        assert_eq!((routed.hop.destination, routed.mtu), ([9; 6], 1300));
        assert_eq!(exit("10.2.0.5", "10.1.0.3"), None, "a neighbour that is not known");
    }

    #[test]
    fn what_comes_from_elsewhere_or_goes_elsewhere_is_the_kernels() {
        let table = table();
        for (source, destination) in [
            ("10.2.0.5", "10.1.0.1"),
            ("10.2.0.5", "192.0.2.1"),
            ("10.2.0.5", "10.2.0.6"),
            ("10.1.0.5", "10.1.0.2"),
            ("10.2.3.5", "10.1.0.2"),
            ("10.2.4.5", "10.1.0.2"),
            ("192.0.2.1", "10.1.0.2"),
        ] {
            assert_eq!(table.exit(TUNNEL, ip(source), ip(destination)), None, "{source} to {destination}");
        }
    }

    #[test]
    fn a_use_is_told_once() {
        let table = table();
        let exit = table.exit(TUNNEL, ip("10.2.0.5"), ip("10.1.0.2")).unwrap();
        table.note_use(&exit);
        table.note_use(&exit);
        assert_eq!(table.take_used().collect::<Vec<_>>(), [(LAN, ip("10.1.0.2"))]);
        assert_eq!(table.take_used().count(), 0);
    }
}
