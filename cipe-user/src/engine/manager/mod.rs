//! The control thread: connections, devices, maps and routes. No packet passes through it but key exchange.
//!
//! It is an event loop over rooms, each a struct of its own. Work that takes time is a job, whose end is an event ([`jobs`]):
//! a worker that hangs does not stop the commands of other tunnels.

mod attach;
mod carriers;
mod connections;
mod copying;
mod departure;
mod doors;
mod followers;
mod habit;
mod hubs;
mod jobs;
mod keys;
mod lan;
mod leads;
mod loops;
mod moved;
mod platform;
mod rivals;
mod sizes;
mod start;
mod status;
mod trial;
mod tunnels;
mod ways;
mod workers;

use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cipe_common::maps::Slot;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use super::datapath::ControlMessage;
use super::report::WorkerReport;
use super::worker::Command;
use crate::control::launch::Readiness;
use crate::control::protocol::{Event, Request};
use crate::control::run_dir::RunDir;
use crate::control::server::Server;
use crate::kernel::links::{LinkChange, LinkEvent};
use crate::kernel::policies::Policies;
use carriers::Carriers;
use connections::{Daemons, EVENTS, Said};
use departure::Departure;
use followers::HostChange;
use hubs::Hubs;
use jobs::Jobs;
use keys::Keyring;
use lan::Lans;
use moved::Moved;
use platform::Platform;
use rivals::Rivals;
use start::Started;
use tunnels::Tunnels;
use ways::Ways;

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

/// How long an engine without any tunnel waits for its first one.
const FIRST_TUNNEL: Duration = Duration::from_secs(10);

/// How long an engine that is to end waits for its daemons to end first.
const LAST_TUNNEL: Duration = Duration::from_secs(1);

/// How often the manager looks at the clock.
const LOOK: Duration = Duration::from_millis(500);

/// How a job of the manager has ended.
enum Outcome {
    /// The workers have taken the tunnel that this connection attaches, or not in time.
    Taken { number: u16, connection: u64, in_time: bool },
    /// What went with some tunnels is taken down.
    Departed(Departure),
    /// A carrier device has passed between the UDP sockets and AF_XDP, or not.
    Carrier(carriers::Ended),
    /// A LAN card has a short cut, or does not get one.
    Lan(lan::Opened),
    /// The losses of these tunnels are counted, for the status that this connection asked for.
    Counted { connection: u64, numbers: Vec<u16> },
}

impl From<carriers::Ended> for Outcome {
    fn from(ended: carriers::Ended) -> Self {
        Self::Carrier(ended)
    }
}

impl From<lan::Opened> for Outcome {
    fn from(opened: lan::Opened) -> Self {
        Self::Lan(opened)
    }
}

