//! Carrier devices: opened when the first tunnel's way leads over them, closed after the last.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use cipe_common::maps::{CARRIER_QUEUES, MAX_CARRIERS};

use super::Manager;
use crate::control::protocol::{Carrier as Door, Event};
use crate::engine::outer::Hop;
use crate::engine::tunnel::{Path, Way};
use crate::engine::worker::Command;
use crate::kernel::bpf::XdpPreference;
use crate::kernel::links::CardKind;
use crate::kernel::nexthop::{NextHop, State};
use crate::xsk::{Socket, SocketConfig};

/// The carrier devices in use, by ifindex.
#[derive(Default)]
pub struct Carriers {
    open: HashMap<u32, Carrier>,
}

struct Carrier {
    /// AF_XDP transmits from the UMEM itself.
    zero_copy: bool,
    /// Index in the worker's table, and of its first socket in the map when multiplied by [`CARRIER_QUEUES`].
    slot: usize,
    tunnels: BTreeSet<u16>,
    /// Modes got, for people.
    note: String,
}

impl Manager {
    /// Follows the way to a tunnel's peer from now on, in place of another peer's.
    pub(super) fn follow(&mut self, number: u16, peer: SocketAddr) {
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        tenant.peer = Some(peer);
        let from = Some(tenant.me.ip()).filter(|ip| !ip.is_unspecified());
        let mut states = self.next_hops.watch(peer.ip(), from);
        let ways = self.ways.clone();
        let follower = tokio::spawn(async move {
            while states.changed().await.is_ok() {
                let state = states.borrow_and_update().clone();
                if ways.send((number, state)).await.is_err() {
                    return;
                }
            }
        });
        if let Some(old) = tenant.follower.replace(follower.abort_handle()) {
            old.abort();
        }
    }

    /// Takes up a new way to a tunnel's peer, or that there is none.
    pub(super) async fn set_way(&mut self, number: u16, state: &State) {
        let Some(tenant) = self.tenants.get(&number) else { return };
        let (me, before, door, peer) = (tenant.me, tenant.carrier, tenant.carrier_door, tenant.peer);
        let hop = match state {
            State::Unknown => return,
            State::Unreachable(reason) => {
                self.notice(number, reason.to_string());
                None
            }
            State::Found(hop) => Some(*hop),
        };
        let looped = hop.is_some_and(|hop| self.tenants.values().any(|tenant| tenant.device.index == hop.ifindex));
        if looped {
            self.notice(number, "looped route".to_owned());
        }
        let usable = hop.filter(|_| !looped);
        let after = match usable {
            Some(hop) => self.use_carrier(hop.ifindex, number).await.then_some(hop.ifindex),
            None => None,
        };
        if let Some(unused) = before.filter(|_| before != after) {
            self.release_carrier(unused, number);
        }
        if let Some(tenant) = self.tenants.get_mut(&number) {
            tenant.carrier = after;
        }
        let way = match usable {
            None if looped => Way::Looped,
            None => Way::NoRoute,
            Some(hop) => self.path(hop, me, door).map_or(Way::Socket, Way::Carrier),
        };
        let Some(peer) = peer else { return };
        if let Some(hop) = usable {
            self.set_path_mtu(number, hop.mtu as usize, peer.ip());
        }
        if let Some(tenant) = self.tenants.get(&number) {
            self.worker.send(Command::SetWay(number, peer.ip(), way, tenant.sizes.mtu()));
        }
    }

    /// The way out by AF_XDP, where that is wanted: with copies, UDP_SEGMENT is faster (docs/BENCHMARKS.md).
    fn path(&self, hop: NextHop, me: SocketAddr, door: Door) -> Option<Path> {
        let carrier = self.carriers.open.get(&hop.ifindex)?;
        if door == Door::Auto && !carrier.zero_copy {
            return None;
        }
        Some(Path {
            carrier: carrier.slot,
            hop: Hop { source: hop.source_mac?, destination: hop.destination_mac? },
            source: SocketAddr::new(if me.ip().is_unspecified() { hop.source } else { me.ip() }, me.port()),
            mtu: hop.mtu as usize,
        })
    }

