//! The events that a daemon waits for.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Daemon, OperatorCommand, Script};
use crate::ciped::heartbeat::Heartbeat;
use crate::ciped::options::Mistake;
use crate::ciped::socks;
use crate::control::protocol::Event;

/// How late a deadline may be noticed after the machine has slept: the timer's clock stands meanwhile, and keys are to be wiped.
const MAX_TIMER: Duration = Duration::from_secs(10);

/// The event that woke the loop.
pub(super) enum Woken {
    Event(Option<Event>),
    Command(Option<OperatorCommand>),
    Timer,
    ScriptEnded,
    /// Routes into the interface have come or gone.
    Routes,
    Relay(socks::News),
    Resolved(Result<SocketAddr, Mistake>),
}

impl Daemon {
    /// Waits for one event. If there are several, a command of the operator is first.
    pub(super) async fn wait(
        &mut self,
        commands: &mut mpsc::Receiver<OperatorCommand>,
        script: Option<&mut Script>,
    ) -> Woken {
        let session = self.session.deadline().map(|at| self.clock.timer(at).min(Instant::now() + MAX_TIMER));
        let heartbeat = self.heartbeat.as_ref().map(Heartbeat::deadline);
        let deadline = [session, self.keep_deadline(), self.keys.deadline(), heartbeat].into_iter().flatten().min();
        let timer = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let script = async {
            match script {
                Some(script) => script.ended.as_mut().await,
                None => std::future::pending().await,
            }
        };
        let event = async {
            match &mut self.engine {
                Some(engine) => engine.receive().await,
                None => std::future::pending().await,
            }
        };
        let relay = async {
            match &mut self.relay {
                Some(relay) => relay.news().await,
                None => std::future::pending().await,
            }
        };
        let resolved = async {
            match &mut self.peer_name {
                Some(name) => name.answer().await,
                None => std::future::pending().await,
            }
        };
        let routes = async {
            match &mut self.guard {
                Some(guard) => guard.changed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            command = commands.recv() => Woken::Command(command),
            () = routes => Woken::Routes,
            news = relay => Woken::Relay(news),
            answer = resolved => Woken::Resolved(answer),
            event = event => Woken::Event(event.unwrap_or_else(|error| {
                tracing::error!("{}: {error}", self.facts.device);
                None
            })),
            () = timer => Woken::Timer,
            () = script => Woken::ScriptEnded,
        }
    }
}
