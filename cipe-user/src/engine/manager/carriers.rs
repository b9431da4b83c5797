//! Carrier devices: opened when the first tunnel's way leads over them, closed after the last.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use cipe_common::maps::{CARRIER_QUEUES, MAX_CARRIERS};

use super::attach::dropped;
use super::workers::share_of;
use super::{Manager, News, Socks, Tenant};
use crate::control::protocol::{Carrier as Door, Event};
use crate::engine::carrier::Path;
use crate::engine::outer::Hop;
use crate::engine::tunnel::Way;
use crate::engine::worker::Command;
use crate::kernel::bpf::XdpPreference;
use crate::kernel::links::{Card, CardKind};
use crate::kernel::nexthop::{NextHop, State};
use crate::xsk::{Socket, SocketConfig};

/// The carrier devices in use, by ifindex.
#[derive(Default)]
pub struct Carriers {
    open: HashMap<u32, Carrier>,
    /// Devices that might deliver superframes and were seen not to.
    single_frames: HashSet<u32>,
}

struct Carrier {
    /// AF_XDP transmits from the UMEM itself.
    zero_copy: bool,
    /// Index in the workers' tables, and of its first socket in the map when multiplied by [`CARRIER_QUEUES`].
    slot: usize,
    tunnels: BTreeSet<u16>,
    /// Modes got, for people.
    note: String,
}

impl Carriers {
    /// Whether AF_XDP serves a device as a carrier.
    pub fn has(&self, ifindex: u32) -> bool {
        self.open.contains_key(&ifindex)
    }
}

impl Manager {
    /// Follows the way to a tunnel's peer from now on, in place of another peer's.
    pub(super) fn follow(&mut self, number: u16, peer: SocketAddr) {
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        tenant.peer = Some(peer);
        if tenant.socks.is_none() {
            self.follow_target(number);
        }
    }

    /// Takes up the relay of a tunnel's SOCKS5 server, or that there is none.
    pub(super) fn set_relay(&mut self, number: u16, relay: Option<SocketAddr>) {
        let Some(socks) = self.tenants.get_mut(&number).and_then(|tenant| tenant.socks.as_mut()) else { return };
        let server = socks.server;
        socks.relay = relay;
        self.workers.tell_all(|_| Command::SetRelay(number, relay));
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        if relay.is_none() {
            tenant.door = Some(format!("no relay of the SOCKS5 server {server}"));
        }
        self.follow_target(number);
    }