    /// Opens a carrier device for a tunnel, or joins it; whether AF_XDP can be had on it.
    async fn use_carrier(&mut self, ifindex: u32, number: u16) -> bool {
        let Some(tenant) = self.tenants.get(&number) else { return false };
        if tenant.carrier_door == Door::Udp {
            return false;
        }
        if let Some(carrier) = self.carriers.open.get_mut(&ifindex) {
            carrier.tunnels.insert(number);
            return true;
        }
        match self.open_carrier(ifindex, tenant.xdp_mode).await {
            Ok(mut carrier) => {
                tracing::info!("{}", carrier.note);
                self.notice(number, carrier.note.clone());
                carrier.tunnels.insert(number);
                self.carriers.open.insert(ifindex, carrier);
                true
            }
            Err(error) => {
                self.notice(number, format!("{error:#}; sending by UDP socket"));
                false
            }
        }
    }

    async fn open_carrier(&mut self, ifindex: u32, mode: XdpPreference) -> anyhow::Result<Carrier> {
        let card = self.netlink.card(ifindex).await?;
        if card.kind != CardKind::Ethernet {
            anyhow::bail!("{}: no Ethernet device, so AF_XDP cannot send on it", card.name);
        }
        let slot = (0..MAX_CARRIERS as usize).find(|slot| self.carriers.open.values().all(|c| c.slot != *slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_CARRIERS} carrier slots are in use"))?;
        let base = slot as u32 * CARRIER_QUEUES;
        let queues = card.receive_queues.clamp(1, CARRIER_QUEUES);
        let mode = self.programs.attach_carrier(ifindex, mode)?;
        let mut open = || -> anyhow::Result<Vec<Socket>> {
            let mut sockets = Vec::new();
            for queue in 0..queues {
                let socket = Socket::bind(&self.umem, ifindex, queue, SocketConfig::default())?;
                self.programs.set_carrier_socket(base + queue, &socket)?;
                sockets.push(socket);
            }
            self.programs.set_carrier_device(ifindex, base)?;
            Ok(sockets)
        };
        match open() {
            Ok(sockets) => {
                let zero_copy = sockets.iter().all(Socket::zero_copy);
                let copying = if zero_copy { "zero copy" } else { "copy mode" };
                let note = format!("{}: {mode} XDP, {copying}, {queues} queue(s)", card.name);
                self.worker.send(Command::AddCarrier(slot, sockets));
                Ok(Carrier { zero_copy, slot, tunnels: BTreeSet::new(), note })
            }
            Err(error) => {
                self.programs.detach_carrier(ifindex);
                Err(error)
            }
        }
    }

    /// Leaves a carrier device, and closes it after its last tunnel.
    pub(super) fn release_carrier(&mut self, ifindex: u32, number: u16) {
        let Some(carrier) = self.carriers.open.get_mut(&ifindex) else { return };
        carrier.tunnels.remove(&number);
        if carrier.tunnels.is_empty() {
            self.close_carrier(ifindex);
        }
    }

    /// Closes a carrier device; tunnels that used it send by their UDP sockets.
    pub(super) fn close_carrier(&mut self, ifindex: u32) {
        let Some(carrier) = self.carriers.open.remove(&ifindex) else { return };
        self.programs.detach_carrier(ifindex);
        if let Err(error) = self.programs.remove_carrier_device(ifindex) {
            tracing::debug!("{error}");
        }
        let (done, gone) = std::sync::mpsc::channel();
        self.worker.send(Command::RemoveCarrier(carrier.slot, done));
        let _ = gone.recv_timeout(Duration::from_secs(1));
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

    /// Tells a tunnel's daemon something for its log.
    pub(super) fn notice(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message });
    }
}
