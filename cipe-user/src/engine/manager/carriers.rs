//! Carrier devices: opened when the first tunnel's way leads over them, closed after the last, or when what comes by them
//! goes better by the UDP sockets.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use cipe_common::maps::{CARRIER_QUEUES, MAX_CARRIERS};
use rustix::thread::{MembarrierCommand, membarrier};

use super::attach::dropped;
use super::habit::Habit;
use super::workers::share_of;
use super::{Manager, Tenant};
use crate::control::protocol::Carrier as Door;
use crate::engine::worker::Command;
use crate::kernel::bpf::{XdpMode, XdpPreference};
use crate::kernel::links::{Card, CardKind};
use crate::xsk::{Socket, SocketConfig};

/// The carrier devices in use, by ifindex.
#[derive(Default)]
pub struct Carriers {
    open: HashMap<u32, Carrier>,
    /// What was seen on devices that might deliver superframes.
    habits: HashMap<u32, Habit>,
}

/// A device whose datagrams come by AF_XDP.
pub struct Carrier {
    /// AF_XDP transmits from the UMEM itself.
    pub zero_copy: bool,
    /// Index in the workers' tables, and of its first socket in the map when multiplied by [`CARRIER_QUEUES`].
    pub slot: usize,
    /// Modes got, for people.
    pub note: String,
    /// Its name when it was opened.
    pub name: String,
    tunnels: BTreeSet<u16>,
    /// XDP runs in the network stack.
    generic: bool,
    /// It might deliver superframes, if native XDP did not keep the other end from it.
    superframes: bool,
    /// Datagrams through it, both ways.
    traffic: Arc<AtomicU64>,
}

impl Carrier {
    /// Whether superframes of the other end come uncut, of which AF_XDP can make nothing.
    pub fn loses_superframes(&self) -> bool {
        self.generic && self.superframes
    }
}

impl Carriers {
    /// Whether AF_XDP serves a device as a carrier.
    pub fn has(&self, ifindex: u32) -> bool {
        self.open.contains_key(&ifindex)
    }

    /// A device that AF_XDP serves.
    pub fn get(&self, ifindex: u32) -> Option<&Carrier> {
        self.open.get(&ifindex)
    }

    /// Takes up a device that was opened.
    pub fn insert(&mut self, ifindex: u32, carrier: Carrier) {
        self.open.insert(ifindex, carrier);
    }

    /// Adds a tunnel to those of a device; `false` if AF_XDP does not serve that.
    pub fn join(&mut self, ifindex: u32, number: u16) -> bool {
        self.open.get_mut(&ifindex).map(|carrier| carrier.tunnels.insert(number)).is_some()
    }

    /// Whether a device that might deliver superframes was seen not to.
    pub fn has_single_frames(&self, ifindex: u32) -> bool {
        self.habits.get(&ifindex).is_some_and(Habit::has_single_frames)
    }
}

impl Manager {
    /// Takes up that a tunnel's UDP socket gets single frames: AF_XDP is the faster door for them, on the same device for
    /// all tunnels that choose by themselves.
    pub(super) async fn saw_single_frames(&mut self, number: u16) {
        let hop = self.tenants.get(&number).and_then(|tenant| tenant.hop);
        let Some(ifindex) = hop.map(|hop| hop.ifindex) else { return };
        if self.carriers.habits.entry(ifindex).or_default().see_single_frames(Instant::now()) {
            self.choose_doors(ifindex).await;
        }
    }

    /// Leaves devices to the UDP sockets that are calm, where all tunnels choose by themselves: as long as XDP is there, the
    /// other end cuts all superframes, and whether it would send any shows without it alone. Not under load: a veth loses what
    /// waits in its rings then, and tells nobody.
    pub(super) async fn tend_carriers(&mut self, now: Instant) {
        let mut calm = Vec::new();
        for (ifindex, carrier) in self.carriers.open.iter().filter(|(_, carrier)| carrier.superframes) {
            let habit = self.carriers.habits.entry(*ifindex).or_default();
            if habit.is_calm(carrier.traffic.load(Ordering::Relaxed), now) {
                calm.push(*ifindex);
            }
        }
        for ifindex in calm {
            let Some(carrier) = self.carriers.open.get(&ifindex) else { continue };
            let chooses = |number| self.tenants.get(number).is_some_and(|tenant| tenant.carrier_door == Door::Auto);
            if !carrier.tunnels.iter().all(chooses) {
                continue;
            }
            let (tunnels, name) = (carrier.tunnels.clone(), carrier.name.clone());
            let Some(waited) = self.carriers.habits.get_mut(&ifindex).map(|habit| habit.leave(now)) else { continue };
            self.shut(ifindex).await;
            let message =
                format!("{name}: calm for {} s; UDP socket, until single frames come in numbers", waited.as_secs());
            tracing::info!("{message}");
            tunnels.iter().for_each(|number| self.news(*number, message.clone()));
            self.choose_doors(ifindex).await;
        }
    }

