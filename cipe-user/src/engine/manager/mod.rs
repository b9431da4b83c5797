//! The manager, the engine's control thread: connections, devices, maps and routes. Of the packets it handles only key exchange.
//!
//! This file is its event loop, which passes each event to the room whose job it is. A room is a struct with fields of its own; it gets
//! other rooms as arguments. [`attach`] and [`departure`] are the two flows through all rooms. Work that takes time is a job, whose end
//! is an event ([`jobs`]): a worker that hangs does not stop the requests of other tunnels.

mod attach;
mod carrier_routes;
mod carrier_socket;
mod carriers;
mod connections;
mod copying;
mod departure;
mod doors;
mod drops;
mod flood;
mod followers;
mod habit;
mod hubs;
mod jobs;
mod keys;
mod lan;
mod leads;
mod loops;
mod orphans;
mod platform;
mod poll;
mod replacement;
mod sealed;
mod shared;
mod shields;
mod sizes;
mod standby;
mod start;
mod status;
mod trial;
mod tunnel_devices;
mod tunnels;
mod workers;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::maps::Slot;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::datapath::ControlMessage;
use super::report::WorkerReport;
use super::watchdog::{MANAGER_LIMIT, Pulse, Watchdog, Watched};
use super::worker::Command;
use crate::control::launch::Readiness;
use crate::control::protocol::{Event, Protocol, Request, VERSION};
use crate::control::run_dir::RunDir;
use crate::control::server::Server;
use crate::control::watch;
use crate::kernel::confinement::Strictness;
use crate::kernel::hub::Waiting;
use crate::kernel::links::{LinkChange, LinkEvent};
use attach::Attaching;
use carrier_routes::CarrierRoutes;
use connections::{ConnectionEvent, Daemons, MAX_QUEUED_EVENTS};
use doors::Doors;
use drops::DropNotices;
use followers::HostChange;
use hubs::{Handover, Hubs};
use jobs::Outcome;
use keys::Keyring;
use lan::Lans;
use orphans::KeptDevices;
use replacement::Predecessor;
pub use replacement::Role;
use shared::Shared;
use shields::Shields;
use standby::Standby;
use start::Prepared;
use status::StatusSources;
use tunnel_devices::TunnelDevices;

/// How the engine is to run.
#[derive(Debug)]
pub struct EngineOptions {
    /// Go on when the last tunnel has gone.
    pub stay: bool,
    /// How many worker threads to start; `None`: as suits the cards and CPUs.
    pub workers: Option<usize>,
    /// The largest MTU of a tunnel, in octets.
    pub largest_mtu: u32,
    /// Where the control socket is.
    pub run_dir: RunDir,
    /// What it is to an engine that runs.
    pub role: Role,
    /// Is told when daemons can connect, or when this engine stands by.
    pub readiness: Readiness,
    /// What happens if the engine does what it should not.
    pub confinement: Strictness,
}

/// How long an engine without any tunnel waits for its first one.
const FIRST_TUNNEL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an engine that is asked to end waits for its daemons to end first.
const LAST_TUNNEL_TIMEOUT: Duration = Duration::from_secs(1);

/// Interval between two polls of what no event tells of.
const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Events of connections that may wait for the manager; the connections' tasks wait for room.
const MAX_QUEUED_CONNECTION_EVENTS: usize = 64;

