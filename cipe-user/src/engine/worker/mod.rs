//! A worker: one thread that moves packets between the private side and the carrier. It waits for sockets, receives,
//! and sends. Its [`Datapath`] processes the packets.
//!
//! The control thread sends it [`Command`]s and receives its [`Reports`]; keys come through the key map. Workers share
//! cipher work ([`Crew`]) and the common data of tunnels.

mod carriers;
mod command;
mod device;
mod errors;
mod idle;
mod io;
mod pacing;
mod refusals;
mod sched_policy;
mod segmentation;
mod transmit;

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::Verdict;
use rustix::event::epoll;
use tokio::sync::oneshot;

use super::BATCH;
use super::bucket::Bucket;
use super::carrier::{Arrival, DoorHint, DoorStats, Inbox, UdpCarrier, XdpCarrier, losses};
use super::datapath::{Crew, Datapath, Outgoing, TunnelTable};
use super::icmp::Icmp;
use super::port::XskPort;
use super::report::{Reports, WorkerReport};
use super::tunnel::{Egress, Tunnel};
use crate::control::protocol::{Event, Protocol};
use crate::kernel::nexthop::NextHops;
use crate::kernel::scheduling;
use crate::xsk::{Frame, Held, Packet, Pool, Socket, Umem};
pub(super) use command::{Command, Done, NewCarrier};
use device::{HubDevice, PrivateDevice};
use idle::Idle;
use pacing::PacedQueue;
use sched_policy::PolicySelector;

/// Maximum frames in the fill ring of a hub: enough for the time in which a worker may wait for a busy CPU.
const MAX_PRIVATE_FILL: u32 = 2048;

/// Maximum packets under a send key towards an original (protocol section 3). A higher limit means that the peer runs
/// this program.
pub(super) const ORIGINAL_PACKETS: u64 = 32_767;

/// The control thread's handle of a worker.
pub(super) struct Handle {
    commands: Sender<Command>,
    crew: Arc<Crew>,
    number: usize,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Sends a command and wakes the worker.
    pub(super) fn send(&self, command: Command) {
        // Fails only if the worker has ended, which its thread reports.
        let _ = self.commands.send(command);
        self.crew.rouse(self.number);
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The carrier side of a tunnel.
struct CarrierEndpoint {
    /// The socket that owns the carrier port: the door of last resort, and the receiver of ICMP errors.
    udp: UdpCarrier,
    /// The carrier addresses of the tunnel.
    addresses: Vec<SocketAddr>,
}

/// Epoll tokens: a type in the upper half, an index in the lower.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    Wake,
    Hub(usize),
    Carrier(usize),
    Udp(u16),
    Lan(usize),
}

impl Source {
    fn token(self) -> u64 {
        match self {
            Self::Wake => 0,
            Self::Hub(slot) => 1 << 32 | slot as u64,
            Self::Carrier(slot) => 2 << 32 | slot as u64,
            Self::Udp(number) => 3 << 32 | u64::from(number),
            Self::Lan(slot) => 4 << 32 | slot as u64,
        }
    }

