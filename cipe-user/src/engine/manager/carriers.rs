//! Carrier devices: opened when the first tunnel's way leads over them, closed after the last, or when what comes by them
//! goes better by the UDP sockets.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

use cipe_common::maps::{CARRIER_QUEUES, MAX_CARRIERS};
use rustix::thread::{MembarrierCommand, membarrier};

use super::copying::{Copying, Got};
use super::habit::Habit;
use super::trial::{Change, Trial};
use super::workers::share_of;
use super::{Leads, Manager, Tenant};
use crate::control::protocol::Carrier as Door;
use crate::engine::carrier::Traffic;
use crate::engine::worker::{Command, NewCarrier};
use crate::kernel::bpf::{XdpMode, XdpPreference};
use crate::kernel::links::{Card, CardKind};
use crate::kernel::nexthop::NextHop;
use crate::kernel::{ethtool, netdev};
use crate::xsk::{Mode, MultiBuffer, SocketConfig};

/// The carrier devices in use, by ifindex.
#[derive(Default)]
pub struct Carriers {
    open: HashMap<u32, Carrier>,
    /// What was seen on devices that might deliver superframes.
    habits: HashMap<u32, Habit>,
    /// What came of zero copy on devices whose drivers have it; it stays when a device is closed.
    trials: HashMap<u32, Trial>,
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
    /// Number of the program that was attached.
    program: Option<u32>,
    /// XDP runs in the network stack.
    generic: bool,
    /// It might deliver superframes, if native XDP did not keep the other end from it.
    superframes: bool,
    /// The workers can send live frames on it, while it takes such.
    can_live: bool,
    /// It takes live frames now: the other end runs native XDP, too.
    takes_live: bool,
    /// Datagrams through it, both ways.
    traffic: Arc<Traffic>,
    /// When it was opened.
    opened: Instant,
    /// Some of its queues are zero copy.
    some_zero_copy: bool,
}

impl Carrier {
    /// Whether superframes of the other end come uncut, of which AF_XDP can make nothing.
    pub fn loses_superframes(&self) -> bool {
        self.generic && self.superframes
    }

    /// The tunnels over it.
    pub fn tunnels(&self) -> Vec<u16> {
        self.tunnels.iter().copied().collect()
    }