    /// Chooses the doors of all tunnels over a device anew.
    async fn choose_doors(&mut self, ifindex: u32) {
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

    pub(super) async fn open_carrier(&mut self, card: Card, mode: XdpPreference) -> anyhow::Result<Carrier> {
        let ifindex = card.ifindex;
        if card.kind != CardKind::Ethernet {
            anyhow::bail!("{}: no Ethernet device, so AF_XDP cannot send on it", card.name);
        }
        if self.lans.has(ifindex) {
            anyhow::bail!("{}: the short cut (`lan`) has its AF_XDP sockets", card.name);
        }
        let slot = (0..MAX_CARRIERS as usize).find(|slot| self.carriers.open.values().all(|c| c.slot != *slot));
        let slot = slot.ok_or_else(|| anyhow::anyhow!("all {MAX_CARRIERS} carrier slots are in use"))?;
        let queues = card.receive_queues.clamp(1, CARRIER_QUEUES);
        let traffic = Arc::default();
        let mode = self.programs.attach_carrier(ifindex, mode)?;
        let generic = mode != XdpMode::Native;
        match self.open_queues(ifindex, slot, queues, &traffic).await {
            Ok(zero_copy) => {
                let copying = if zero_copy { "zero copy" } else { "copy mode" };
                let note = format!("{}: {mode} XDP, {copying}, {queues} queue(s)", card.name);
                let Card { name, superframes, .. } = card;
                Ok(Carrier { zero_copy, slot, note, tunnels: BTreeSet::new(), name, generic, superframes, traffic })
            }
            Err(error) => {
                self.programs.detach_carrier(ifindex);
                Err(error)
            }
        }
    }

    /// Opens the queues of a carrier device; whether all of them are zero copy.
    async fn open_queues(
        &mut self,
        ifindex: u32,
        slot: usize,
        queues: u32,
        traffic: &Arc<AtomicU64>,
    ) -> anyhow::Result<bool> {
        let base = slot as u32 * CARRIER_QUEUES;
        let mut sockets = Vec::new();
        for queue in 0..queues {
            let socket = self.bind_queue(ifindex, queue, SocketConfig::default()).await?;
            self.programs.set_carrier_socket(base + queue, &socket)?;
            sockets.push(socket);
        }
        let zero_copy = sockets.iter().all(Socket::zero_copy);
        let mut shares = share_of(sockets, self.workers.count());
        let share =
            |worker: usize, done| Command::AddCarrier(slot, std::mem::take(&mut shares[worker]), traffic.clone(), done);
        // Until then the program passes everything to the UDP sockets; a ring without frames would lose it.
        self.ask_workers(share).await;
        if let Err(error) = self.programs.set_carrier_device(ifindex, base) {
            self.ask_workers(|_, done| Command::RemoveCarrier(slot, done)).await;
            return Err(error.into());
        }
        // What was passed on before is to be read before.
        programs_over().await;
        self.ask_workers(|_, done| Command::EmptySockets(done)).await;
        self.workers.tell_all(|_| Command::BeginCarrier(slot));
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

    /// Closes a carrier device and forgets what was seen on it; tunnels that used it send by their UDP sockets.
    pub(super) async fn close_carrier(&mut self, ifindex: u32) {
        self.carriers.habits.remove(&ifindex);
        self.shut(ifindex).await;
    }

    /// Closes a carrier device; what its sockets have got is read before anything else.
    async fn shut(&mut self, ifindex: u32) {
        let Some(carrier) = self.carriers.open.remove(&ifindex) else { return };
        let is_used = !carrier.tunnels.is_empty();
        if is_used {
            self.ask_workers(|_, done| Command::HoldSockets(true, done)).await;
        }
        if let Err(error) = self.programs.remove_carrier_device(ifindex) {
            tracing::debug!("{error}");
        }
        if is_used {
            programs_over().await;
        }
        self.ask_workers(|_, done| Command::RemoveCarrier(carrier.slot, done)).await;
        if is_used {
            self.ask_workers(|_, done| Command::HoldSockets(false, done)).await;
        }
        self.programs.detach_carrier(ifindex);
        for number in carrier.tunnels {
            if let Some(tenant) = self.tenants.get_mut(&number) {
                tenant.carrier = None;
            }
        }
    }

    /// Gives each worker a command of its own, and waits until all are carried out.
    async fn ask_workers(&self, mut command: impl FnMut(usize, Sender<()>) -> Command) {
        let (done, all_done) = channel();
        self.workers.tell_all(|worker| command(worker, done.clone()));
        drop(done);
        dropped(all_done).await;
    }

    /// Modes got on the carrier device of a tunnel.
    pub(super) fn carrier_note(&self, ifindex: u32) -> Option<&str> {
        self.carriers.open.get(&ifindex).map(|carrier| carrier.note.as_str())
    }
}

/// Waits until no program runs any more that began before, and the kernel has handed on what such a one has passed:
/// receiving is a read-side section of RCU, and membarrier(2) waits for the end of all of those.
async fn programs_over() {
    let waited = tokio::task::spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
    if !matches!(waited, Ok(Ok(()))) {
        tracing::debug!("membarrier: {waited:?}; what comes while a door changes may be overtaken");
    }
}