struct Manager {
    stay: bool,
    platform: Arc<Platform>,
    jobs: Jobs<Outcome>,
    keys: Keyring,
    carriers: Carriers,
    lans: Lans,
    hubs: Hubs,
    tunnels: Tunnels,
    daemons: Daemons,
    ways: Ways,
    /// XDP programs of others on carrier devices.
    rivals: Rivals,
    /// What AF_XDP would pass by.
    policies: watch::Receiver<Policies>,
    /// Tunnel devices in other network namespaces.
    moved: Moved,
    /// How many departures are under way.
    departing: usize,
    /// Requests that wait for them: whoever attaches may want the name or the port of one that goes.
    waiting: VecDeque<(u64, Request)>,
    /// Whether a daemon ever asked for a tunnel.
    was_asked: bool,
    /// What the workers were told last.
    busy_poll: Duration,
    /// Which part of very many tunnels is looked at next.
    turn: usize,
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
    let (say, mut said) = mpsc::channel(64);
    let (ways, mut new_ways) = mpsc::channel(256);
    let Started { platform, keys, hubs, salt, next_hops, mut followers, mut reports, mut ends } =
        start::start(options.workers, options.largest_mtu).await?;
    let mut manager = Manager {
        stay: options.stay,
        jobs: Jobs::new(),
        keys: Keyring::new(keys),
        carriers: Carriers::new(platform.clone()),
        lans: Lans::new(platform.clone()),
        hubs: Hubs::inherited(platform.clone(), hubs, salt),
        tunnels: Tunnels::default(),
        daemons: Daemons::new(say),
        ways: Ways::new(next_hops, ways),
        rivals: Rivals::new(platform.clone()),
        policies: followers.policies(),
        moved: Moved::default(),
        departing: 0,
        waiting: VecDeque::new(),
        was_asked: false,
        busy_poll: Duration::ZERO,
        turn: 0,
        platform,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let started = Instant::now();
    let mut look = tokio::time::interval(LOOK);
    // Set after a failed accept: the next one waits for a look at the clock, or for a connection to go.
    let mut accept_later = false;
    let mut last_moment: Option<Instant> = None;
    options.readiness.up()?;
    let ended = loop {
        tokio::select! {
            connection = server.accept(), if !accept_later && !manager.is_ending() => match connection {
                Ok(connection) => manager.daemons.enter(connection),
                Err(error) => {
                    tracing::warn!("control socket: {error}");
                    accept_later = true;
                }
            },
            Some(first) = said.recv() => manager.hear_all(first, &mut said).await,
            Some((number, report)) = reports.recv() => manager.hear_worker(number, report).await,
            Some(worker) = ends.recv() => {
                break Err(anyhow::anyhow!("worker thread {worker} has ended; the system log says why"));
            }
            Some(news) = new_ways.recv() => manager.take_in(news).await,
            change = followers.next() => match change {
                Ok(change) => manager.take_up(change).await,
                Err(error) => break Err(error),
            },
            picture = manager.lans.next_picture() => match picture {
                Ok(()) => manager.renew_lans(),
                Err(error) => break Err(error),
            },
            outcome = manager.jobs.next() => match outcome {
                Ok(outcome) => manager.finish(outcome).await,
                Err(error) => break Err(error),
            },
            _ = terminate.recv() => if last_moment.replace(Instant::now() + LAST_TUNNEL).is_some() { break Ok(()) },
            _ = interrupt.recv() => if last_moment.replace(Instant::now() + LAST_TUNNEL).is_some() { break Ok(()) },
            _ = look.tick() => {
                manager.tend(Instant::now()).await;
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
            Some(last_moment) => (self.tunnels.is_empty() && self.departing == 0) || last_moment <= Instant::now(),
            None if self.is_ending() => self.departing == 0,
            None if self.stay || !self.tunnels.is_empty() || !self.daemons.is_empty() => false,
            None => started.elapsed() > FIRST_TUNNEL,
        }
    }

    /// Whether the last tunnel has gone, or is about to: who comes now gets another engine.
    fn is_ending(&self) -> bool {
        self.was_asked && !self.stay && self.tunnels.is_empty() && self.daemons.is_empty()
    }

    /// Looks at what nothing tells of.
    async fn tend(&mut self, now: Instant) {
        let tunnels = &self.tunnels;
        let used = |number| tunnels.get(number).map_or(0, |tenant| tenant.counters.receive_key_used());
        self.keys.forget_previous(used, now);
        self.tell_of_drops(now);
        self.tend_lans(now).await;
        self.tend_rivals(now).await;
        self.tend_carriers(now).await;
        self.tend_zero_copy(now);
        self.tend_moved(now).await;
    }

    /// Takes up how a job has ended.
    async fn finish(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Taken { number, connection, in_time } => self.taken(number, connection, in_time).await,
            Outcome::Departed(departure) => self.departed(departure).await,
            Outcome::Carrier(carriers::Ended::Opened { ifindex, asker, unlikely, carrier }) => {
                self.carrier_opened(ifindex, asker, unlikely, carrier).await;
            }
            Outcome::Carrier(carriers::Ended::Closed { ifindex }) => self.carrier_closed(ifindex).await,
            Outcome::Lan(lan::Opened { ifindex, asker, lan }) => self.lan_opened(ifindex, asker, lan).await,
            Outcome::Counted { connection, numbers } => self.tell_counted(connection, numbers),
        }
    }

    /// Takes up what a worker reports of a tunnel. A daemon hears of its tunnel that it has it, and then of what comes through it.
    async fn hear_worker(&mut self, number: u16, report: WorkerReport) {
        if let Some(tenant) = self.tunnels.get_mut(number).filter(|tenant| !tenant.is_open) {
            match tenant.early.len() < EVENTS {
                true => tenant.early.push(report),
                false => tracing::debug!("{}: too much comes before it is made", tenant.device.name),
            }
            return;
        }
        match report {
            WorkerReport::Event(event) => self.daemons.tell(number, event),
            WorkerReport::NewPeer { peer, worker } => {
                self.platform.workers.tell_others(worker, || Command::SetPeer(number, peer));
                self.new_peer(number, peer);
            }
            WorkerReport::SingleFrames => self.saw_single_frames(number).await,
            WorkerReport::ManySent => self.saw_many_sent(number).await,
        }
    }

    /// Takes up what has changed in the kernel.
    async fn take_up(&mut self, change: HostChange) {
        match change {
            HostChange::Link(event) => self.link_changed(&event).await,
            HostChange::Addresses(addresses) => self.set_local_addresses(&addresses),
            HostChange::Policies => self.choose_all_doors().await,
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
                Said::Closed(connection) => going.extend(self.daemons.leave(connection)),
                Said::Request(connection, request) => {
                    if matches!(request, Request::Attach(_)) {
                        self.detach_all(&std::mem::take(&mut going));
                    }
                    self.hear(connection, request).await;
                }
            }
        }
        self.detach_all(&going);
    }