    fn follow_target(&mut self, number: u16) {
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        if let Some(old) = tenant.follower.take() {
            old.abort();
        }
        let Some(peer) = tenant.target() else { return };
        let from = Some(tenant.listens.ip()).filter(|ip| !ip.is_unspecified());
        let mut states = self.next_hops.watch(peer.ip(), from);
        let ways = self.ways.clone();
        let follower = tokio::spawn(async move {
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                if ways.send(News { tunnel: number, peer, state }).await.is_err() {
                    return;
                }
            }
        });
        tenant.follower = Some(follower.abort_handle());
    }

    /// Takes up a new way to a tunnel's peer, or that there is none.
    pub(super) async fn take_in(&mut self, News { tunnel: number, peer, state }: News) {
        let Some(tenant) = self.tenants.get_mut(&number).filter(|tenant| tenant.target() == Some(peer)) else { return };
        let hop = match state {
            State::Unknown => return,
            State::Unreachable(reason) => Err(reason.to_string()),
            State::Found(hop) => Ok(hop),
        };
        let looped = hop.as_ref().is_ok_and(|hop| self.devices.contains_key(&hop.ifindex));
        let was_looped = std::mem::replace(&mut tenant.looped, looped);
        // The news is said when the worker acts by it.
        let (way, news) = match hop {
            // The carrier device stays open: the same way may come back at any moment, and there are drivers that take
            // the link down to attach XDP, which would never end.
            Err(reason) => {
                tenant.hop = None;
                (Way::NoRoute, Some(reason))
            }
            Ok(_) if looped => (Way::Looped, (!was_looped).then(|| "looped route".to_owned())),
            Ok(hop) => {
                self.set_source(number, hop.source);
                let too_small = self.set_path_mtu(number, hop.mtu as usize, peer.ip());
                (self.way_over(hop, number).await, too_small.then(|| "MTU too small".to_owned()))
            }
        };
        if let Some(tenant) = self.tenants.get(&number) {
            self.workers.tell_all(|_| Command::SetWay(number, peer.ip(), way, tenant.sizes.mtu()));
        }
        if let Some(news) = news {
            self.notice(number, news);
        }
    }

    /// Takes up the address that packets to the peer leave with, where the system picks it.
    fn set_source(&mut self, number: u16, source: IpAddr) {
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        if tenant.listens.ip().is_unspecified() && tenant.me.ip() != source {
            let before = tenant.me;
            tenant.me.set_ip(source);
            let me = tenant.me;
            self.tell(number, Event::NewMe { me, before });
        }
    }

    /// What the way out of a tunnel is, where its carrier device is not open.
    async fn door_by_socket(&self, ifindex: u32, tenant: &Tenant) -> String {
        let card = self.netlink.card(ifindex).await;
        let (name, other) = match &card {
            Ok(card) => (card.name.as_str(), card.kind == CardKind::Other),
            Err(_) => ("a device that has gone", false),
        };
        match (tenant.socks, tenant.carrier_door) {
            (Some(Socks { server, relay: Some(relay) }), _) => {
                format!("{name}: UDP socket, by the relay {relay} of the SOCKS5 server {server}")
            }
            (Some(Socks { server, relay: None }), _) => format!("no relay of the SOCKS5 server {server}"),
            (None, Door::Udp) => format!("{name}: UDP socket, as `carrier` says"),
            (None, _) if other => format!("{name}: UDP socket, no Ethernet device"),
            (None, _) if tenant.refused == Some(ifindex) => format!("{name}: UDP socket, AF_XDP refused"),
            (None, _) => format!("{name}: UDP socket, until single frames come in numbers"),
        }
    }

    /// Moves a tunnel to the carrier device of a way, and chooses the door.
    async fn way_over(&mut self, hop: NextHop, number: u16) -> Way {
        let is_open = self.use_carrier(hop.ifindex, number).await;
        let door = match self.tenants.get(&number) {
            Some(tenant) if !is_open => Some(self.door_by_socket(hop.ifindex, tenant).await),
            _ => None,
        };
        if let Some(tenant) = self.tenants.get_mut(&number) {
            tenant.door = door;
        }
        let Some(tenant) = self.tenants.get_mut(&number) else { return Way::Socket };
        tenant.hop = Some(hop);
        let (me, door) = (tenant.me, tenant.carrier_door);
        let after = is_open.then_some(hop.ifindex);
        let before = std::mem::replace(&mut tenant.carrier, after);
        if let Some(unused) = before.filter(|_| before != after) {
            self.release_carrier(unused, number).await;
        }
        after.and_then(|_| self.path(hop, me, door)).map_or(Way::Socket, Way::Carrier)
    }

    /// Takes up that a tunnel's UDP socket gets single frames: AF_XDP is the faster door for them, on the same device for
    /// all tunnels that choose by themselves.
    pub(super) async fn saw_single_frames(&mut self, number: u16) {
        let hop = self.tenants.get(&number).and_then(|tenant| tenant.hop);
        let Some(ifindex) = hop.map(|hop| hop.ifindex) else { return };
        if !self.carriers.single_frames.insert(ifindex) {
            return;
        }
        let over = |tenant: &Tenant| tenant.hop.filter(|hop| hop.ifindex == ifindex).zip(tenant.peer);
        let tunnels: Vec<_> =
            self.tenants.iter().filter_map(|(number, tenant)| Some((*number, over(tenant)?))).collect();
        for (number, (hop, peer)) in tunnels {
            let way = self.way_over(hop, number).await;
            if let Some(tenant) = self.tenants.get(&number) {
                self.workers.tell_all(|_| Command::SetWay(number, peer.ip(), way, tenant.sizes.mtu()));
            }
        }
    }

    /// The way out by AF_XDP, where that is wanted: with copies, UDP_SEGMENT is faster, but for what leaves one a call
    /// (docs/BENCHMARKS.md).
    fn path(&self, hop: NextHop, me: SocketAddr, door: Door) -> Option<Path> {
        let carrier = self.carriers.open.get(&hop.ifindex)?;
        Some(Path {
            carrier: carrier.slot,
            hop: Hop { source: hop.source_mac?, destination: hop.destination_mac? },
            source: SocketAddr::new(if me.ip().is_unspecified() { hop.source } else { me.ip() }, me.port()),
            mtu: hop.mtu as usize,
            only_alone: door == Door::Auto && !carrier.zero_copy,
        })
    }

    /// Opens a carrier device for a tunnel, or joins it; whether AF_XDP can be had on it.
    async fn use_carrier(&mut self, ifindex: u32, number: u16) -> bool {
        let Some(tenant) = self.tenants.get(&number) else { return false };
        if tenant.carrier_door == Door::Udp || tenant.refused == Some(ifindex) {
            return false;
        }
        if let Some(carrier) = self.carriers.open.get_mut(&ifindex) {
            carrier.tunnels.insert(number);
            return true;
        }
        let (door, mut mode) = (tenant.carrier_door, tenant.xdp_mode);
        let card = match self.netlink.card(ifindex).await {
            Ok(card) => card,
            Err(error) => {
                self.notice(number, format!("{error}; sending by UDP socket"));
                return false;
            }
        };
        if door == Door::Auto && card.superframes {
            // In the stack a superframe would still come now and then, and pass for one large datagram.
            if mode == XdpPreference::Generic || !self.carriers.single_frames.contains(&ifindex) {
                return false;
            }
            mode = XdpPreference::Native;
        }
        // Where the choice is ours, a device that AF_XDP was never made for is no fault of anybody's.
        let as_expected = door == Door::Auto && card.kind != CardKind::Ethernet;
        match self.open_carrier(card, mode).await {
            Ok(mut carrier) => {
                tracing::info!("{}", carrier.note);
                self.news(number, carrier.note.clone());
                carrier.tunnels.insert(number);
                self.carriers.open.insert(ifindex, carrier);
                true
            }
            Err(error) => {
                if let Some(tenant) = self.tenants.get_mut(&number) {
                    tenant.refused = Some(ifindex);
                    self.refused.insert(ifindex);
                }
                let message = format!("{error:#}; sending by UDP socket");
                if as_expected {
                    self.news(number, message)
                } else {
                    self.notice(number, message)
                }
                false
            }
        }
    }

    async fn open_carrier(&mut self, card: Card, mode: XdpPreference) -> anyhow::Result<Carrier> {
        let ifindex = card.ifindex;
        if card.kind != CardKind::Ethernet {
            anyhow::bail!("{}: no Ethernet device, so AF_XDP cannot send on it", card.name);
        }
        if self.lans.has(ifindex) {
            anyhow::bail!("{}: the short cut (`lan`) has its AF_XDP sockets", card.name);
        }
        let slot = (0..MAX_CARRIERS as usize).find(|slot| self.carriers.open.values().all(|c| c.slot != *slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_CARRIERS} carrier slots are in use"))?;
        let base = slot as u32 * CARRIER_QUEUES;
        let queues = card.receive_queues.clamp(1, CARRIER_QUEUES);
        let mode = self.programs.attach_carrier(ifindex, mode)?;
        match self.open_queues(ifindex, slot, base, queues).await {
            Ok(zero_copy) => {
                let copying = if zero_copy { "zero copy" } else { "copy mode" };
                let note = format!("{}: {mode} XDP, {copying}, {queues} queue(s)", card.name);
                Ok(Carrier { zero_copy, slot, tunnels: BTreeSet::new(), note })
            }
            Err(error) => {
                self.programs.detach_carrier(ifindex);
                Err(error)
            }
        }
    }

    /// Opens the queues of a carrier device; whether all of them are zero copy.
    async fn open_queues(&mut self, ifindex: u32, slot: usize, base: u32, queues: u32) -> anyhow::Result<bool> {
        let mut sockets = Vec::new();
        for queue in 0..queues {
            let socket = self.bind_queue(ifindex, queue, SocketConfig::default()).await?;
            self.programs.set_carrier_socket(base + queue, &socket)?;
            sockets.push(socket);
        }
        let zero_copy = sockets.iter().all(Socket::zero_copy);
        let (done, listening) = std::sync::mpsc::channel();
        let mut shares = share_of(sockets, self.workers.count());
        self.workers.tell_all(|worker| Command::AddCarrier(slot, std::mem::take(&mut shares[worker]), done.clone()));
        drop(done);
        // Until then the program passes everything to the UDP sockets; a ring without frames would lose it.
        dropped(listening).await;
        if let Err(error) = self.programs.set_carrier_device(ifindex, base) {
            self.workers.tell_all(|_| Command::RemoveCarrier(slot, std::sync::mpsc::channel().0));
            return Err(error.into());
        }
        Ok(zero_copy)
    }

    /// Leaves a carrier device, and closes it after its last tunnel.
    pub(super) async fn release_carrier(&mut self, ifindex: u32, number: u16) {
        let Some(carrier) = self.carriers.open.get_mut(&ifindex) else { return };
        carrier.tunnels.remove(&number);
        if carrier.tunnels.is_empty() {
            self.close_carrier(ifindex).await;
        }
    }

    /// Closes a carrier device; tunnels that used it send by their UDP sockets.
    pub(super) async fn close_carrier(&mut self, ifindex: u32) {
        self.carriers.single_frames.remove(&ifindex);
        let Some(carrier) = self.carriers.open.remove(&ifindex) else { return };
        self.programs.detach_carrier(ifindex);
        if let Err(error) = self.programs.remove_carrier_device(ifindex) {
            tracing::debug!("{error}");
        }
        let (done, gone) = std::sync::mpsc::channel();
        self.workers.tell_all(|_| Command::RemoveCarrier(carrier.slot, done.clone()));
        drop(done);
        dropped(gone).await;
        for number in carrier.tunnels {
            if let Some(tenant) = self.tenants.get_mut(&number) {
                tenant.carrier = None;
            }
        }
    }

    /// Modes got on the carrier device of a tunnel.
    pub(super) fn carrier_note(&self, ifindex: u32) -> Option<&str> {
        self.carriers.open.get(&ifindex).map(|carrier| carrier.note.as_str())
    }

    /// Tells a tunnel's daemon something for its log that the operator should look at.
    pub(super) fn notice(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: false });
    }

    /// Tells a tunnel's daemon something for its log that is as it should be.
    pub(super) fn news(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: true });
    }
}
