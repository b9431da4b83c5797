//! The control thread: connections, devices, maps and routes. No packet passes through it but key exchange.

mod attach;
mod carriers;
mod connections;
mod copying;
mod habit;
mod hubs;
mod keys;
mod lan;
mod loops;
mod moved;
mod rivals;
mod sizes;
mod status;
mod trial;
mod ways;
mod workers;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::maps::{CHUNK, Slot, Tunnel as TunnelEntry};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::carrier::UdpCarrier;
use super::datapath::Message;
use super::random::Random;
use super::report::Report;
use super::worker::Command;
use super::{frames, locked};
use crate::control::launch::Readiness;
use crate::control::protocol::{Carrier, Cipher, Event, Protocol, Request};
use crate::control::run_dir::RunDir;
use crate::control::server::Server;
use crate::engine::tunnel::counters::Tally;
use crate::kernel::bpf::{LoadOptions, Programs, XdpPreference, remove_leftovers};
use crate::kernel::device::Device;
use crate::kernel::features::{self, Feature};
use crate::kernel::hub::Inheritance;
use crate::kernel::keys::KeyWriter;
use crate::kernel::known_bad;
use crate::kernel::links::{LinkChange, LinkEvent};
use crate::kernel::netlink::Netlink;
use crate::kernel::nexthop::{NextHop, NextHops, State, Timing};
use crate::kernel::policies::{self, Policies};
use crate::kernel::zone;
use crate::xsk::{Umem, UmemConfig};
use carriers::Carriers;
use connections::{Daemon, EVENTS, Said, converse};
use hubs::Hubs;
use keys::Previous;
use lan::Lans;
use loops::{Leads, Loops};
use rivals::Rivals;
use sizes::Sizes;
use workers::Workers;

/// How the engine was asked to run.
#[derive(Debug)]
pub struct EngineOptions {
    /// Stay when the last tunnel has gone.
    pub stay: bool,
    /// How many worker threads to start; `None`: as suits the cards and CPUs.
    pub workers: Option<usize>,
    /// The largest MTU of a tunnel, in octets.
    pub largest_mtu: u32,
    /// Where the control socket is.
    pub run_dir: RunDir,
    /// To be told when daemons can connect.
    pub readiness: Readiness,
}

/// Octets of UMEM that a worker needs, and that the engine has at least; memory is used as its frames are.
const UMEM_OF_WORKER: u32 = 32 << 20;
const UMEM: u32 = 64 << 20;

/// How long an engine without any tunnel waits for its first one.
const FIRST_TUNNEL: Duration = Duration::from_secs(10);

/// How long an engine that is to end waits for its daemons to end first.
const LAST_TUNNEL: Duration = Duration::from_secs(1);

/// How often the manager looks at the clock.
const LOOK: Duration = Duration::from_millis(500);

/// One tunnel as the control thread sees it.
struct Tenant {
    connection: u64,
    /// Slot of the hub that its device stands on.
    hub: usize,
    device: Device,
    cipher: Cipher,
    protocol: Protocol,
    carrier_door: Carrier,
    xdp_mode: XdpPreference,
    /// As the peer sees it.
    me: SocketAddr,
    /// As bound: the same, or any address of this host.
    listens: SocketAddr,
    peer: Option<SocketAddr>,
    /// The peer is reached through a SOCKS5 server.
    socks: Option<Socks>,
    counters: Tally,
    sizes: Sizes,
    /// LAN card that it wants a short cut with, by name.
    lan: Option<String>,
    /// How long the worker may stay awake for it.
    busy_poll: Duration,
    /// Next hop to the peer, as it was last known.
    hop: Option<NextHop>,
    /// Carrier device that AF_XDP sockets are open on for it, by ifindex.
    carrier: Option<u32>,
    /// Carrier device that could not be opened for it, until something changes about that.
    refused: Option<u32>,
    /// Mark of its datagrams; 0: none.
    mark: u32,
    /// Next hop to the peer as the kernel tells it, also where that is none to use.
    looked_up: Option<NextHop>,
    /// Where that leads.
    leads: Leads,
    /// Its datagrams that came into the tunnel itself.
    loops: Loops,
    /// Its packets that came back to it through other tunnels.
    rounds: Loops,
    /// The receive key before the present one, while it is kept.
    previous: Option<Previous>,
    notes: Vec<String>,
    /// Datagrams of impossible lengths that were told of: by the programs, by the worker.
    bogus: (u64, u64),
    /// What the way out is, where it is not by AF_XDP.
    door: Option<String>,
    /// Device that its UDP socket is bound to, by name.
    carrier_device: Option<String>,
    /// That socket.
    carrier_socket: UdpCarrier,
    /// Name of the device that its link-local carrier addresses belong to, if it has such.
    zone_name: Option<String>,
    /// Forwards news of the way to the peer.
    follower: Option<tokio::task::AbortHandle>,
}