struct Manager {
    stay: bool,
    /// The number of workers that was asked for.
    workers: Option<usize>,
    /// Another engine is ready to take its place.
    is_replaced: bool,
    shared: Shared,
    keys: Keyring,
    shields: Shields,
    hubs: Hubs,
    devices: TunnelDevices,
    routes: CarrierRoutes,
    doors: Doors,
    lans: Lans,
    drops: DropNotices,
    standby: Standby,
    /// The tunnel that waits for its hub to be opened: one at a time.
    attaching: Option<Attaching>,
    /// Devices of orphans that wait for their daemons.
    kept: KeptDevices,
    /// Devices that the engine before this one left, whose daemons have not attached here yet.
    waiting: Vec<Waiting>,
    /// How many departures are under way.
    departing: usize,
    /// Requests that wait for these: an attach may need the name or the port of a tunnel that departs.
    deferred: VecDeque<(u64, Request)>,
    /// Whether a daemon ever asked for a tunnel.
    was_asked: bool,
    /// Shows the watchdog that the control thread goes on.
    pulse: Arc<Pulse>,
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
    let standby = Standby::from_environment()?;
    let predecessor = Predecessor::find(&options.run_dir, options.role).await?;
    let mut server = match predecessor {
        Some(_) => None,
        None => Some(Server::bind(options.run_dir.clone())?),
    };
    let former = predecessor.as_ref();
    let stay = options.stay || former.is_some_and(|former| former.stay);
    let workers = options.workers.or(former.and_then(|former| former.workers));
    let largest_mtu = former.map_or(options.largest_mtu, |former| former.largest_mtu.max(options.largest_mtu));
    let prepared = start::prepare(workers, largest_mtu, (options.run_dir.path(), options.confinement)).await?;
    let mut readiness = Some(options.readiness);
    let (to_manager, mut connection_events) = mpsc::channel(MAX_QUEUED_CONNECTION_EVENTS);
    let Prepared { platform, keys, shields, salt, next_hops, mut followers, mut reports, mut ends } = prepared;
    let mut handover = Handover::default();
    if let Some(predecessor) = predecessor {
        match predecessor.succeed(options.run_dir, &platform, &mut followers, &mut readiness).await? {
            Some(succeeded) => (server, handover) = (Some(succeeded.0), succeeded.1),
            None => return Ok(()),
        }
    }
    let mut server = server.context("there is no control socket")?;
    let (hubs, waiting) = start::inherit(&platform.netlink, &handover.hubs()).await?;
    let hubs = Hubs::inherited(platform.clone(), (hubs, handover), salt);
    let (routes, mut next_hop_changes) = CarrierRoutes::new(next_hops);
    let mut manager = Manager {
        stay,
        workers,
        is_replaced: false,
        shared: Shared::new(platform.clone(), Daemons::new(to_manager)),
        keys: Keyring::new(keys, shields),
        shields: Shields::default(),
        hubs,
        devices: TunnelDevices::new(),
        routes,
        doors: Doors::new(platform.clone(), followers.policies()),
        lans: Lans::new(platform),
        drops: DropNotices::default(),
        standby,
        attaching: None,
        kept: KeptDevices::new(),
        waiting,
        departing: 0,
        deferred: VecDeque::new(),
        was_asked: false,
        pulse: Arc::default(),
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let started = Instant::now();
    let mut poll = tokio::time::interval(POLL_INTERVAL);
    // Set after a failed accept: the next one waits for a poll, or for a connection to go.
    let mut accept_later = false;
    let mut last_moment: Option<Instant> = None;
    let pulse = manager.pulse.clone();
    pulse.begin();
    let watchdog = match watch::is_allowed() {
        true => Some(Watchdog::start(manager.watched(&pulse))?),
        false => None,
    };
    if let Some(readiness) = readiness {
        readiness.up()?;
    }
    let ended = loop {
        pulse.beat();
        tokio::select! {
            connection = server.accept(), if !accept_later && !manager.is_ending() => match connection {
                Ok(connection) => manager.shared.daemons.add(connection),
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    accept_later = true;
                }
            },
            Some(first) = connection_events.recv() => {
                manager.connections_said(first, &mut connection_events).await;
            }
            Some((number, report)) = reports.recv() => manager.worker_reported(number, report).await,
            Some(worker) = ends.recv() => {
                break Err(anyhow::anyhow!("worker thread {worker} has ended; the system log says why"));
            }
            Some(change) = next_hop_changes.recv() => {
                let Manager { routes, shared, doors, lans, .. } = &mut manager;
                routes.changed(change, shared, doors, lans).await;
            }
            change = followers.next() => match change {
                Ok(change) => manager.host_changed(change).await,
                Err(error) => break Err(error),
            },
            picture = manager.lans.next_picture() => match picture {
                Ok(()) => manager.lans.renew(&manager.shared.tunnels, &manager.shared.daemons),
                Err(error) => break Err(error),
            },
            outcome = manager.shared.jobs.next() => match outcome {
                Ok(outcome) => manager.finish(outcome).await,
                Err(error) => break Err(error),
            },
            _ = terminate.recv() => {
                if last_moment.replace(Instant::now() + LAST_TUNNEL_TIMEOUT).is_some() { break Ok(()) }
            }
            _ = interrupt.recv() => {
                if last_moment.replace(Instant::now() + LAST_TUNNEL_TIMEOUT).is_some() { break Ok(()) }
            }
            _ = poll.tick() => {
                manager.poll(Instant::now()).await;
                accept_later = false;
            }
        }
        if manager.is_done(last_moment, started) {
            break Ok(());
        }
        if manager.is_replaced {
            // An orderly end would make the daemons wait; the kernel takes all back at once, as from an engine that was killed.
            tracing::info!("another engine takes the place of this one");
            server.leave();
            std::process::exit(0);
        }
    };
    if ended.is_ok() && manager.shared.tunnels.is_empty() {
        manager.shared.daemons.dismiss_successor().await;
    }
    // The workers end now.
    drop(watchdog);
    manager.close().await;
    ended
}