    fn of(token: u64) -> Self {
        match token >> 32 {
            1 => Self::Hub(token as u32 as usize),
            2 => Self::Carrier(token as u32 as usize),
            3 => Self::Udp(token as u16),
            4 => Self::Lan(token as u32 as usize),
            _ => Self::Wake,
        }
    }
}

struct Worker {
    number: usize,
    crew: Arc<Crew>,
    datapath: Datapath,
    endpoints: TunnelTable<CarrierEndpoint>,
    hubs: Vec<Option<HubDevice>>,
    carriers: Vec<Option<XdpCarrier>>,
    lans: Vec<Option<PrivateDevice>>,
    /// The queues of paced tunnels.
    paced: Vec<PacedQueue>,
    /// Whether the UDP sockets are not read now.
    sockets_held: bool,
    epoll: OwnedFd,
    commands: Receiver<Command>,
    reports: Reports,
    received: Vec<Packet>,
    outgoing: Vec<Outgoing>,
    arrivals: Vec<Arrival>,
    inbox: Inbox,
    stats: DoorStats,
    icmp: Icmp,
    /// Told to look up paths whose MTU the kernel has learned.
    next_hops: NextHops,
    /// Frames that a driver has released after its socket was closed; below, the sender for them.
    returned: Receiver<Vec<Frame>>,
    returns: Sender<Vec<Frame>>,
    /// Tunnels with an open question to the peer about groups of datagrams.
    asking: Vec<u16>,
    /// Tunnels whose carrier paths are probed.
    probing: Vec<u16>,
    /// Bounds the number of ICMP errors whose IVs are searched for.
    error_budget: Bucket,
    /// Packets received or sent since the last wake-up.
    moved: usize,
    /// Maximum time of busy-polling.
    busy_poll: Duration,
    /// Dropped with the worker.
    _alive: oneshot::Sender<()>,
}

/// The number of a worker, and where it runs.
pub(super) struct WorkerPlace {
    /// Its number, from 0 on.
    pub number: usize,
    /// The work sharing of all workers.
    pub crew: Arc<Crew>,
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Dropped when the worker has ended, for whatever reason.
    pub alive: oneshot::Sender<()>,
}

/// Starts a worker, with its own frames in the UMEM that all workers share.
///
/// # Errors
/// The kernel refuses an epoll or event descriptor, raw sockets, random octets, or a thread.
pub(super) fn start(
    place: WorkerPlace,
    umem: Umem,
    pool: Pool,
    reports: Reports,
    next_hops: NextHops,
) -> anyhow::Result<Handle> {
    let WorkerPlace { number, crew, cpu, alive } = place;
    let (sender, commands) = channel();
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, crew.wake_of(number), epoll::EventData::new_u64(Source::Wake.token()), epoll::EventFlags::IN)?;
    let (returns, returned) = channel();
    let worker = Worker {
        returned,
        returns,
        asking: Vec::new(),
        probing: Vec::new(),
        error_budget: Bucket::new(Instant::now()),
        number,
        crew: crew.clone(),
        datapath: Datapath::new(number, crew.clone(), umem, pool, reports.clone())?,
        endpoints: TunnelTable::default(),
        hubs: Vec::new(),
        carriers: Vec::new(),
        lans: Vec::new(),
        paced: Vec::new(),
        sockets_held: false,
        epoll,
        commands,
        reports,
        received: Vec::with_capacity(BATCH),
        outgoing: Vec::with_capacity(BATCH),
        arrivals: Vec::with_capacity(BATCH),
        inbox: Inbox::new(),
        stats: DoorStats::new(Instant::now()),
        icmp: Icmp::open().context("raw ICMP sockets, which need CAP_NET_RAW: run as root, or grant it")?,
        next_hops,
        moved: 0,
        busy_poll: Duration::ZERO,
        _alive: alive,
    };
    let thread = std::thread::Builder::new().name(format!("cipe-worker-{number}")).spawn(move || {
        if let Some((cpu, Err(error))) = cpu.map(|cpu| (cpu, scheduling::pin(cpu))) {
            tracing::warn!("a worker cannot be pinned to CPU {cpu}: {error}; the scheduler places it");
        }
        worker.run();
    })?;
    Ok(Handle { commands: sender, crew, number, thread: Some(thread) })
}

impl Worker {
    fn run(mut self) {
        let mut idle = Idle::new();
        let mut policy = PolicySelector::new(self.datapath.now);
        let mut sources: Vec<Source> = Vec::with_capacity(64);
        let pulse = self.crew.pulse(self.number).clone();
        pulse.begin();
        loop {
            pulse.beat();
            // If the kernel has refused packets, no event reports when it takes them, so try again after a millisecond.
            let longest = if self.flush() { Duration::from_secs(1) } else { Duration::from_millis(1) };
            let longest = longest.min(self.next_paced()).min(self.datapath.next_held(Instant::now()));
            sources.clear();
            self.crew.set_asleep(self.number, true);
            let woken = idle.wait(&self.epoll, longest).map(|tokens| sources.extend(tokens.map(Source::of)));
            self.crew.set_asleep(self.number, false);
            if let Err(error) = woken {
                tracing::error!("epoll: {error}; the worker ends");
                return;
            }
            if sources.contains(&Source::Wake) {
                if !self.handle_commands() {
                    return;
                }
                idle.set_limit(self.busy_poll);
                self.datapath.help();
            }
            self.send_due();
            // Serve the ready sources until all are empty, but check for commands after some rounds.
            for _ in 0..16 {
                pulse.beat();
                self.datapath.now = Instant::now();
                sources.retain(|source| self.serve(*source));
                self.flush();
                if sources.is_empty() {
                    break;
                }
            }
            // An answer of the peer may have come, or a key.
            self.send_held();
            self.poll_questions();
            self.poll_probes(self.datapath.now);
            policy.update(self.datapath.now);
            idle.gather(std::mem::take(&mut self.moved));
        }
    }