/// The SOCKS5 server of a tunnel, whose TCP connection is the daemon's.
#[derive(Clone, Copy, Debug)]
struct Socks {
    server: SocketAddr,
    /// Where it relays datagrams, while it does.
    relay: Option<SocketAddr>,
}

impl Tenant {
    /// Where datagrams are sent.
    fn target(&self) -> Option<SocketAddr> {
        self.socks.map_or(self.peer, |socks| socks.relay)
    }

    /// What the programs must know of it.
    fn entry(&self) -> TunnelEntry {
        // A link-local address of another device may be there inside, too.
        let may_go_round = |target: &SocketAddr| zone::of(*target).is_none_or(|zone| zone == self.device.index);
        self.sizes.entry(self.hub, self.device.mac, self.target().filter(may_go_round))
    }

    /// Index of the device that its link-local carrier addresses belong to.
    fn zone(&self) -> Option<u32> {
        zone::of(self.listens).or(self.target().and_then(zone::of))
    }

    /// Notes what that device is called.
    fn name_zone(&mut self) {
        self.zone_name = self.zone().map(zone::name);
    }
}

struct Manager {
    stay: bool,
    programs: Programs,
    keys: KeyWriter,
    netlink: Netlink,
    next_hops: NextHops,
    umem: Umem,
    /// Live frames can be sent from that memory.
    sends_live: bool,
    /// What the kernel lacks.
    lacks: Vec<Feature>,
    workers: Workers,
    carriers: Carriers,
    lans: Lans,
    hubs: Hubs,
    tenants: HashMap<u16, Tenant>,
    /// Tunnels by the ifindex of their devices.
    devices: HashMap<u32, u16>,
    /// Tunnels with a previous receive key.
    aging: BTreeSet<u16>,
    /// Carrier devices that were refused to some tunnel.
    refused: BTreeSet<u32>,
    /// What of those was refused for another program.
    rivals: Rivals,
    /// What AF_XDP would pass by.
    policies: watch::Receiver<Policies>,
    /// Part of the devices' addresses that no engine before had.
    salt: [u8; 3],
    connections: HashMap<u64, Daemon>,
    /// Where the connections' tasks speak to it.
    say: mpsc::Sender<Said>,
    /// Where followers tell of new ways.
    ways: mpsc::Sender<News>,
    /// Number of the last tunnel made.
    last_number: u16,
    /// Whether a daemon ever asked for a tunnel.
    was_asked: bool,
    /// What the workers were told last.
    busy_poll: Duration,
    /// Which part of very many tunnels is looked at next.
    turn: usize,
    /// When devices in other network namespaces are looked for next.
    next_look: Instant,
}

/// The way to a tunnel's peer has changed.
struct News {
    tunnel: u16,
    /// The peer that was followed; the tunnel may have another by now.
    peer: SocketAddr,
    state: State,
}

/// Runs the engine until its last tunnel has gone, or SIGTERM or SIGINT; a second one of these ends it at once.
///
/// Devices of daemons that live on stay when the engine ends before them, and drop all traffic, until the next engine
/// takes them over: without them, the routes would go and traffic would leave in clear.
///
/// # Errors
/// One line that says what was refused, where, and how to go on: no root, no AF_XDP, another engine, no memory.
pub fn run(options: EngineOptions) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(options))
}

