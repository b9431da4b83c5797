//! The state of the tunnels on the control thread.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cipe_common::maps::{MAX_TUNNELS, Tunnel as TunnelEntry};

use super::attach::TunnelLedger;
use super::carrier_socket::{CarrierSocket, known};
use super::flood::Flood;
use super::loops::{Loops, PeerRoute};
use super::sizes::Sizes;
use crate::control::protocol::{Attach, CarrierChoice, Cipher, Protocol};
use crate::engine::carrier::UdpCarrier;
use crate::engine::report::WorkerReport;
use crate::engine::tunnel::counters::Tally;
use crate::engine::tunnel::sealed::SealedTunnel;
use crate::kernel::bpf::XdpMode;
use crate::kernel::device::Device;
use crate::kernel::nexthop::NextHop;
use crate::kernel::zone;

/// The state of one tunnel.
pub(super) struct Tenant {
    pub connection: u64,
    /// Its name to the operator, beside its device's; empty: none.
    pub name: String,
    /// Own and the peer's address on the tunnel.
    pub addresses: (IpAddr, IpAddr),
    /// First letters of its device's name, by protocol and cipher.
    pub prefix: String,
    /// It becomes an orphan when its daemon goes without [`Request::Detach`](crate::control::protocol::Request::Detach).
    pub stays: bool,
    /// When it became an orphan.
    pub orphaned: Option<Instant>,
    /// Its device has gone, or cannot be used any more.
    pub is_gone: bool,
    /// The workers have taken it: the programs may hand packets to them.
    pub is_open: bool,
    /// Reports of workers before that; they are handled after the daemon has its answer.
    pub early: Vec<WorkerReport>,
    /// Slot of the hub that its device stands on.
    pub hub: usize,
    pub device: Device,
    pub cipher: Cipher,
    pub protocol: Protocol,
    pub carrier_choice: CarrierChoice,
    pub xdp_mode: XdpMode,
    /// Its own carrier address, as the peer sees it.
    pub me: SocketAddr,
    /// The address that its socket is bound to: the same, or any address of this host.
    pub listens: SocketAddr,
    pub peer: Option<SocketAddr>,
    /// The peer is reached through a SOCKS5 server.
    pub socks: Option<Socks>,
    pub counters: Tally,
    /// The use of its keys.
    pub ledger: TunnelLedger,
    /// Its sealed packets; `None`: it has none.
    pub sealed: Option<Arc<SealedTunnel>>,
    /// It goes on under the keys that it had before this engine.
    pub is_resumed: bool,
    pub sizes: Sizes,
    /// Only its peer may send to it (`pinpeer`).
    pub is_pinned: bool,
    /// The number of its shield in the programs; 0: it has none now.
    pub shield: u32,
    /// Floods of datagrams that no key of it opens, now or lately.
    pub flood: Option<Flood>,
    /// Name of the LAN card that it asks for a short cut with.
    pub lan: Option<String>,
    /// The busy-poll time that it asks for.
    pub busy_poll: Duration,
    /// Next hop to the peer that datagrams are sent to, as last known.
    pub hop: Option<NextHop>,
    /// Carrier device that AF_XDP sockets are open on for it, by ifindex.
    pub carrier: Option<u32>,
    /// Carrier device that could not be opened for it, until something changes about that.
    pub refused: Option<u32>,
    /// Mark of its datagrams; 0: none.
    pub mark: u32,
    /// Next hop to the peer as the kernel looks it up, also if it cannot be used.
    pub looked_up: Option<NextHop>,
    /// Where that next hop leads.
    pub leads: PeerRoute,
    /// The count of its datagrams that came into the tunnel itself.
    pub loops: Loops,
    /// The count of its packets that came back to it through other tunnels.
    pub rounds: Loops,
    /// Notes for its status.
    pub notes: Vec<String>,
    /// Counts of datagrams of impossible lengths that were reported: dropped by the programs, by the workers.
    pub bogus: (u64, u64),
    /// The status note on its door, where that is not AF_XDP.
    pub door: Option<String>,
    /// Device that its UDP socket is bound to, by name.
    pub carrier_device: Option<String>,
    /// Its UDP socket.
    pub carrier_socket: UdpCarrier,
    /// Name of the device that its link-local carrier addresses belong to, if it has such.
    pub zone_name: Option<String>,
    /// The task that forwards changes of the next hop.
    pub follower: Option<tokio::task::AbortHandle>,
}