    /// Whether what is sent in numbers leaves as live frames, if the choice is ours.
    pub fn sends_live(&self) -> bool {
        self.takes_live
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

    /// The devices that AF_XDP serves, with the numbers of the programs that were attached.
    pub fn programs(&self) -> Vec<(u32, u32)> {
        self.open.iter().filter_map(|(ifindex, carrier)| Some((*ifindex, carrier.program?))).collect()
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
        let Some(ifindex) = hop.map(|hop| hop.ifindex).filter(|ifindex| !self.devices.contains_key(ifindex)) else {
            return;
        };
        if self.carriers.habits.entry(ifindex).or_default().see_single_frames(Instant::now()) {
            self.choose_doors(ifindex).await;
        }
    }

    /// Takes up that much leaves by a tunnel's UDP socket: where the other end of a veth runs native XDP, superframes are cut
    /// on the way anyway, and live frames cost less.
    pub(super) async fn saw_many_sent(&mut self, number: u16) {
        let Some(tenant) = self.tenants.get(&number).filter(|tenant| tenant.carrier.is_none()) else { return };
        let Some(ifindex) = tenant.hop.map(|hop| hop.ifindex) else { return };
        let cuts = || ethtool::takes_udp_superframes(ifindex) == Some(false);
        if tenant.carrier_door == Door::Auto
            && netdev::takes_xdp_frames(ifindex)
            && cuts()
            && self.netlink.card(ifindex).await.is_ok_and(|card| self.may_send_live(&card))
        {
            self.saw_single_frames(number).await;
        }
    }

    /// Whether a device can be sent live frames. Of several queues a veth picks that of the CPU for them and one by the flow
    /// for what a socket sends, so that they would overtake each other.
    fn may_send_live(&self, card: &Card) -> bool {
        let single = || card.receive_queues == 1 && ethtool::transmit_queues(card.ifindex) == Some(1);
        self.sends_live && card.veth && single()
    }

    /// Follows which devices take live frames.
    async fn follow_live_frames(&mut self) {
        let mut changed = Vec::new();
        for (ifindex, carrier) in self.carriers.open.iter_mut().filter(|(_, carrier)| carrier.can_live) {
            let takes_live = netdev::takes_xdp_frames(*ifindex);
            if std::mem::replace(&mut carrier.takes_live, takes_live) != takes_live {
                changed.push(*ifindex);
            }
        }
        for ifindex in changed {
            self.choose_doors(ifindex).await;
        }
    }

    /// Leaves devices to the UDP sockets that are calm, where all tunnels choose by themselves: as long as XDP is there, the
    /// other end cuts all superframes, and whether it would send any shows without it alone. Not under load: a veth loses what
    /// waits in its rings then, and tells nobody.
    pub(super) async fn tend_carriers(&mut self, now: Instant) {
        self.follow_live_frames().await;
        let mut calm = Vec::new();
        for (ifindex, carrier) in self.carriers.open.iter().filter(|(_, carrier)| carrier.superframes) {
            let habit = self.carriers.habits.entry(*ifindex).or_default();
            if habit.is_calm(carrier.traffic.total(), now) {
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

    /// Lets the kernel copy for devices by whose zero copy nothing comes, and tries it again later.
    pub(super) async fn tend_zero_copy(&mut self, now: Instant) {
        let mut changed = Vec::new();
        for (ifindex, carrier) in &self.carriers.open {
            let Some(trial) = self.carriers.trials.get_mut(ifindex) else { continue };
            let (opened, received) = (carrier.opened, carrier.traffic.received());
            if let Some(change) = trial.look(carrier.some_zero_copy, opened, received, now) {
                changed.push((*ifindex, carrier.name.clone(), carrier.tunnels(), change));
            }
        }
        for (ifindex, name, tunnels, change) in changed {
            let message = match change {
                Change::GiveUp(wait) => {
                    let wait = wait.as_secs() / 3600;
                    format!(
                        "{name}: nothing comes by zero copy; the kernel copies, and zero copy is tried again in {wait} h"
                    )
                }
                Change::TryAgain => format!("{name}: zero copy is tried again"),
            };
            tracing::info!("{message}");
            for number in tunnels {
                match change {
                    Change::GiveUp(_) => self.notice(number, message.clone()),
                    Change::TryAgain => self.news(number, message.clone()),
                }
            }
            // A tunnel without a way to its peer comes back with the way.
            self.shut(ifindex).await;
            self.choose_doors(ifindex).await;
        }
    }

    /// Chooses the doors of all tunnels over a device anew.
    pub(super) async fn choose_doors(&mut self, ifindex: u32) {
        self.choose_doors_of(|hop| hop.ifindex == ifindex).await;
    }

    /// Chooses the doors of all tunnels anew: the host's policies have changed.
    pub(super) async fn choose_all_doors(&mut self) {
        self.choose_doors_of(|_| true).await;
    }

    async fn choose_doors_of(&mut self, concerns: impl Fn(&NextHop) -> bool) {
        let over =
            |tenant: &Tenant| tenant.hop.filter(|hop| tenant.leads == Leads::Out && concerns(hop)).zip(tenant.peer);
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
        let may_live = self.may_send_live(&card) && !generic;
        let given_up = self.carriers.trials.get(&ifindex).is_some_and(Trial::is_given_up);
        let copying = Copying::of(&card, generic, self.umem.frame_size(), given_up);
        match self.open_queues(ifindex, slot, queues, &traffic, may_live, copying.mode).await {
            Ok(got) => {
                let zero_copy = got.zero_copy == got.queues;
                let some_zero_copy = got.zero_copy > 0;
                if some_zero_copy {
                    self.carriers.trials.entry(ifindex).or_default();
                }
                let copying = copying.note(got);
                let note = format!("{}: {mode} XDP, {copying}, {queues} queue(s)", card.name);
                let Card { name, superframes, .. } = card;
                let can_live = may_live && !zero_copy;
                let takes_live = can_live && netdev::takes_xdp_frames(ifindex);
                let tunnels = BTreeSet::new();
                let program = self.netlink.attached(ifindex).await.map_or(None, |(program, _)| program);
                Ok(Carrier {
                    zero_copy,
                    slot,
                    note,
                    tunnels,
                    program,
                    name,
                    generic,
                    superframes,
                    can_live,
                    takes_live,
                    traffic,
                    opened: Instant::now(),
                    some_zero_copy,
                })
            }
            Err(error) => {
                self.programs.detach_carrier(ifindex);
                Err(error)
            }
        }
    }

    /// Opens the queues of a carrier device; what was got.
    async fn open_queues(
        &mut self,
        ifindex: u32,
        slot: usize,
        queues: u32,
        traffic: &Arc<Traffic>,
        live: bool,
        mode: Mode,
    ) -> anyhow::Result<Got> {
        let base = slot as u32 * CARRIER_QUEUES;
        let mut sockets = Vec::new();
        // A datagram of ours fits a frame. What needs several is a superframe, of which nothing can be made.
        let config = SocketConfig { mode, multi_buffer: MultiBuffer::Wanted, ..SocketConfig::default() };
        for queue in 0..queues {
            let socket = self.bind_queue(ifindex, queue, config).await?;
            self.programs.set_carrier_socket(base + queue, &socket)?;
            sockets.push(socket);
        }
        let got = Got::of(&sockets);
        let mut shares = share_of(sockets, self.workers.count());
        let mut lives = match live {
            true => (0..self.workers.count() as u32)
                .map(|worker| self.programs.live_frames(worker))
                .collect::<Result<Vec<_>, _>>()?
                .into_iter(),
            false => Vec::new().into_iter(),
        };
        let share = |worker: usize, done| {
            let sockets = std::mem::take(&mut shares[worker]);
            let carrier = NewCarrier { ifindex, sockets, traffic: traffic.clone(), live: lives.next() };
            Command::AddCarrier(slot, Box::new(carrier), done)
        };
        // Until then the program passes everything to the UDP sockets; a ring without frames would lose it.
        let set = match self.workers.ask_all(share).in_time().await {
            true => self.programs.set_carrier_device(ifindex, base).map_err(anyhow::Error::from),
            false => Err(anyhow::anyhow!("the workers do not take the card: the machine is too busy, or one hangs")),
        };
        if let Err(error) = set {
            self.workers.ask_all(|_, done| Command::RemoveCarrier(slot, done)).in_time().await;
            return Err(error);
        }
        // What was passed on before is to be read before.
        programs_over().await;
        self.workers.ask_all(|_, done| Command::EmptySockets(done)).in_time().await;
        self.workers.tell_all(|_| Command::BeginCarrier(slot));
        Ok(got)
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
    pub(super) async fn shut(&mut self, ifindex: u32) {
        let Some(carrier) = self.carriers.open.remove(&ifindex) else { return };
        let is_used = !carrier.tunnels.is_empty();
        if is_used {
            self.workers.ask_all(|_, done| Command::HoldSockets(true, done)).in_time().await;
        }
        if let Err(error) = self.programs.remove_carrier_device(ifindex) {
            tracing::debug!("{error}");
        }
        if is_used {
            programs_over().await;
        }
        self.workers.ask_all(|_, done| Command::RemoveCarrier(carrier.slot, done)).in_time().await;
        if is_used {
            self.workers.ask_all(|_, done| Command::HoldSockets(false, done)).in_time().await;
        }
        self.programs.detach_carrier(ifindex);
        for number in carrier.tunnels {
            if let Some(tenant) = self.tenants.get_mut(&number) {
                tenant.carrier = None;
            }
        }
    }

    /// Modes got on the carrier device of a tunnel.
    pub(super) fn carrier_note(&self, tenant: &Tenant) -> Option<String> {
        let carrier = self.carriers.open.get(&tenant.carrier?)?;
        let sends_live = carrier.sends_live() && tenant.carrier_door == Door::Auto;
        let sends = if sends_live { ", sends live frames" } else { "" };
        Some(format!("{}{sends}", carrier.note))
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
