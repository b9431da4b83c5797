//! A worker: one thread that moves packets between the private side and the carrier. It waits for sockets, receives, and sends;
//! what becomes of the packets is the [`Datapath`]'s, which it owns.
//!
//! The control thread speaks to it by [`Command`]s and hears of it by [`Reports`]; keys come through the key map. With other
//! workers it shares cipher work ([`Crew`]) and what is common to a tunnel.

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
use super::carrier::{Arrival, Inbox, Shows, Sight, UdpCarrier, XdpCarrier, losses};
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
use idle::Rest;
use pacing::Spaced;
use sched_policy::Patience;

/// Most frames that wait for packets in the fill ring of a hub: for as long as a worker may wait for its turn on a busy CPU.
const PRIVATE_FILL: u32 = 2048;

/// Most packets under a send key towards an original (protocol section 3): a limit above it is for a peer of our own kind.
const ORIGINAL_PACKETS: u64 = 32_767;

/// The control thread's hold on a worker.
pub(super) struct Handle {
    commands: Sender<Command>,
    crew: Arc<Crew>,
    number: usize,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// Hands a command over and wakes the worker.
    pub(super) fn send(&self, command: Command) {
        // A worker that is gone has nothing left to do for us; its end is reported by its thread.
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

/// Where a tunnel's datagrams enter and leave.
struct CarrierEndpoint {
    /// The socket that owns the carrier port: door of last resort, and where ICMP errors arrive.
    udp: UdpCarrier,
    /// The carrier addresses that are its own.
    addresses: Vec<SocketAddr>,
}

/// Epoll tokens: a kind in the upper half, an index in the lower.
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
    /// What waits for its time to leave, by tunnel.
    spaced: Vec<Spaced>,
    /// What comes to the UDP sockets waits there.
    sockets_held: bool,
    epoll: OwnedFd,
    commands: Receiver<Command>,
    reports: Reports,
    received: Vec<Packet>,
    outgoing: Vec<Outgoing>,
    arrivals: Vec<Arrival>,
    inbox: Inbox,
    sight: Sight,
    icmp: Icmp,
    /// Told of path MTUs that the kernel has learned.
    next_hops: NextHops,
    /// Frames that a driver has let go of some time after its socket was closed, and where they are told of.
    returned: Receiver<Vec<Frame>>,
    returns: Sender<Vec<Frame>>,
    /// Tunnels whose peers are asked whether groups of datagrams arrive.
    asking: Vec<u16>,
    /// Tunnels whose carrier paths are probed.
    probing: Vec<u16>,
    /// Bounds the ICMP errors whose IVs are looked for.
    error_budget: Bucket,
    /// Packets taken in or out in this waking.
    moved: usize,
    /// Longest time to stay awake for when there is nothing to do.
    busy_poll: Duration,
    /// Dropped with the worker.
    _alive: oneshot::Sender<()>,
}

/// Which worker, and where it runs.
pub(super) struct WorkerPlace {
    /// Its number, from 0 on.
    pub number: usize,
    /// All workers.
    pub crew: Arc<Crew>,
    /// The CPU that it is pinned to.
    pub cpu: Option<usize>,
    /// Dropped when the worker has ended, however that came.
    pub alive: oneshot::Sender<()>,
}

/// Starts a worker, with frames of its own in a UMEM that all share.
///
/// # Errors
/// If the kernel refuses an epoll or event descriptor, raw sockets, random octets or a thread.
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
        spaced: Vec::new(),
        sockets_held: false,
        epoll,
        commands,
        reports,
        received: Vec::with_capacity(BATCH),
        outgoing: Vec::with_capacity(BATCH),
        arrivals: Vec::with_capacity(BATCH),
        inbox: Inbox::new(),
        sight: Sight::new(Instant::now()),
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
        let mut rest = Rest::new();
        let mut patience = Patience::new(self.datapath.now);
        let mut sources: Vec<Source> = Vec::with_capacity(64);
        loop {
            // No event tells when the kernel takes more of what it refused; otherwise a look at the clock now and then.
            let longest = if self.flush() { Duration::from_secs(1) } else { Duration::from_millis(1) };
            let longest = longest.min(self.next_departure());
            sources.clear();
            self.crew.set_asleep(self.number, true);
            let woken = rest.wait(&self.epoll, longest).map(|tokens| sources.extend(tokens.map(Source::of)));
            self.crew.set_asleep(self.number, false);
            if let Err(error) = woken {
                tracing::error!("epoll: {error}; the worker ends");
                return;
            }
            if sources.contains(&Source::Wake) {
                if !self.obey() {
                    return;
                }
                rest.stay_awake(self.busy_poll);
                self.datapath.help();
            }
            self.depart_in_time();
            // Serve the ready sources until all are empty, but hear commands between the rounds.
            for _ in 0..16 {
                self.datapath.now = Instant::now();
                sources.retain(|source| self.serve(*source));
                self.flush();
                if sources.is_empty() {
                    break;
                }
            }
            self.tend_questions();
            self.tend_probes(self.datapath.now);
            patience.judge(self.datapath.now);
            rest.gather(std::mem::take(&mut self.moved));
        }
    }

    /// One batch from one source; whether there may be more.
    fn serve(&mut self, source: Source) -> bool {
        match source {
            Source::Wake => false,
            Source::Hub(slot) => self.outbound(slot),
            Source::Carrier(slot) => self.inbound_carrier(slot),
            Source::Udp(number) => self.inbound_udp(number),
            Source::Lan(slot) => self.outbound_lan(slot),
        }
    }

    /// Sends what waits in the ports; whether the kernel took all.
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

    /// Carries out what the control thread asked; `false` at the end.
    fn obey(&mut self) -> bool {
        self.datapath.now = Instant::now();
        let mut count = [0; 8];
        // An empty event descriptor only means that somebody read it before.
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
                let fill = self.fill(8, self.hubs.iter().flatten().count(), sockets.len()).clamp(256, PRIVATE_FILL);
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
                    (self.datapath.pool.total() as u32 / 8 / sockets.len().max(1) as u32).clamp(64, PRIVATE_FILL);
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
            Command::SetSendLimits(number, packets, octets, paced) => {
                self.change(number, |tunnel| {
                    tunnel.is_ours = packets > ORIGINAL_PACKETS;
                    (tunnel.limits.send_packets, tunnel.limits.send_octets) = (packets, octets);
                    tunnel.paced = paced;
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
            Command::Stop => {}
        }
    }

    /// Changes a tunnel, if it is still there.
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

    /// Frames for the fill ring of each of some sockets of a new device: together a part of all, and the less the more `others` of
    /// its kind have theirs, so that many devices leave some to send with.
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

    /// Has frames come back when their driver has let go of them, which nothing tells of: another thread asks.
    fn await_frames(&self, held: Option<Held>) {
        let Some(held) = held else { return };
        let (returns, crew, number) = (self.returns.clone(), self.crew.clone(), self.number);
        let wait = move || {
            let frames = held.wait();
            // A worker that has ended needs none.
            let _ = returns.send(frames);
            crew.rouse(number);
        };
        if let Err(error) = std::thread::Builder::new().name("cipe-release".into()).spawn(wait) {
            tracing::warn!("no thread to wait for a driver: {error}; the frames that it has are lost");
        }
    }

    fn watch(&self, fd: impl AsFd, source: Source) {
        let data = epoll::EventData::new_u64(source.token());
        if let Err(error) = epoll::add(&self.epoll, fd, data, epoll::EventFlags::IN) {
            tracing::error!("epoll: {error}; a socket goes unheard");
        }
    }

    /// Tells the control thread if most datagrams go through sockets alone, the last of them through a tunnel's.
    fn tell_of_single_frames(&mut self, number: u16) {
        let report = match self.sight.shows(self.datapath.now) {
            Some(Shows::SingleFrames) => WorkerReport::SingleFrames,
            Some(Shows::ManySent) => WorkerReport::ManySent,
            None => return,
        };
        // If the queue is full, a later look says it again.
        let _ = self.reports.try_send((number, report));
    }

    /// Tells the control thread; `false` if its queue is full.
    fn tell(&self, number: u16, event: Event) -> bool {
        self.reports.try_send((number, WorkerReport::Event(event))).is_ok()
    }
}