/// The SOCKS5 server of a tunnel, whose TCP connection is the daemon's.
#[derive(Clone, Copy, Debug)]
pub(super) struct Socks {
    pub server: SocketAddr,
    /// Its relay of datagrams, while there is one.
    pub relay: Option<SocketAddr>,
}

impl Tenant {
    /// A tunnel that the workers have not taken yet.
    pub(super) fn new(
        connection: u64,
        attach: &Attach,
        socket: &CarrierSocket,
        (hub, device): (usize, Device),
        ledger: TunnelLedger,
        workers: usize,
    ) -> Self {
        let mut tenant = Self {
            connection,
            name: attach.name.clone(),
            addresses: (attach.ipaddr, attach.ptpaddr),
            prefix: attach.prefix.clone(),
            stays: attach.stays,
            orphaned: None,
            is_gone: false,
            is_open: false,
            early: Vec::new(),
            hub,
            device,
            cipher: attach.cipher,
            protocol: attach.protocol,
            carrier_choice: if attach.socks.is_some() { CarrierChoice::Udp } else { attach.carrier },
            xdp_mode: attach.xdp_mode,
            me: socket.me,
            listens: socket.listens,
            peer: known(attach.peer),
            socks: attach.socks.map(|server| Socks { server, relay: None }),
            counters: Tally::new(workers),
            ledger,
            sealed: None,
            is_resumed: false,
            sizes: Sizes::new(attach),
            is_pinned: attach.pin_peer && attach.socks.is_none(),
            shield: 0,
            flood: None,
            hop: None,
            lan: attach.lan.clone(),
            busy_poll: Duration::from_micros(attach.busy_poll_us.into()),
            carrier: None,
            refused: None,
            mark: attach.mark,
            looked_up: None,
            leads: PeerRoute::default(),
            loops: Loops::default(),
            rounds: Loops::default(),
            notes: Vec::new(),
            bogus: (0, 0),
            door: None,
            carrier_device: attach.carrier_device.clone(),
            carrier_socket: socket.udp.for_another_worker(),
            zone_name: None,
            follower: None,
        };
        tenant.name_zone();
        tenant
    }

    /// Whether an operator may mean it by this name.
    pub(super) fn is_called(&self, name: &str) -> bool {
        self.device.name == name || (!name.is_empty() && self.name == name)
    }

    /// Whether an attach is for this tunnel: it names the device, or has the options that the tunnel was made by.
    pub(super) fn is_meant_by(&self, attach: &Attach) -> bool {
        match &attach.device {
            Some(device) => self.device.name == *device,
            None => {
                self.name == attach.name
                    && self.prefix == attach.prefix
                    && self.addresses == (attach.ipaddr, attach.ptpaddr)
            }
        }
    }

    /// Whether its carrier socket is in the way of the one that an attach asks for.
    pub(super) fn has_port_of(&self, attach: &Attach) -> bool {
        let (own, wanted) = (self.listens, attach.me);
        let is_any = |address: SocketAddr| address.ip().is_unspecified();
        wanted.port() != 0
            && own.port() == wanted.port()
            && (own.ip() == wanted.ip() || is_any(own) || is_any(wanted) || attach.dynip)
    }

    /// Where datagrams are sent.
    pub(super) fn target(&self) -> Option<SocketAddr> {
        if self.orphaned.is_some() {
            return None;
        }
        self.socks.map_or(self.peer, |socks| socks.relay)
    }

    /// Its entry in the programs' map; empty until the workers have taken it, so that the programs drop its packets.
    pub(super) fn entry(&self) -> TunnelEntry {
        if !self.is_open || self.orphaned.is_some() {
            return TunnelEntry::default();
        }
        // The same link-local address may exist inside the tunnel, too, if it belongs to another device.
        let may_go_round = |target: &SocketAddr| zone::of(*target).is_none_or(|zone| zone == self.device.index);
        let target = self.target().filter(may_go_round);
        let entry = self.sizes.entry(self.hub, self.device.mac, target);
        let pinned = if self.is_pinned && target.is_some() { TunnelEntry::PINNED } else { 0 };
        let sealed = match self.sealed.as_ref().map(|sealed| sealed.keys().unsealed.accepts) {
            None => 0,
            Some(true) => TunnelEntry::SEALED,
            Some(false) => TunnelEntry::SEALED | TunnelEntry::SEALED_ONLY,
        };
        TunnelEntry { flags: entry.flags | pinned | sealed, shield: self.shield, ..entry }
    }

    /// Index of the device that its link-local carrier addresses belong to.
    pub(super) fn zone(&self) -> Option<u32> {
        zone::of(self.listens).or(self.target().and_then(zone::of))
    }