    /// Serves one batch of a source. Returns whether there may be more.
    fn serve(&mut self, source: Source) -> bool {
        match source {
            Source::Wake => false,
            Source::Hub(slot) => self.outbound(slot),
            Source::Carrier(slot) => self.inbound_carrier(slot),
            Source::Udp(number) => self.inbound_udp(number),
            Source::Lan(slot) => self.outbound_lan(slot),
        }
    }

    /// Sends the queued packets of all ports. Returns whether the kernel took all.
    fn flush(&mut self) -> bool {
        let mut all = true;
        for carrier in self.carriers.iter_mut().flatten() {
            all &= carrier.flush(&mut self.datapath.pool);
        }
        let private = self.hubs.iter_mut().flatten().flat_map(|hub| hub.device.ports());
        let lans = self.lans.iter_mut().flatten().flat_map(PrivateDevice::ports);
        for port in private.chain(lans) {
            all &= port.flush(&mut self.datapath.pool);
        }
        all
    }

    /// Carries out the commands of the control thread. Returns `false` at the end.
    fn handle_commands(&mut self) -> bool {
        self.datapath.now = Instant::now();
        let mut count = [0; 8];
        // The read fails if somebody has read the descriptor before, which does no harm.
        let _ = rustix::io::read(self.crew.wake_of(self.number), &mut count);
        self.returned.try_iter().flatten().for_each(|frame| self.datapath.pool.put(frame));
        loop {
            match self.commands.try_recv() {
                Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return false,
                Ok(command) => self.carry_out(command),
                Err(TryRecvError::Empty) => return true,
            }
        }
    }