    /// Carries out a request in its turn: a tunnel is made when no other goes, and nobody overtakes himself.
    async fn hear(&mut self, connection: u64, request: Request) {
        let waits = self.waiting.iter().any(|(other, _)| *other == connection);
        match waits || (self.departing > 0 && matches!(request, Request::Attach(_))) {
            true => self.waiting.push_back((connection, request)),
            false => self.carry_out(connection, request).await,
        }
    }

    async fn carry_out(&mut self, connection: u64, request: Request) {
        let number = self.daemons.tunnel_of(connection);
        match (request, number) {
            (Request::Attach(attach), _) => {
                self.was_asked = true;
                self.attach(connection, &attach).await;
            }
            (Request::Status, _) => self.tell_status(connection),
            (_, None) => self
                .daemons
                .say(connection, Event::Failed { message: "no tunnel is attached; attach one first".into() }),
            (Request::OwnStatus, Some(number)) => self.tell_status_of(connection, vec![number]),
            (Request::SetSendKey { key }, Some(number)) => self.keys.set(number, Slot::Send, &key.0),
            (Request::DropSendKey, Some(number)) => {
                self.keys.clear(number, Slot::Send);
                self.platform.workers.tell_home(number, Command::SendKeyDropped(number));
            }
            (Request::SetSendLimits { packets, octets, paced }, Some(number)) => {
                self.platform.workers.tell_all(|_| Command::SetSendLimits(number, packets, octets, paced));
            }
            (Request::SetPeer { peer }, Some(number)) => {
                self.platform.workers.tell_all(|_| Command::SetPeer(number, peer));
                self.new_peer(number, peer);
            }
            (Request::SetRelay { relay }, Some(number)) => self.set_relay(number, relay),
            (Request::SetReceiveKey { key, keep_ms }, Some(number)) => {
                let used = self.tunnels.get(number).map_or(0, |tenant| tenant.counters.receive_key_used());
                self.keys.set_receive_key(number, &key.0, Duration::from_millis(keep_ms), used);
            }
            (Request::SendClear { datagram, to }, Some(number)) => match hex::decode(&datagram) {
                Ok(datagram) => self.platform.workers.tell_home(number, Command::SendClear(number, to, datagram)),
                Err(error) => {
                    self.daemons
                        .say(connection, Event::Failed { message: format!("datagram: {error}; send hexadecimal") });
                }
            },
            (Request::SendControl { payload, under, announces }, Some(number)) => match hex::decode(&payload) {
                Ok(message) => {
                    self.platform.workers.tell_home(
                        number,
                        Command::SendControl(number, ControlMessage { octets: message, under, announces }),
                    );
                }
                Err(error) => {
                    self.daemons
                        .say(connection, Event::Failed { message: format!("payload: {error}; send hexadecimal") });
                }
            },
        }
    }

    fn set_local_addresses(&mut self, addresses: &HashSet<IpAddr>) {
        if let Err(error) = self.platform.programs().set_local_addresses(addresses) {
            tracing::warn!("{error}; datagrams for some of this host's addresses go by UDP sockets");
        }
    }

    /// Takes up that a tunnel has another peer, and tells its daemon.
    fn new_peer(&mut self, number: u16, peer: SocketAddr) {
        self.follow(number, peer);
        self.daemons.tell(number, Event::NewPeer { peer });
    }

    async fn link_changed(&mut self, event: &LinkEvent) {
        self.lan_changed(event).await;
        let number = self.tunnels.of_device(event.ifindex);
        match event.change {
            LinkChange::Down | LinkChange::Deleted => {
                let deleted = event.change == LinkChange::Deleted;
                // The visible end of an Ethernet tunnel's pair is its device.
                let tunnels = match (number, self.hubs.of_device(event.ifindex)) {
                    (Some(number), _) => vec![number],
                    (None, Some(hub)) => {
                        let numbers = self.tunnels.numbers(|tenant| tenant.hub == hub);
                        self.hubs.lose(hub, deleted, !numbers.is_empty());
                        numbers
                    }
                    (None, None) => Vec::new(),
                };
                for number in tunnels {
                    self.device_left(number, deleted).await;
                }
                if deleted {
                    self.close_carrier(event.ifindex);
                }
            }
            LinkChange::Changed => {
                if let Some((number, mac)) = number.zip(event.mac) {
                    self.set_private_address(number, mac);
                    self.set_device_mtu(number, event.mtu as usize);
                }
            }
            LinkChange::Renamed => {
                self.renamed(event.ifindex, &event.name);
                for (_, tenant) in self.tunnels.iter_mut().filter(|(_, tenant)| tenant.zone() == Some(event.ifindex)) {
                    tenant.name_zone();
                }
                self.carrier_device_came(&event.name, event.ifindex);
            }
            LinkChange::Added => self.carrier_device_came(&event.name, event.ifindex),
            LinkChange::Up => {}
        }
        self.tunnels.forget_refusal(event.ifindex);
    }
}

#[cfg(test)]
mod tests;