    /// Notes the name of that device.
    pub(super) fn name_zone(&mut self) {
        self.zone_name = self.zone().map(zone::name);
    }
}

/// All tunnels, by number.
pub(super) struct Tunnels {
    all: HashMap<u16, Tenant>,
    /// By the ifindex of their devices.
    devices: HashMap<u32, u16>,
    /// Carrier devices that were refused to some tunnel.
    refused: BTreeSet<u32>,
    /// Number of the last tunnel made.
    last_number: u16,
}

impl Default for Tunnels {
    fn default() -> Self {
        Self {
            all: HashMap::new(),
            devices: HashMap::new(),
            refused: BTreeSet::new(),
            // The next number is 0.
            last_number: u16::MAX,
        }
    }
}

impl Tunnels {
    /// The number for a new tunnel; `None` if all are in use.
    pub(super) fn new_number(&mut self) -> Option<u16> {
        let number = free_number(self.last_number, |number| self.all.contains_key(&number))?;
        self.last_number = number;
        Some(number)
    }

    /// Adds a new tunnel.
    pub(super) fn insert(&mut self, number: u16, tenant: Tenant) {
        self.devices.insert(tenant.device.index, number);
        self.all.insert(number, tenant);
    }

    /// Removes a tunnel.
    pub(super) fn remove(&mut self, number: u16) -> Option<Tenant> {
        let tenant = self.all.remove(&number)?;
        self.devices.remove(&tenant.device.index);
        Some(tenant)
    }

    /// One tunnel.
    pub(super) fn get(&self, number: u16) -> Option<&Tenant> {
        self.all.get(&number)
    }

    /// One tunnel, to change it.
    pub(super) fn get_mut(&mut self, number: u16) -> Option<&mut Tenant> {
        self.all.get_mut(&number)
    }

    /// All tunnels with their numbers.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u16, &Tenant)> {
        self.all.iter().map(|(number, tenant)| (*number, tenant))
    }

    /// All tunnels with their numbers, to change them.
    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u16, &mut Tenant)> {
        self.all.iter_mut().map(|(number, tenant)| (*number, tenant))
    }

    /// The numbers of the tunnels that `which` is true for.
    pub(super) fn numbers(&self, which: impl Fn(&Tenant) -> bool) -> Vec<u16> {
        self.iter().filter(|(_, tenant)| which(tenant)).map(|(number, _)| number).collect()
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The tunnel whose device has this ifindex.
    pub(super) fn of_device(&self, ifindex: u32) -> Option<u16> {
        self.devices.get(&ifindex).copied()
    }

    /// Forgets the index of a device that has left this network namespace.
    pub(super) fn forget_device(&mut self, ifindex: u32) {
        self.devices.remove(&ifindex);
    }

    /// Notes that a carrier device could not be opened for a tunnel.
    pub(super) fn refuse(&mut self, number: u16, ifindex: u32) {
        if let Some(tenant) = self.all.get_mut(&number) {
            tenant.refused = Some(ifindex);
            self.refused.insert(ifindex);
        }
    }

    /// Something has changed about a carrier device: it can be tried again for all tunnels.
    pub(super) fn forget_refusal(&mut self, ifindex: u32) {
        if self.refused.remove(&ifindex) {
            for tenant in self.all.values_mut() {
                tenant.refused.take_if(|refused| *refused == ifindex);
            }
        }
    }

    /// The longest busy-poll time that a tunnel asks for.
    pub(super) fn busy_poll(&self) -> Duration {
        self.all.values().map(|tenant| tenant.busy_poll).max().unwrap_or_default()
    }
}

/// The next free tunnel number after `last`. A freed number is used again as late as possible: events of the tunnel that had it may
/// still be under way.
fn free_number(last: u16, in_use: impl Fn(u16) -> bool) -> Option<u16> {
    let max = MAX_TUNNELS as u16;
    let next = if last < max { last + 1 } else { 0 };
    (next..max).chain(0..next).find(|number| !in_use(*number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_number_is_used_again_as_late_as_possible() {
        let last = MAX_TUNNELS as u16 - 1;
        assert_eq!(free_number(u16::MAX, |_| false), Some(0));
        assert_eq!(free_number(0, |_| false), Some(1));
        assert_eq!(free_number(5, |number| number == 6), Some(7));
        assert_eq!(free_number(last, |number| number == 0), Some(1));
        assert_eq!(free_number(7, |number| number != 7), Some(7));
        assert_eq!(free_number(7, |_| true), None);
    }
}