impl Manager {
    /// The threads that the watchdog watches.
    fn watched(&self, pulse: &Arc<Pulse>) -> Vec<Watched> {
        let manager = Watched::new("the control thread".to_owned(), pulse.clone(), MANAGER_LIMIT);
        self.shared.platform.workers.watched().chain([manager]).collect()
    }

    /// Whether the engine is to end now.
    fn is_done(&self, last_moment: Option<Instant>, started: Instant) -> bool {
        let has_tunnels = !self.shared.tunnels.is_empty();
        match last_moment {
            Some(last_moment) => (!has_tunnels && !self.is_busy()) || last_moment <= Instant::now(),
            None if self.is_ending() => !self.is_busy(),
            None if self.stay || has_tunnels || !self.shared.daemons.is_empty() => false,
            None => started.elapsed() > FIRST_TUNNEL_TIMEOUT,
        }
    }

    /// Whether the last tunnel has gone, or is about to: a daemon that connects now gets another engine.
    fn is_ending(&self) -> bool {
        self.was_asked && !self.stay && self.shared.tunnels.is_empty() && self.shared.daemons.is_empty()
    }

    /// Whether a tunnel waits for its hub, or tunnels are being removed: until then a new one cannot be attached.
    fn is_busy(&self) -> bool {
        self.attaching.is_some() || self.departing > 0
    }

    /// Polls what no event tells of.
    async fn poll(&mut self, now: Instant) {
        let Self { shared, keys, shields, drops, lans, doors, devices, hubs, standby, .. } = self;
        standby.poll(now, shared);
        hubs.poll(now).await;
        let used = |number| shared.tunnels.get(number).map_or(0, |tenant| tenant.counters.receive_key_used());
        keys.forget_previous(used, now);
        drops.poll(now, shared);
        shields.poll(now, shared, keys);
        sealed::poll(shared);
        lans.poll(now, shared).await;
        doors.poll(now, shared, lans).await;
        let ended = devices.poll(now, shared, hubs).await;
        self.detach_all(&ended);
        self.sweep();
    }