async fn serve(options: EngineOptions) -> anyhow::Result<()> {
    let server = Server::bind(options.run_dir)?;
    let netlink = Netlink::new()?;
    raise_descriptor_limit();
    let Inheritance { swept, hubs } = netlink.inherit().await?;
    for name in swept {
        tracing::info!("{name}: left by an engine that died; removed");
    }
    let count = match options.workers {
        Some(count) => count,
        None => workers::suitable_count(netlink.most_receive_queues(&hubs).await?),
    };
    let lacks = features::missing();
    for lack in &lacks {
        tracing::info!("this kernel lacks {lack}");
    }
    for fault in known_bad::of_running() {
        tracing::warn!("{fault}");
    }
    let debug = tracing::enabled!(tracing::Level::DEBUG);
    let frame_size = frames::frame_size(options.largest_mtu);
    let frames = UMEM.max(count as u32 * UMEM_OF_WORKER) / frame_size;
    let (wanted, limit) = (frames, locked::limit());
    let frames = locked::frames(wanted, frame_size, limit);
    if frames < wanted {
        tracing::warn!(
            "locked memory is limited to {} KiB, which is room for {frames} frames of {wanted}: bursts may be lost; grant \
             CAP_IPC_LOCK, or raise RLIMIT_MEMLOCK (LimitMEMLOCK= of the service)",
            limit.unwrap_or_default() >> 10
        );
    }
    let umem = UmemConfig { frames, frame_size, ..UmemConfig::default() };
    // Live frames are sent from the memory of a map; larger ones than its values are not.
    let sends_live = frame_size as usize == CHUNK;
    let chunks = if sends_live { frames } else { 1 };
    // What does not fit into one descriptor goes the kernel's way.
    let largest_frame =
        if lacks.contains(&Feature::MultiBuffer) { frames::largest_received(frame_size) } else { u32::MAX };
    let load = LoadOptions { debug, workers: count as u32, chunks, largest_frame, ..LoadOptions::default() };
    let mut programs = Programs::load(&load)?;
    for hub in &hubs {
        remove_leftovers(hub.index);
    }
    if let Some(logs) = programs.logs() {
        tokio::spawn(async {
            let error = logs.await;
            tracing::warn!("the eBPF programs' log: {error}; what they say is lost from now on");
        });
    }
    let keys = programs.take_keys().context("the key map has another writer")?;
    let (umem, pool) = if sends_live { Umem::over(programs.chunks(), umem)? } else { Umem::new(umem)? };
    let (to_manager, mut reports) = mpsc::channel(1024);
    let next_hops = NextHops::new(&netlink, Timing::default()).await?;
    let (workers, mut ends) = Workers::start(count, &umem, pool, &to_manager, &next_hops)?;
    let mut links = netlink.watch_links().await?;
    let mut addresses = netlink.watch_addresses().await?;
    programs.set_local_addresses(&addresses.borrow_and_update())?;
    let policies = policies::follow(&netlink).await?;
    let mut new_policies = policies.clone();
    let (say, mut said) = mpsc::channel(64);
    let (ways, mut new_ways) = mpsc::channel(256);
    let (pictures, mut new_pictures) = mpsc::channel(1);
    let mut manager = Manager {
        stay: options.stay,
        programs,
        keys,
        netlink,
        next_hops,
        umem,
        sends_live,
        lacks,
        workers,
        carriers: Carriers::default(),
        lans: Lans::new(pictures),
        hubs: Hubs::inherited(hubs),
        tenants: HashMap::new(),
        devices: HashMap::new(),
        aging: BTreeSet::new(),
        refused: BTreeSet::new(),
        rivals: Rivals::default(),
        policies,
        salt: Random::new()?.octets(),
        connections: HashMap::new(),
        say,
        ways,
        last_number: u16::MAX,
        was_asked: false,
        busy_poll: Duration::ZERO,
        turn: 0,
        next_look: Instant::now(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut connections = 0;
    let started = Instant::now();
    let mut look = tokio::time::interval(LOOK);
    // Set after a failed accept: the next one waits for a look at the clock, or for a connection to go.
    let mut accept_later = false;
    let mut last_moment: Option<Instant> = None;
    options.readiness.up()?;
    let ended = loop {
        tokio::select! {
            connection = server.accept(), if !accept_later => match connection {
                Ok(connection) => {
                    connections += 1;
                    let (sender, events) = mpsc::channel(EVENTS);
                    let pid = connection.peer().map_or(0, |peer| peer.pid.unsigned_abs());
                    manager.connections.insert(connections, Daemon { pid, tunnel: None, events: sender });
                    tokio::spawn(converse(connections, connection, events, manager.say.clone()));
                }
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    accept_later = true;
                }
            },
            Some(first) = said.recv() => manager.hear_all(first, &mut said).await,
            Some((number, report)) = reports.recv() => match report {
                Report::Event(event) => manager.tell(number, event),
                Report::NewPeer { peer, worker } => {
                    manager.workers.tell_others(worker, || Command::SetPeer(number, peer));
                    manager.new_peer(number, peer);
                }
                Report::SingleFrames => manager.saw_single_frames(number).await,
                Report::ManySent => manager.saw_many_sent(number).await,
            },
            Some(worker) = ends.recv() => {
                break Err(anyhow::anyhow!("worker thread {worker} has ended; the system log says why"));
            }
            Some(news) = new_ways.recv() => manager.take_in(news).await,
            event = links.recv() => match event {
                Some(event) => manager.link_changed(&event).await,
                None => break Err(anyhow::anyhow!("network devices cannot be followed any longer; the system log says why")),
            },
            changed = addresses.changed() => match changed {
                Ok(()) => manager.set_local_addresses(&addresses.borrow_and_update()),
                Err(_) => break Err(anyhow::anyhow!("addresses cannot be followed any longer; the system log says why")),
            },
            changed = new_policies.changed() => match changed {
                Ok(()) => manager.choose_all_doors().await,
                Err(_) => break Err(anyhow::anyhow!("IPsec policies cannot be followed any longer; the system log says why")),
            },
            Some(picture) = new_pictures.recv() => manager.take_picture(picture),
            _ = terminate.recv() => if last_moment.replace(Instant::now() + LAST_TUNNEL).is_some() { break Ok(()) },
            _ = interrupt.recv() => if last_moment.replace(Instant::now() + LAST_TUNNEL).is_some() { break Ok(()) },
            _ = look.tick() => {
                manager.forget_previous_keys(Instant::now());
                manager.tell_of_drops(Instant::now());
                manager.tend_lans(Instant::now()).await;
                manager.tend_rivals(Instant::now()).await;
                manager.tend_carriers(Instant::now()).await;
                manager.tend_zero_copy(Instant::now()).await;
                manager.tend_moved(Instant::now()).await;
                accept_later = false;
            }
        }
        if manager.is_done(last_moment, started) {
            break Ok(());
        }
    };
    manager.close().await;
    ended
}

impl Manager {
    /// Whether nothing is left to do.
    fn is_done(&self, last_moment: Option<Instant>, started: Instant) -> bool {
        match last_moment {
            Some(last_moment) => self.tenants.is_empty() || last_moment <= Instant::now(),
            None if self.stay || !self.tenants.is_empty() || !self.connections.is_empty() => false,
            None => self.was_asked || started.elapsed() > FIRST_TUNNEL,
        }
    }

    /// Hears what the connections say, and removes the tunnels of those that have closed together.
    async fn hear_all(&mut self, first: Said, others: &mut mpsc::Receiver<Said>) {
        // What waits now, and no more: others want their turn too.
        let mut waiting = vec![first];
        waiting.extend(std::iter::from_fn(|| others.try_recv().ok()));
        let mut going = Vec::new();
        for said in waiting {
            match said {
                Said::Closed(connection) => {
                    going.extend(self.connections.remove(&connection).and_then(|daemon| daemon.tunnel));
                }
                Said::Counted(connection, numbers) => self.tell_counted(connection, numbers),
                Said::Request(connection, request) => {
                    // Whoever attaches may want the name or the port of one that has gone.
                    if matches!(request, Request::Attach(_)) {
                        self.detach_all(&std::mem::take(&mut going)).await;
                    }
                    self.carry_out(connection, request).await;
                }
            }
        }
        self.detach_all(&going).await;
    }

    async fn carry_out(&mut self, connection: u64, request: Request) {
        let number = self.tunnel_of(connection);
        match (request, number) {
            (Request::Attach(attach), _) => {
                self.was_asked = true;
                let event = match self.attach(connection, &attach).await {
                    Ok(number) => self.attached(number),
                    Err(error) => Event::Failed { message: format!("{error:#}") },
                };
                self.say(connection, event);
            }
            (Request::Status, _) => self.tell_status(connection),
            (_, None) => {
                self.say(connection, Event::Failed { message: "no tunnel is attached; attach one first".into() });
            }
            (Request::OwnStatus, Some(number)) => self.tell_status_of(connection, vec![number]),
            (Request::SetSendKey { key }, Some(number)) => self.keys.set(number.into(), Slot::Send, &key.0),
            (Request::DropSendKey, Some(number)) => {
                self.keys.clear(number.into(), Slot::Send);
                self.workers.tell_home(number, Command::SendKeyDropped(number));
            }
            (Request::SetSendLimits { packets, octets, paced }, Some(number)) => {
                self.workers.tell_all(|_| Command::SetSendLimits(number, packets, octets, paced));
            }
            (Request::SetPeer { peer }, Some(number)) => {
                self.workers.tell_all(|_| Command::SetPeer(number, peer));
                self.new_peer(number, peer);
            }
            (Request::SetRelay { relay }, Some(number)) => self.set_relay(number, relay),
            (Request::SetReceiveKey { key, keep_ms }, Some(number)) => {
                self.set_receive_key(number, &key.0, Duration::from_millis(keep_ms));
            }
            (Request::SendClear { datagram, to }, Some(number)) => match hex::decode(&datagram) {
                Ok(datagram) => self.workers.tell_home(number, Command::SendClear(number, to, datagram)),
                Err(error) => {
                    self.say(connection, Event::Failed { message: format!("datagram: {error}; send hexadecimal") });
                }
            },
            (Request::SendControl { payload, under, announces }, Some(number)) => match hex::decode(&payload) {
                Ok(message) => {
                    self.workers
                        .tell_home(number, Command::SendControl(number, Message { octets: message, under, announces }));
                }
                Err(error) => {
                    self.say(connection, Event::Failed { message: format!("payload: {error}; send hexadecimal") });
                }
            },
        }
    }

    fn tunnel_of(&self, connection: u64) -> Option<u16> {
        self.connections.get(&connection)?.tunnel
    }

    fn attached(&self, number: u16) -> Event {
        match self.tenants.get(&number) {
            Some(tenant) => {
                let mut notes = tenant.notes.clone();
                notes.extend(self.carrier_note(tenant));
                Event::Attached { device: tenant.device.name.clone(), me: tenant.me, notes }
            }
            None => Event::Failed { message: "the tunnel went while it was made".into() },
        }
    }

    /// Says something to a daemon. One that does not listen loses it; what matters comes again.
    fn say(&self, connection: u64, event: Event) {
        if let Some(daemon) = self.connections.get(&connection)
            && daemon.events.try_send(event).is_err()
        {
            tracing::debug!("control connection {connection} does not listen");
        }
    }

    /// Says something to the daemon of a tunnel.
    fn tell(&self, number: u16, event: Event) {
        if let Some(connection) = self.tenants.get(&number).map(|tenant| tenant.connection) {
            self.say(connection, event);
        }
    }

    fn set_local_addresses(&mut self, addresses: &HashSet<IpAddr>) {
        if let Err(error) = self.programs.set_local_addresses(addresses) {
            tracing::warn!("{error}; datagrams for some of this host's addresses go by UDP sockets");
        }
    }

    /// Takes up that a tunnel has another peer, and tells its daemon.
    fn new_peer(&mut self, number: u16, peer: SocketAddr) {
        self.follow(number, peer);
        self.tell(number, Event::NewPeer { peer });
    }

    async fn link_changed(&mut self, event: &LinkEvent) {
        self.lan_changed(event).await;
        match event.change {
            LinkChange::Down | LinkChange::Deleted => {
                let deleted = event.change == LinkChange::Deleted;
                // The visible end of an Ethernet tunnel's pair is its device.
                let tunnels = match (self.devices.get(&event.ifindex), self.hubs.of_device(event.ifindex)) {
                    (Some(number), _) => vec![*number],
                    (None, Some(hub)) => self.lose_hub(hub, deleted),
                    (None, None) => Vec::new(),
                };
                for number in tunnels {
                    self.device_left(number, deleted).await;
                }
                if deleted {
                    self.close_carrier(event.ifindex).await;
                }
            }
            LinkChange::Changed => {
                if let Some((number, mac)) = self.devices.get(&event.ifindex).copied().zip(event.mac) {
                    self.set_private_address(number, mac);
                    self.set_device_mtu(number, event.mtu as usize);
                }
            }
            LinkChange::Renamed => {
                self.renamed(event.ifindex, &event.name);
                self.tenants
                    .values_mut()
                    .filter(|tenant| tenant.zone() == Some(event.ifindex))
                    .for_each(Tenant::name_zone);
                self.carrier_device_came(&event.name, event.ifindex);
            }
            LinkChange::Added => self.carrier_device_came(&event.name, event.ifindex),
            LinkChange::Up => {}
        }
        if self.refused.remove(&event.ifindex) {
            for tenant in self.tenants.values_mut() {
                tenant.refused.take_if(|refused| *refused == event.ifindex);
            }
        }
    }

    /// Ends all tunnels. Their daemons live on, or they would have gone before, and so do their devices.
    async fn close(mut self) {
        for number in self.tenants.keys().copied().collect::<Vec<_>>() {
            if let Some(tenant) = self.disconnect(number).await {
                tracing::info!("{}: drops all traffic until another engine takes it over", tenant.device.name);
            }
        }
    }
}

/// A tunnel takes two descriptors: its UDP socket, and its daemon's connection.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("RLIMIT_NOFILE stays as it is: {error}");
    }
}

#[cfg(test)]
mod tests;
