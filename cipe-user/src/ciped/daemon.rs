//! One tunnel from start to end: one loop handles the engine's events, timers, scripts and the operator's commands.
//!
//! [`Session`] makes all decisions about events; the daemon carries them out. If the engine dies, the interface stays
//! and drops all packets (fail closed) until a new engine has taken it over.

mod clock;
mod ending;
mod keeper;
mod peer_location;
mod reload;
mod revive;
mod session_keys;
mod statistics;
mod waiting;

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context, bail};
use rand::rand_core::UnwrapErr;
use rand::rngs::SysRng;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::attach::{AttachError, Attached, Placement, attach};
use super::guard::Guard;
use super::heartbeat::Heartbeat;
use super::options::{self, Options};
use super::peer_name::PeerName;
use super::scripts::{self, Facts};
use super::sealing::Sealing;
use super::session::{End, Level, Session, Step};
use super::setup::Setup;
use super::socks;
use crate::control::channel::SendError;
use crate::control::client::Client;
use crate::control::launch::launch;
use crate::control::protocol::{Descriptor, Event, Request};
use crate::kernel::zone::Shown;
use clock::Clock;
use keeper::Keeper;
use peer_location::first_relay;
use session_keys::KeysInUse;
use waiting::Woken;

/// Maximum attempts to attach at the start. The first may fail because the running engine has no tunnel and is about to
/// end.
const MAX_START_ATTEMPTS: u32 = 3;

/// The first and the last pause between attempts to start over; each is twice as long as the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);

/// A command of the operator to a running daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperatorCommand {
    /// SIGTERM or SIGINT: stop.
    Stop,
    /// SIGHUP: read the option files again.
    Reload,
}

/// Runs a tunnel until it is asked to stop; calls `up` once the tunnel is up and `ip-up` has ended.
///
/// # Errors
/// The tunnel does not come up, or ends without a command. The text says what is wrong, where, and how to fix it.
pub async fn run(setup: Setup, mut commands: mpsc::Receiver<OperatorCommand>, up: impl FnOnce()) -> anyhow::Result<()> {
    let mut up = Some(up);
    let mut daemon = Daemon::start(setup).await?;
    loop {
        let say_up = || {
            if let Some(up) = up.take() {
                up();
            }
        };
        let ended = daemon.serve(&mut commands, say_up).await;
        daemon.stop(&ended).await;
        match ended {
            End::Asked(_) | End::Down(_) => return Ok(()),
            End::Again(_) => daemon = daemon.start_over().await?,
            End::Failed(reason) => bail!("{}: {reason}", daemon.facts.device),
        }
    }
}

struct Daemon {
    setup: Setup,
    clock: Clock,
    session: Session<Random>,
    /// `None` while the engine is dead.
    engine: Option<Client>,
    facts: Facts,
    /// The peer's current carrier address, for a new engine.
    peer: SocketAddr,
    /// The peer's name, if the option `peer` has a name.
    peer_name: Option<PeerName>,
    /// The relay of the SOCKS5 server.
    relay: Option<socks::Relay>,
    /// The current address of that relay.
    relay_at: Option<SocketAddr>,
    /// Saves what the next daemon has to know.
    keeper: Keeper,
    /// The keys that the engine has, for the next one.
    keys: KeysInUse,
    /// The memory in which it records their use.
    ledger: Option<Descriptor>,
    /// The watch over the engine; `None`: it is not watched.
    heartbeat: Option<Heartbeat>,
    /// Keeps private packets from other routes; `None`: it could not be started.
    guard: Option<Guard>,
}

/// A running script.
struct Script {
    ended: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// Stops the script when it is dropped.
    stop: oneshot::Sender<()>,
}

impl Script {
    fn start(script: PathBuf, facts: Facts) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let stopped = async {
            // Nothing is ever sent; this waits until the sender is dropped.
            let _ = stopped.await;
        };
        Self { ended: Box::pin(run_script(script, facts, stopped)), stop }
    }

    /// Ends the script and all processes that it has started, and waits for the end.
    async fn stop(self) {
        drop(self.stop);
        self.ended.await;
    }
}