    fn carry_out(&mut self, command: Command) {
        match command {
            Command::AddCarrier(slot, carrier, _done) => self.add_carrier(slot, *carrier),
            Command::BeginCarrier(slot) => self.begin_carrier(slot),
            Command::RemoveCarrier(slot, _done) => self.remove_carrier(slot),
            Command::EmptySockets(_done) => self.empty_sockets(),
            Command::HoldSockets(hold, _done) => self.sockets_held = hold,
            Command::AddHub(slot, sockets, injector, ends) => {
                let fill = self.fill(8, self.hubs.iter().flatten().count(), sockets.len()).clamp(256, MAX_PRIVATE_FILL);
                let ports = self.open_ports(sockets, Source::Hub(slot), fill);
                if self.hubs.len() <= slot {
                    self.hubs.resize_with(slot + 1, || None);
                }
                self.hubs[slot] = Some(HubDevice { device: PrivateDevice::hidden(ports, injector), ends, of: None });
            }
            Command::RemoveHub(slot, _done) => {
                let ports = self.hubs.get_mut(slot).and_then(Option::take).map(|hub| hub.device.into_ports());
                self.close_ports(ports.unwrap_or_default());
            }
            Command::AddLan(slot, sockets, injector, superframes, _done) => {
                let fill =
                    (self.datapath.pool.total() as u32 / 8 / sockets.len().max(1) as u32).clamp(64, MAX_PRIVATE_FILL);
                let ports = self.open_ports(sockets, Source::Lan(slot), fill);
                if self.lans.len() <= slot {
                    self.lans.resize_with(slot + 1, || None);
                }
                self.lans[slot] = Some(PrivateDevice::lan(ports, injector, superframes));
            }
            Command::RemoveLan(slot) => {
                let ports = self.lans.get_mut(slot).and_then(Option::take).map(PrivateDevice::into_ports);
                self.close_ports(ports.unwrap_or_default());
            }
            Command::SetExits(table) => self.datapath.exits.set(table),
            Command::AddTunnel(tunnel, udp, addresses, _done) => self.add_tunnel(*tunnel, udp, addresses),
            Command::RemoveTunnel(number, _done) => self.remove_tunnel(number),
            Command::Orphan(number) => self.orphan(number),
            Command::SetDeviceMtu(number, device, mtu) => {
                self.change(number, |tunnel| (tunnel.device_mtu, tunnel.mtu) = (device, mtu));
            }
            Command::SetPrivateHop(number, hop) => self.change(number, |tunnel| tunnel.private_hop = hop),
            Command::SetEgress(number, peer, egress, mtu) => self.change(number, |tunnel| {
                if tunnel.target().is_some_and(|known| known.ip() == peer) {
                    (tunnel.egress, tunnel.mtu) = (egress, mtu);
                }
            }),
            Command::SetPeer(number, peer) => self.change(number, |tunnel| tunnel.set_peer(peer)),
            Command::SetZone(number, zone) => self.set_zone(number, zone),
            Command::SetRelay(number, relay) => self.change(number, |tunnel| {
                tunnel.relay = relay;
                tunnel.egress = if relay.is_some() { Egress::Socket } else { Egress::NoRoute };
            }),
            Command::SetSendLimits { number, packets, octets, paced, static_data } => {
                self.change(number, |tunnel| {
                    tunnel.is_ours = packets > ORIGINAL_PACKETS;
                    (tunnel.limits.send_packets, tunnel.limits.send_octets) = (packets, octets);
                    (tunnel.paced, tunnel.static_data) = (paced, static_data);
                });
                if !paced {
                    self.end_pacing(number);
                }
            }
            Command::BusyPoll(ceiling) => self.busy_poll = ceiling,
            Command::CountLosses(_done) => self.count_losses(),
            Command::SendControl(number, message) => self.send_control(number, &message),
            Command::SendClear(number, to, datagram) => self.send_clear(number, to, &datagram),
            Command::SendKeyDropped(number) => self.change(number, |tunnel| tunnel.common.send_key_dropped()),
            Command::SendHandshake(number, datagram, to) => {
                self.datapath.queue_handshake(number, &datagram, to, &mut self.outgoing);
                self.send_messages();
            }
            Command::SendConfirmation(number) => {
                self.datapath.seal_confirmation(number, &mut self.outgoing);
                self.send_messages();
            }
            Command::SealedChanged(number) => {
                self.refresh(number);
                self.send_challenges();
                self.flush();
            }
            Command::SendKeySet | Command::Stop => {}
        }
    }

    /// Changes a tunnel, if it still exists.
    fn change(&mut self, number: u16, change: impl FnOnce(&mut Tunnel)) {
        if let Some(tunnel) = self.datapath.tunnels.get_mut(&number) {
            change(tunnel);
        }
        self.datapath.set_target(number);
    }

    fn add_tunnel(&mut self, tunnel: Tunnel, udp: UdpCarrier, addresses: Vec<SocketAddr>) {
        let number = tunnel.number;
        if self.is_home_of(number) {
            self.watch(&udp, Source::Udp(number));
        }
        for address in &addresses {
            self.datapath.add_address(*address, number);
        }
        if let Some(Some(hub)) = self.hubs.get_mut(tunnel.hub).filter(|_| tunnel.protocol == Protocol::Ethernet) {
            hub.of = Some(number);
        }
        self.endpoints.insert(number, CarrierEndpoint { udp, addresses });
        self.datapath.tunnels.insert(number, tunnel);
        self.datapath.set_target(number);
    }

    fn remove_tunnel(&mut self, number: u16) {
        self.end_pacing(number);
        self.datapath.drop_held(number);
        if let Some(tunnel) = self.datapath.tunnels.remove(&number)
            && let Some(Some(hub)) = self.hubs.get_mut(tunnel.hub)
        {
            hub.of.take_if(|of| *of == number);
        }
        let addresses = self.endpoints.remove(&number).map(|endpoint| endpoint.addresses);
        for address in addresses.unwrap_or_default() {
            self.datapath.remove_address(&address);
        }
        self.datapath.set_target(number);
    }

