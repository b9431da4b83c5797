//! How an engine takes the place of another one: it prepares all that takes time, listens in its place, and asks it to leave. The
//! tunnels' daemons notice that the other has gone, and attach to this one, under the same keys; meanwhile all packets are dropped.

use std::time::Duration;

use anyhow::{Context as _, bail};

use crate::control::client::{Client, EngineProcess, start_lock};
use crate::control::protocol::{Event, Request};
use crate::control::run_dir::RunDir;
use crate::control::server::Server;

/// How long the other engine may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long it may take to end. This engine may not kill it, as it is confined by then.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The engine that is to be replaced.
pub(super) struct Predecessor {
    connection: Client,
    process: EngineProcess,
    /// It stays when its last tunnel has ended.
    pub stay: bool,
    /// The largest MTU of its tunnels, in octets.
    pub largest_mtu: u32,
    /// The number of workers that it was asked for.
    pub workers: Option<usize>,
}

impl Predecessor {
    /// Asks the engine that runs whether it can be replaced.
    ///
    /// # Errors
    /// None runs, or it is of a version that cannot be replaced.
    pub(super) async fn find(run: &RunDir) -> anyhow::Result<Self> {
        let mut connection = Client::connect(run)?;
        let process = connection.process().context("the process of the running engine is not to be known")?;
        connection.send(&Request::Replace).context("the running engine does not take requests")?;
        let answer = tokio::time::timeout(ANSWER_TIMEOUT, connection.receive()).await;
        match answer.context("the running engine does not answer; kill it, and its daemons start another one")?? {
            Some(Event::Replaceable { stay, largest_mtu, workers }) => {
                Ok(Self { connection, process, stay, largest_mtu, workers })
            }
            _ => bail!(
                "the running engine is of a version that cannot be replaced; kill it, and its daemons start another one"
            ),
        }
    }

    /// Takes its place: returns when it has ended. From then on daemons wait at the returned socket.
    ///
    /// # Errors
    /// The control socket cannot be made, or the other engine cannot be ended.
    pub(super) async fn replace(self, run: RunDir) -> anyhow::Result<Server> {
        let Self { mut connection, process, .. } = self;
        // No daemon starts an engine meanwhile.
        let lock = {
            let run = run.clone();
            tokio::task::spawn_blocking(move || start_lock(&run))
                .await?
                .context("the lock of those who start engines")?
        };
        let mut server = Server::replace(run)?;
        tracing::info!("takes the place of the engine with process id {}", process.pid);
        connection.send(&Request::Leave)?;
        connection.flush().await?;
        tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
            let (pid, seconds) = (process.pid, END_TIMEOUT.as_secs());
            anyhow::ensure!(
                process.wait_for_end(END_TIMEOUT)?,
                "the other engine ({pid}) has not ended in {seconds} s; kill it"
            );
            Ok(())
        })
        .await??;
        server.take_lock()?;
        drop(lock);
        Ok(server)
    }
}
