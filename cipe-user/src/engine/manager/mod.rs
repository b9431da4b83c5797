//! The control thread: connections, devices, maps and routes. No packet passes through it but key exchange.

mod attach;
mod carriers;
mod sizes;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::Verdict;
use cipe_common::maps::{Slot, key_index};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use super::counters::Counters;
use super::worker::{self, Command, Handle};
use crate::control::launch::Readiness;
use crate::control::protocol::{Carrier, Cipher, Event, Request, Status};
use crate::control::run_dir::RunDir;
use crate::control::server::{Connection, Server};
use crate::kernel::bpf::{LoadOptions, Programs, XdpPreference};
use crate::kernel::device::Device;
use crate::kernel::keys::KeyWriter;
use crate::kernel::links::{LinkChange, LinkEvent};
use crate::kernel::netlink::Netlink;
use crate::kernel::nexthop::{NextHops, State, Timing};
use crate::xsk::{Umem, UmemConfig};
use carriers::Carriers;
use sizes::Sizes;

/// How the engine was asked to run.
#[derive(Debug)]
pub struct EngineOptions {
    /// Stay when the last tunnel has gone.
    pub stay: bool,
    /// Where the control socket is.
    pub run_dir: RunDir,
    /// To be told when daemons can connect, if one of them started this engine.
    pub readiness: Option<Readiness>,
}

/// UMEM frames of 4096 octets; memory is used as they are.
const FRAMES: u32 = 16_384;

/// How long an engine without any tunnel waits for its first one.
const FIRST_TUNNEL: Duration = Duration::from_secs(10);

/// One tunnel as the control thread sees it.
struct Tenant {
    connection: u64,
    device: Device,
    cipher: Cipher,
    carrier_door: Carrier,
    xdp_mode: XdpPreference,
    me: SocketAddr,
    peer: Option<SocketAddr>,
    counters: Arc<Counters>,
    sizes: Sizes,
    /// Carrier device in use for sending, by ifindex.
    carrier: Option<u32>,
    /// When the previous receive key is forgotten.
    previous_until: Option<Instant>,
    notes: Vec<String>,
    /// Forwards news of the way to the peer.
    follower: Option<tokio::task::AbortHandle>,
}

/// A connection, as the manager sees it.
struct Daemon {
    /// Its process.
    pid: u32,
    /// To its task.
    events: mpsc::Sender<Event>,
}

/// Events that may wait for a connection's task; beyond, a daemon that does not read loses them.
const EVENTS: usize = 256;

struct Manager {
    stay: bool,
    programs: Programs,
    keys: KeyWriter,
    netlink: Netlink,
    next_hops: NextHops,
    umem: Umem,
    worker: Handle,
    carriers: Carriers,
    tenants: HashMap<u16, Tenant>,
    connections: HashMap<u64, Daemon>,
    /// Where followers tell of new ways, by tunnel.
    ways: mpsc::Sender<(u16, State)>,
    /// Whether there ever was a tunnel.
    had_tunnels: bool,
}

/// What the connections' tasks tell the manager.
enum Said {
    Request(u64, Request),
    Closed(u64),
}