    fn orphan(&mut self, number: u16) {
        self.end_pacing(number);
        self.change(number, |tunnel| tunnel.is_orphaned = true);
        // The key map has no keys any more; what is expanded here goes, too.
        self.refresh(number);
    }

    /// Looks at the present keys of a tunnel, also if no packet comes.
    fn refresh(&mut self, number: u16) {
        let now = self.datapath.now;
        self.change(number, |tunnel| tunnel.refresh(now));
    }

    fn count_losses(&mut self) {
        let of_all = losses::of_all_sockets();
        let tunnels = &self.datapath.tunnels;
        for tunnel in tunnels.values() {
            let losses = self.endpoints.get_mut(&tunnel.number).map(|endpoint| endpoint.udp.new_losses(&of_all));
            tunnel.counters.count_all(Verdict::RingFull, losses.unwrap_or_default());
        }
        for (slot, hub) in self.hubs.iter_mut().enumerate() {
            let losses = hub.iter_mut().flat_map(|hub| hub.device.ports()).map(XskPort::new_losses).sum();
            if let Some(first) = tunnels.values().find(|tunnel| tunnel.hub == slot) {
                first.counters.count_all(Verdict::RingFull, losses);
            }
        }
        let Some(first) = tunnels.values().next() else { return };
        let carriers = self.carriers.iter_mut().flatten().flat_map(XdpCarrier::ports);
        let lans = self.lans.iter_mut().flatten().flat_map(PrivateDevice::ports);
        let losses = carriers.chain(lans).map(XskPort::new_losses).sum();
        first.counters.count_all(Verdict::RingFull, losses);
    }

    /// Number of frames for the fill ring of each socket of a new device. Its sockets share one `part`th of the pool;
    /// with `others` devices of the same kind they get less, so that frames for sending remain.
    fn fill(&self, part: usize, others: usize, sockets: usize) -> u32 {
        (self.datapath.pool.total() / part / (others + 1) / sockets.max(1)) as u32
    }

    fn open_ports(&mut self, sockets: Vec<Socket>, source: Source, fill: u32) -> Vec<XskPort> {
        let mut ports = Vec::with_capacity(sockets.len());
        for socket in sockets {
            self.watch(&socket, source);
            ports.push(XskPort::new(socket, fill, &mut self.datapath.pool));
        }
        ports
    }

    fn close_ports(&mut self, ports: Vec<XskPort>) {
        for port in ports {
            let held = port.close(&mut self.datapath.pool);
            self.await_frames(held);
        }
    }

    /// Takes frames back when their driver has released them. No event reports this, so another thread waits.
    fn await_frames(&self, held: Option<Held>) {
        let Some(held) = held else { return };
        let (returns, crew, number) = (self.returns.clone(), self.crew.clone(), self.number);
        let wait = move || {
            let frames = held.wait();
            // Fails only if the worker has ended, which needs no frames.
            let _ = returns.send(frames);
            crew.rouse(number);
        };
        if let Err(error) = std::thread::Builder::new().name("cipe-release".into()).spawn(wait) {
            tracing::warn!("cannot start a thread to wait for a driver: {error}; the driver's frames are lost");
        }
    }

    fn watch(&self, fd: impl AsFd, source: Source) {
        let data = epoll::EventData::new_u64(source.token());
        if let Err(error) = epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN) {
            tracing::error!("epoll: {error}; a socket is not read");
        }
    }

    /// Reports to the control thread if single datagrams, or many sent ones, call for another door. `number`: the
    /// tunnel with the last of them.
    fn report_door_hint(&mut self, number: u16) {
        let report = match self.stats.hint(self.datapath.now) {
            Some(DoorHint::SingleFrames) => WorkerReport::SingleFrames,
            Some(DoorHint::ManySent) => WorkerReport::ManySent,
            None => return,
        };
        // If the queue is full, a later window reports it again.
        let _ = self.reports.try_send((number, report));
    }

    /// Reports an event to the control thread. Returns `false` if its queue is full.
    fn tell(&self, number: u16, event: Event) -> bool {
        self.reports.try_send((number, WorkerReport::Event(event))).is_ok()
    }
}
