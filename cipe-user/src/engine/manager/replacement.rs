//! How an engine takes the place of another one: it prepares all that takes time beside the other, listens at a socket of its own, and
//! goes on when the other has ended. The tunnels' daemons notice that, and attach to this one, under the same keys; meanwhile all
//! packets are dropped.
//!
//! It asks the other to leave, or stands by until the other dies.

use std::time::Duration;

use anyhow::{Context as _, bail};
use rustix::thread::set_name;
use tokio::signal::unix::{SignalKind, signal};

use super::followers::{Followers, HostChange};
use super::hubs::{Handover, QUEUE};
use super::platform::{Platform, log_failure};
use crate::control::client::{Client, EngineProcess, start_lock};
use crate::control::launch::Readiness;
use crate::control::lock::Lock;
use crate::control::protocol::{Event, Request, VERSION};
use crate::control::run_dir::RunDir;
use crate::control::server::{BindError, Server};

/// How long the other engine may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to end. This engine may not kill it, as it is confined by then.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// What an engine is to another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// There is no other one.
    Only,
    /// It takes the place of one that runs.
    Replacement,
    /// It takes the place of one that dies.
    Standby,
}

/// The engine whose place is to be taken.
pub(super) struct Predecessor {
    connection: Client,
    process: EngineProcess,
    role: Role,
    /// It stays when its last tunnel has ended.
    pub stay: bool,
    /// The largest MTU of its tunnels, in octets.
    pub largest_mtu: u32,
    /// The number of workers that it was asked for.
    pub workers: Option<usize>,
}

impl Predecessor {
    /// Asks the engine that runs whether its place can be taken; `None` in the role of [`Role::Only`].
    ///
    /// # Errors
    /// None runs; or it is of a version that cannot be replaced, or has one that stands by.
    pub(super) async fn find(run: &RunDir, role: Role) -> anyhow::Result<Option<Self>> {
        let request = match role {
            Role::Only => return Ok(None),
            Role::Replacement => Request::Replace,
            Role::Standby => Request::StandBy,
        };
        let mut connection = Client::connect(run)?;
        let process = connection.process().context("the process of the running engine is not to be known")?;
        connection.send(&request).context("the running engine does not take requests")?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, connection.receive()).await;
        match answer.context("the running engine does not answer; kill it, and its daemons start another one")?? {
            Some(Event::Replaceable { version, .. }) if version != VERSION => bail!(
                "the daemons of the running engine speak control protocol {version}, this program speaks {VERSION}; restart the tunnels"
            ),
            Some(Event::Replaceable { stay, largest_mtu, workers, .. }) => {
                Ok(Some(Self { connection, process, role, stay, largest_mtu, workers }))
            }
            Some(Event::Failed { message }) if role == Role::Standby => bail!(message),
            _ => bail!(
                "the running engine is of a version that cannot be replaced; kill it, and its daemons start another one"
            ),
        }
    }

    /// Takes its place when it has ended; `None` if it is not to be taken any more. An engine that stands by is ready before.
    ///
    /// # Errors
    /// The control socket cannot be made, or the other engine does not end.
    pub(super) async fn succeed(
        self,
        run: RunDir,
        platform: &Platform,
        followers: &mut Followers,
        readiness: &mut Option<Readiness>,
    ) -> anyhow::Result<Option<(Server, Handover)>> {
        platform.prepare_queue(QUEUE);
        match self.role {
            Role::Standby => self.stand_by(run, platform, followers, readiness).await,
            Role::Only | Role::Replacement => self.replace(run).await.map(Some),
        }
    }

    async fn replace(self, run: RunDir) -> anyhow::Result<(Server, Handover)> {
        let Self { mut connection, process, .. } = self;
        let handover = tokio::time::timeout(ANSWER_TIMEOUT, told(&mut connection));
        let mut handover = handover.await.context("the running engine does not say what hubs it has")?;
        let _no_other = no_other_starts(run.clone()).await?;
        // The other one keeps its socket until it has ended: if it does not end, or has none to end for, nothing is lost.
        let mut server = Server::beside(run.clone(), run.next_socket())?;
        tracing::info!("takes the place of the engine with process id {}", process.pid);
        connection.send(&Request::Leave)?;
        connection.flush().await?;
        ended(process).await?;
        handover.release();
        server.take_place()?;
        Ok((server, handover))
    }

    async fn stand_by(
        self,
        run: RunDir,
        platform: &Platform,
        followers: &mut Followers,
        readiness: &mut Option<Readiness>,
    ) -> anyhow::Result<Option<(Server, Handover)>> {
        let Self { mut connection, process, .. } = self;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut server = Server::beside(run.clone(), run.standby_socket())?;
        let mut handover = told(&mut connection).await;
        if let Some(readiness) = readiness.take() {
            readiness.up()?;
        }
        loop {
            tokio::select! {
                event = connection.receive() => match event {
                    Ok(Some(Event::Dismissed)) => return Ok(None),
                    Ok(Some(event)) => handover.take(event),
                    Ok(None) | Err(_) => break,
                },
                change = followers.next() => if let HostChange::Addresses(addresses) = change? {
                    log_failure(platform.programs().set_local_addresses(&addresses));
                },
                _ = terminate.recv() => return Ok(None),
            }
        }
        tracing::warn!("the engine with process id {} has gone; this one takes its place", process.pid);
        if let Err(error) = set_name(c"cipe-engine") {
            tracing::debug!("the process keeps its name: {error}");
        }
        ended(process).await?;
        handover.release();
        match server.take_place() {
            Ok(()) => Ok(Some((server, handover))),
            // A daemon has started another one.
            Err(BindError::AlreadyRunning { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Takes what an engine tells of the hubs that it has now; less if it ends meanwhile.
async fn told(connection: &mut Client) -> Handover {
    let mut handover = Handover::default();
    while let Ok(Some(event)) = connection.receive().await {
        match event {
            Event::HubsTold => break,
            event => handover.take(event),
        }
    }
    handover
}

/// Returns a lock under which no daemon starts an engine.
async fn no_other_starts(run: RunDir) -> anyhow::Result<Lock> {
    tokio::task::spawn_blocking(move || start_lock(&run)).await?.context("the lock of those who start engines")
}

/// Waits for the end of an engine.
async fn ended(process: EngineProcess) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        let (pid, seconds) = (process.pid, END_TIMEOUT.as_secs());
        anyhow::ensure!(
            process.wait_for_end(END_TIMEOUT)?,
            "the other engine ({pid}) has not ended in {seconds} s; kill it"
        );
        Ok(())
    })
    .await?
}