/// Runs the engine until its last tunnel has gone, or SIGTERM or SIGINT.
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
    for name in netlink.sweep().await? {
        tracing::info!("{name}: left by an engine that died; removed");
    }
    let mut programs = Programs::load(&LoadOptions::default())?;
    let keys = programs.take_keys().context("the key map has another writer")?;
    let config = UmemConfig { frames: FRAMES, ..UmemConfig::default() };
    let (umem, pool) = Umem::new(config)?;
    let (to_manager, mut events) = mpsc::channel(1024);
    let next_hops = NextHops::new(&netlink, Timing::default()).await?;
    let worker = worker::start(umem.clone(), pool, to_manager, next_hops.clone())?;
    let mut links = netlink.watch_links().await?;
    let (ways, mut new_ways) = mpsc::channel(256);
    let mut manager = Manager {
        stay: options.stay,
        programs,
        keys,
        netlink,
        next_hops,
        umem,
        worker,
        carriers: Carriers::default(),
        tenants: HashMap::new(),
        connections: HashMap::new(),
        ways,
        had_tunnels: false,
    };
    let (say, mut said) = mpsc::channel(64);
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut connections = 0;
    let started = Instant::now();
    let mut second = tokio::time::interval(Duration::from_millis(250));
    if let Some(readiness) = options.readiness {
        readiness.up()?;
    }
    loop {
        tokio::select! {
            connection = server.accept() => match connection {
                Ok(connection) => {
                    connections += 1;
                    let (sender, events) = mpsc::channel(EVENTS);
                    let pid = connection.peer().map_or(0, |peer| peer.pid.unsigned_abs());
                    manager.connections.insert(connections, Daemon { pid, events: sender });
                    tokio::spawn(converse(connections, connection, events, say.clone()));
                }
                Err(error) => tracing::warn!("control socket: {error}"),
            },
            Some(said) = said.recv() => manager.hear(said).await,
            Some((number, event)) = events.recv() => manager.pass_on(number, event),
            Some((number, state)) = new_ways.recv() => manager.set_way(number, &state).await,
            Some(event) = links.recv() => manager.link_changed(&event),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = second.tick() => manager.forget_previous_keys(),
        }
        let idle = manager.tenants.is_empty() && manager.connections.is_empty();
        if idle && !manager.stay && (manager.had_tunnels || started.elapsed() > FIRST_TUNNEL) {
            break;
        }
    }
    manager.close().await;
    Ok(())
}

/// Carries the requests of one connection to the manager, and its events back.
async fn converse(number: u64, mut connection: Connection, mut events: mpsc::Receiver<Event>, say: mpsc::Sender<Said>) {
    loop {
        tokio::select! {
            request = connection.receive() => match request {
                Ok(Some(request)) => {
                    if say.send(Said::Request(number, request)).await.is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!("control connection {number}: {error}");
                    break;
                }
            },
            event = events.recv() => {
                let Some(event) = event else { return };
                if let Err(error) = connection.send(&event) {
                    tracing::warn!("control connection {number}: {error}");
                    if matches!(event, Event::Attached { .. } | Event::Failed { .. } | Event::DeviceDown) {
                        break;
                    }
                }
            }
        }
    }
    let _ = say.send(Said::Closed(number)).await;
}

impl Manager {
    async fn hear(&mut self, said: Said) {
        match said {
            Said::Request(connection, request) => self.carry_out(connection, request).await,
            Said::Closed(connection) => {
                self.connections.remove(&connection);
                if let Some(number) = self.tunnel_of(connection) {
                    self.detach(number).await;
                }
            }
        }
    }

    async fn carry_out(&mut self, connection: u64, request: Request) {
        let number = self.tunnel_of(connection);
        match (request, number) {
            (Request::Attach(attach), _) => {
                let event = match self.attach(connection, &attach).await {
                    Ok(number) => self.attached(number),
                    Err(error) => Event::Failed { message: format!("{error:#}") },
                };
                self.say(connection, event);
            }
            (Request::Status, _) => {
                let (done, counted) = std::sync::mpsc::channel();
                self.worker.send(Command::CountLosses(done));
                // A worker that is too busy to answer leaves its last losses for the next status.
                let _ = counted.recv_timeout(Duration::from_millis(100));
                let mut numbers: Vec<u16> = self.tenants.keys().copied().collect();
                numbers.sort_unstable();
                for number in numbers {
                    if let Some(status) = self.status(number) {
                        self.say(connection, Event::Status(Box::new(status)));
                    }
                }
                self.say(connection, Event::StatusEnd);
            }
            (_, None) => {
                self.say(connection, Event::Failed { message: "no tunnel is attached; attach one first".into() })
            }
            (Request::SetSendKey { key }, Some(number)) => self.keys.set(number.into(), Slot::Send, &key.0),
            (Request::DropSendKey, Some(number)) => self.keys.clear(number.into(), Slot::Send),
            (Request::SetSendLimits { packets, octets }, Some(number)) => {
                self.worker.send(Command::SetSendLimits(number, packets, octets));
            }
            (Request::SetReceiveKey { key, keep_ms }, Some(number)) => {
                // The worker moves the old key's replay filter along when it sees it in the previous slot first.
                if let Some((_, old)) = self.keys.reader().read(key_index(number.into(), Slot::Receive)) {
                    self.keys.set(number.into(), Slot::Previous, &old);
                }
                self.keys.set(number.into(), Slot::Receive, &key.0);
                if let Some(tenant) = self.tenants.get_mut(&number) {
                    tenant.previous_until = Some(Instant::now() + Duration::from_millis(keep_ms));
                }
            }
            (Request::SendControl { payload }, Some(number)) => match hex::decode(&payload) {
                Ok(message) => self.worker.send(Command::SendControl(number, message)),
                Err(error) => {
                    self.say(connection, Event::Failed { message: format!("payload: {error}; send hexadecimal") });
                }
            },
        }
    }