impl Daemon {
    async fn start(setup: Setup) -> anyhow::Result<Self> {
        let (relay, relay_at) = first_relay(&setup.options).await?.unzip();
        let clock = Clock::new();
        let (keeper, past) = Keeper::open(setup.memory.clone(), clock.now().unix_nanos, &mut random()?);
        let rngs = (random()?, random()?);
        let sealing = Sealing::new(&setup.options, past.sealed, max_renew_age(), rngs, clock.now());
        let mut session = Session::new(&setup.options, past, clock.now(), (random()?, random()?));
        if let Some(sealing) = sealing {
            session = session.seal_by(sealing);
        }
        let mut attempt = 1;
        let Attached { engine, device, me, heartbeat, ledger, .. } = loop {
            let place = Placement {
                device: setup.options.device.clone(),
                me: setup.options.me.address,
                peer: setup.options.peer.address,
                send_packets: session.send_packets(),
                static_data: session.static_data(),
                sealed: session.attach_sealed(clock.now()),
                resume: None,
                ledger: None,
            };
            match attach(&setup, place).await {
                Ok(attached) => break attached,
                Err(AttachError::Gone) if attempt < MAX_START_ATTEMPTS => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        };
        let options = &setup.options;
        let peer = options.peer.address;
        let facts = Facts {
            device,
            me,
            peer: (!peer.ip().is_unspecified()).then_some(peer),
            ipaddr: options.ipaddr,
            ptpaddr: options.ptpaddr,
            mtu: options.mtu,
            cipher: options.cipher,
            arg: options.arg.clone(),
            relay: None,
            options: setup.draft.environment(),
        };
        session.name(&facts.device);
        let guard = Guard::start(&setup, &facts.device).inspect_err(|error| {
            tracing::error!("{}: NO GUARD ROUTES: {error:#}", facts.device);
        });
        let guard = guard.ok();
        let peer_name = options.peer_name.clone().map(|name| PeerName::new(name, peer.ip()));
        tracing::info!("{}: up, {} on {}, peer {}", facts.device, options.ipaddr, Shown(me), options.peer.text);
        if options.key.is_none() {
            tracing::error!(
                "{}: NO ENCRYPTION: anybody on the path can read all packets, because of `nokey`",
                facts.device
            );
        }
        let mut daemon = Self {
            setup,
            clock,
            session,
            engine: Some(engine),
            facts,
            peer,
            peer_name,
            relay,
            relay_at: None,
            keeper,
            keys: KeysInUse::default(),
            ledger,
            heartbeat,
            guard,
        };
        if let Some(relay) = relay_at {
            daemon.relayed(socks::News::Relay(relay));
        }
        Ok(daemon)
    }

    /// Starts the same tunnel again, with the same interface name and with addresses that are resolved again. Several
    /// attempts: the kernel may not have removed all of a lost interface yet.
    async fn start_over(self) -> anyhow::Result<Self> {
        let Self { mut setup, facts, .. } = self;
        let mut pause = FIRST_PAUSE;
        loop {
            let (options, problems) = options::settle(&setup.draft, Vec::new());
            let Some(options) = options else {
                let errors: Vec<String> = problems.iter().map(ToString::to_string).collect();
                bail!("{}: {}", facts.device, errors.join("\n"));
            };
            setup.options = Options { device: Some(facts.device.clone()), ..options };
            match Self::start(setup.clone()).await {
                Err(error) if pause <= LAST_PAUSE => {
                    tracing::warn!("{}: {error:#}; next attempt in {pause:?}", facts.device);
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                result => return result,
            }
        }
    }

    async fn serve(&mut self, commands: &mut mpsc::Receiver<OperatorCommand>, up: impl FnOnce()) -> End {
        // The script runs beside the loop: it may use the tunnel, which needs the loop for its keys.
        let mut script = Some(Script::start(self.setup.options.ipup.clone(), self.facts.clone()));
        let end = self.serve_until_end(commands, up, &mut script).await;
        // The script ends before ip-down runs; otherwise it could set up again what ip-down has removed.
        if let Some(script) = script {
            script.stop().await;
        }
        end
    }

    async fn serve_until_end(
        &mut self,
        commands: &mut mpsc::Receiver<OperatorCommand>,
        up: impl FnOnce(),
        script: &mut Option<Script>,
    ) -> End {
        let mut up = Some(up);
        loop {
            if self.engine.is_none()
                && let Some(end) = self.revive(commands).await
            {
                return end;
            }
            let woken = self.wait(commands, script.as_mut()).await;
            let now = self.clock.now();
            let steps = match woken {
                Woken::Event(Some(Event::Renamed { device })) => {
                    tracing::info!("{}: is called {device} now", self.facts.device);
                    if let Some(guard) = &mut self.guard {
                        guard.rename(&device);
                    }
                    self.session.name(&device);
                    self.facts.device = device;
                    continue;
                }
                Woken::Event(Some(Event::StandbyWanted)) => {
                    self.start_standby();
                    continue;
                }
                Woken::Event(Some(event)) => {
                    if let Some(heartbeat) = &mut self.heartbeat {
                        heartbeat.heard();
                    }
                    self.session.event(&event, now)
                }
                Woken::Event(None) => {
                    (self.engine, self.heartbeat) = (None, None);
                    continue;
                }
                Woken::Timer => {
                    let mut steps = self.keep().await;
                    self.keys.forget_former(Instant::now());
                    self.watch_engine();
                    steps.extend(self.session.tick(now));
                    steps
                }
                Woken::Relay(news) => self.relayed(news),
                Woken::Resolved(answer) => match self.resolved(answer) {
                    Ok(steps) => steps,
                    Err(end) => return end,
                },
                Woken::Command(Some(OperatorCommand::Reload)) => {
                    self.reload();
                    continue;
                }
                Woken::Command(Some(OperatorCommand::Stop) | None) => return End::Asked("asked to stop".to_owned()),
                Woken::Routes => {
                    self.settle_routes().await;
                    continue;
                }
                Woken::ScriptEnded => {
                    *script = None;
                    // Who waits for the tunnel may trust it from now on.
                    self.settle_routes().await;
                    if let Some(up) = up.take() {
                        up();
                    }
                    continue;
                }
            };
            if let Some(end) = self.carry_out(steps).await {
                return end;
            }
        }
    }

    /// Asks the engine whether it goes on, or kills it if it has not answered.
    fn watch_engine(&mut self) {
        let Self { heartbeat: Some(heartbeat), facts, .. } = self else { return };
        if heartbeat.watch(&facts.device) {
            self.send(&Request::Beat);
        }
    }

    /// Starts an engine that stands by, in the background.
    fn start_standby(&self) {
        let (mut standby, device) = (self.setup.engine.clone(), self.facts.device.clone());
        standby.arguments.push("--standby".into());
        tokio::task::spawn_blocking(move || match launch(&standby) {
            Ok(()) => tracing::info!("{device}: an engine stands by"),
            Err(error) => {
                tracing::warn!("{device}: no engine stands by, so that the next one takes longer to start: {error}");
            }
        });
    }

    async fn settle_routes(&mut self) {
        if let Some(guard) = &mut self.guard {
            guard.settle().await;
        }
    }

    async fn carry_out(&mut self, steps: Vec<Step>) -> Option<End> {
        let mut steps = VecDeque::from(steps);
        while let Some(step) = steps.pop_front() {
            let device = &self.facts.device;
            match step {
                Step::Send(request) => self.send(&request),
                Step::Log(Level::Warning, text) => tracing::warn!("{device}: {text}"),
                Step::Log(Level::Info, text) => tracing::info!("{device}: {text}"),
                Step::Log(Level::Debug, text) => tracing::debug!("{device}: {text}"),
                Step::Peer(peer) => {
                    self.peer = peer;
                    self.facts.peer = Some(peer);
                }
                Step::Me(me) => self.facts.me = me,
                Step::LookUpPeer => {
                    if let Some(name) = &mut self.peer_name {
                        name.look_up();
                    }
                }
                Step::Forget => steps.extend(self.forget_if_asked().unwrap_or_default()),
                Step::Keep(kept) => steps.extend(self.keep_sealed(kept).await),
                Step::FallBack => self.fall_back(),
                Step::End(end) => return Some(end),
            }
        }
        None
    }

    fn send(&mut self, request: &Request) {
        self.keys.note(request, Instant::now());
        if let Some(engine) = &self.engine
            && let Err(error) = engine.send(request)
        {
            if matches!(error, SendError::Closed) {
                // What the engine has said before is received first.
                tracing::warn!("{}: {error}", self.facts.device);
                return;
            }
            // The request is lost: the engine would go on with other keys and rules than the daemon believes. The next attach states all.
            tracing::error!("{}: a request is lost: {error}; the connection to the engine ends", self.facts.device);
            (self.engine, self.heartbeat) = (None, None);
        }
    }
}

async fn run_script(script: PathBuf, facts: Facts, stop: impl Future<Output = ()>) {
    if let Err(error) = scripts::run(&script, &facts, scripts::MAX_RUN_TIME, stop).await {
        tracing::error!("{}: {error}", facts.device);
    }
}

/// The greatest age of a send key for sealed packets at which another one is wanted, in milliseconds, by the environment: so that tests
/// see renewals.
fn max_renew_age() -> Option<Duration> {
    std::env::var("CIPE_SEALED_RENEW_MS").ok()?.parse().ok().map(Duration::from_millis)
}

/// Makes keys, ids and filler: each draw is the kernel's. A generator in this process could be run backwards by whoever reads its memory
/// later, to the private keys of all sessions before.
type Random = UnwrapErr<SysRng>;

/// # Errors
/// The kernel gives no random numbers. If it gives some once, it does not fail later.
fn random() -> anyhow::Result<Random> {
    getrandom::fill(&mut [0]).context("the system gives no random numbers")?;
    Ok(UnwrapErr(SysRng))
}

#[cfg(test)]
mod tests;