    /// Handles the result of a job.
    async fn finish(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Hub(opened) => self.hub_opened(opened).await,
            Outcome::Taken { number, connection, in_time } => self.taken(number, connection, in_time).await,
            Outcome::Departed(departure) => self.departed(departure).await,
            Outcome::Carrier(ended) => self.doors.finish(ended, &mut self.shared, &self.lans).await,
            Outcome::Lan(opened) => self.lans.opened(opened, &mut self.shared, &self.hubs, &self.doors).await,
            Outcome::Counted { connection, numbers } => {
                let Self { shared, keys, doors, lans, .. } = self;
                let sources = StatusSources { shared, keys, doors, lans };
                let all = numbers.into_iter().filter_map(|number| sources.of(number)).collect();
                self.shared.daemons.report(connection, all);
            }
        }
    }

    /// Handles a worker's report on a tunnel. Until the daemon is told that its tunnel is attached, reports wait.
    async fn worker_reported(&mut self, number: u16, report: WorkerReport) {
        let Self { shared, keys, shields, routes, doors, lans, .. } = self;
        if let Some(tenant) = shared.tunnels.get_mut(number).filter(|tenant| !tenant.is_open) {
            match tenant.early.len() < MAX_QUEUED_EVENTS {
                true => tenant.early.push(report),
                false => tracing::debug!("{}: too many reports before it is attached; one is lost", tenant.device.name),
            }
            return;
        }
        match report {
            WorkerReport::Event(event) => sealed::tell(number, event, shared),
            WorkerReport::NewPeer { peer, worker } => {
                shared.platform.workers.tell_others(worker, || Command::SetPeer(number, peer));
                routes.new_peer(number, peer, shared);
            }
            WorkerReport::SingleFrames => doors.saw_single_frames(number, shared, lans).await,
            WorkerReport::Flooded => shields.flooded(number, Instant::now(), shared, keys),
            WorkerReport::ManySent => doors.saw_many_sent(number, shared, lans).await,
        }
    }

    /// Handles a change of the host.
    async fn host_changed(&mut self, change: HostChange) {
        match change {
            HostChange::Link(event) => self.link_changed(&event).await,
            HostChange::Addresses(addresses) => {
                if let Err(error) = self.shared.platform.programs().set_local_addresses(&addresses) {
                    tracing::warn!("{error}; datagrams for some of this host's addresses go by UDP sockets");
                }
            }
            HostChange::Policies => self.doors.choose_all(&mut self.shared, &self.lans).await,
        }
    }

    async fn link_changed(&mut self, event: &LinkEvent) {
        let Self { shared, hubs, routes, doors, lans, .. } = self;
        lans.link_changed(event, shared, hubs, doors).await;
        let number = shared.tunnels.of_device(event.ifindex);
        match event.change {
            LinkChange::Down | LinkChange::Deleted => {
                let deleted = event.change == LinkChange::Deleted;
                // The visible end of an Ethernet tunnel's pair is its device.
                let ended = match (number, hubs.of_device(event.ifindex)) {
                    (Some(number), _) => Vec::from_iter(tunnel_devices::left(number, deleted, shared, hubs).await),
                    (None, Some(hub)) => tunnel_devices::hub_left((hub, event.ifindex), deleted, shared, hubs).await,
                    (None, None) => Vec::new(),
                };
                if deleted {
                    doors.device_gone(event.ifindex, shared);
                }
                self.detach_all(&ended);
            }
            LinkChange::Changed => {
                if let Some((number, mac)) = number.zip(event.mac) {
                    tunnel_devices::set_address(number, mac, shared, hubs);
                    tunnel_devices::set_mtu(number, event.mtu as usize, shared);
                }
            }
            LinkChange::Renamed => {
                tunnel_devices::renamed(event.ifindex, &event.name, shared);
                for (_, tenant) in shared.tunnels.iter_mut().filter(|(_, tenant)| tenant.zone() == Some(event.ifindex))
                {
                    tenant.name_zone();
                }
                routes.device_came(&event.name, event.ifindex, shared);
            }
            LinkChange::Added => routes.device_came(&event.name, event.ifindex, shared),
            LinkChange::Up => {}
        }
        self.shared.tunnels.forget_refusal(event.ifindex);
    }

    /// Handles the events of connections that are there now; the tunnels of those that have closed are removed together.
    async fn connections_said(&mut self, first: ConnectionEvent, others: &mut mpsc::Receiver<ConnectionEvent>) {
        // Not those that come meanwhile: the loop has other events, too.
        let mut events = vec![first];
        events.extend(std::iter::from_fn(|| others.try_recv().ok()));
        let mut going = Vec::new();
        for event in events {
            match event {
                ConnectionEvent::Closed(connection) => going.extend(self.closed(connection)),
                ConnectionEvent::Request(connection, request) => {
                    if matches!(request, Request::Attach(_)) {
                        self.detach_all(&std::mem::take(&mut going));
                    }
                    self.requested(connection, request).await;
                }
            }
        }
        self.detach_all(&going);
    }

    /// Carries out a request, or defers it: an attach while another tunnel waits for its hub or is being removed, and any request
    /// whose connection has one deferred, or waits for its hub itself.
    async fn requested(&mut self, connection: u64, request: Request) {
        let is_attaching = self.attaching.as_ref().is_some_and(|attaching| attaching.connection == connection);
        let is_behind = is_attaching || self.deferred.iter().any(|(other, _)| *other == connection);
        match is_behind || (self.is_busy() && matches!(request, Request::Attach(_))) {
            true => self.deferred.push_back((connection, request)),
            false => self.carry_out(connection, request).await,
        }
    }

    /// Carries out deferred requests, in order, until one is an attach that has to wait again.
    async fn carry_out_deferred(&mut self) {
        while !self.is_busy()
            && let Some((connection, request)) = self.deferred.pop_front()
        {
            self.carry_out(connection, request).await;
        }
    }

    async fn carry_out(&mut self, connection: u64, request: Request) {
        // The attaches of thousands of tunnels may be one event.
        self.pulse.beat();
        let number = self.shared.daemons.tunnel_of(connection);
        let Self { shared, keys, routes, hubs, standby, .. } = self;
        let workers = &shared.platform.workers;
        let failed = |message: String| _ = shared.daemons.send(connection, Event::Failed { message });
        match (request, number) {
            (Request::StandBy, _) if shared.daemons.has_successor() => {
                failed("another engine stands by already".into());
            }
            (Request::Replace | Request::StandBy, _) => {
                let largest_mtu = shared.platform.largest_mtu(Protocol::Ip) as u32;
                let (version, stay, workers) = (VERSION, self.stay, self.workers);
                shared.daemons.send(connection, Event::Replaceable { version, stay, largest_mtu, workers });
                shared.daemons.set_successor(connection);
                standby.came();
                shared.daemons.tell_successor(hubs.tell_of_all());
            }
            (Request::Leave, _) => self.is_replaced = true,
            // The connection's task has answered it.
            (Request::Beat, _) => {}
            (Request::Attach(attach), _) => {
                self.was_asked = true;
                // A device that is in the way of a name.
                let swept = attach.device.is_none() && self.sweep();
                if swept || self.make_way(connection, &attach) {
                    return self.deferred.push_front((connection, Request::Attach(attach)));
                }
                self.attach(connection, attach).await;
            }
            (Request::Status, _) => {
                let mut numbers = shared.tunnels.numbers(|_| true);
                numbers.sort_unstable();
                status::begin(connection, numbers, shared);
            }
            (Request::End { name }, _) => self.end_called(connection, &name),
            (_, None) => failed("no tunnel is attached; attach one first".into()),
            (Request::Detach, Some(_)) => shared.daemons.set_detaches(connection),
            (Request::OwnStatus, Some(number)) => status::begin(connection, vec![number], shared),
            (Request::SetSendKey { key }, Some(number)) => {
                keys.set(number, Slot::Send, &key);
                workers.tell_all(|_| Command::SendKeySet);
            }
            (Request::DropSendKey, Some(number)) => {
                keys.clear(number, Slot::Send);
                workers.tell_home(number, Command::SendKeyDropped(number));
            }
            (Request::SetSendLimits { packets, octets, paced, static_data }, Some(number)) => {
                workers.tell_all(|_| Command::SetSendLimits { number, packets, octets, paced, static_data });
            }
            (Request::SetPeer { peer }, Some(number)) => {
                workers.tell_all(|_| Command::SetPeer(number, peer));
                routes.new_peer(number, peer, shared);
            }
            (Request::SetRelay { relay }, Some(number)) => routes.set_relay(number, relay, shared),
            (Request::SetReceiveKey { key, keep_ms }, Some(number)) => {
                let used = shared.tunnels.get(number).map_or(0, |tenant| tenant.counters.receive_key_used());
                keys.set_receive_key(number, &key, Duration::from_millis(keep_ms), used);
            }
            (Request::SendClear { datagram, to }, Some(number)) => {
                workers.tell_home(number, Command::SendClear(number, to, datagram.to_vec()));
            }
            (Request::SendControl { payload, under, announces }, Some(number)) => {
                let message = ControlMessage { octets: payload, under, announces };
                workers.tell_home(number, Command::SendControl(number, message));
            }
            (Request::Sealed(request), Some(number)) => {
                if let Err(error) = sealed::requested(number, request, keys, shared) {
                    shared.daemons.send(connection, Event::Failed { message: format!("{error:#}") });
                }
            }
        }
    }
}