    fn tunnel_of(&self, connection: u64) -> Option<u16> {
        self.tenants.iter().find(|(_, tenant)| tenant.connection == connection).map(|(number, _)| *number)
    }

    fn attached(&mut self, number: u16) -> Event {
        self.had_tunnels = true;
        match self.tenants.get(&number) {
            Some(tenant) => {
                let mut notes = tenant.notes.clone();
                notes.extend(tenant.carrier.and_then(|carrier| self.carrier_note(carrier)).map(str::to_owned));
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

    /// Takes an event from the worker to the tunnel's daemon.
    fn pass_on(&mut self, number: u16, event: Event) {
        if let Event::NewPeer { peer } = event {
            self.follow(number, peer);
        }
        self.tell(number, event);
    }

    fn link_changed(&mut self, event: &LinkEvent) {
        match event.change {
            LinkChange::Down | LinkChange::Deleted => {
                let tunnel = self.tenants.iter().find(|(_, tenant)| tenant.device.index == event.ifindex);
                if let Some(number) = tunnel.map(|(number, _)| *number) {
                    self.tell(number, Event::DeviceDown);
                }
                if event.change == LinkChange::Deleted {
                    self.close_carrier(event.ifindex);
                }
            }
            _ => {}
        }
    }

    fn forget_previous_keys(&mut self) {
        let now = Instant::now();
        for (number, tenant) in &mut self.tenants {
            if tenant.previous_until.is_some_and(|until| until <= now) {
                tenant.previous_until = None;
                self.keys.clear((*number).into(), Slot::Previous);
            }
        }
    }

    fn status(&self, number: u16) -> Option<Status> {
        let tenant = self.tenants.get(&number)?;
        let in_programs = self.programs.verdicts(number.into()).ok()?;
        let verdicts = Verdict::ALL
            .iter()
            .map(|verdict| (verdict.name().to_owned(), in_programs[*verdict as usize] + tenant.counters.of(*verdict)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let reader = self.keys.reader();
        let slots =
            [(Slot::Static, "static"), (Slot::Send, "send"), (Slot::Receive, "receive"), (Slot::Previous, "previous")];
        let live = |slot| reader.read(key_index(number.into(), slot)).is_some();
        let mut doors = tenant.notes.clone();
        doors.extend(tenant.carrier.and_then(|carrier| self.carrier_note(carrier)).map(str::to_owned));
        Some(Status {
            device: tenant.device.name.clone(),
            cipher: tenant.cipher,
            me: tenant.me,
            peer: tenant.peer,
            keys: slots.iter().filter(|(slot, _)| live(*slot)).map(|(_, name)| (*name).to_owned()).collect(),
            verdicts,
            octets: tenant.counters.octets(),
            doors,
        })
    }

    async fn close(mut self) {
        for number in self.tenants.keys().copied().collect::<Vec<_>>() {
            self.detach(number).await;
        }
    }
}
