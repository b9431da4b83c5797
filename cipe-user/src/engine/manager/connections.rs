//! The daemons and those who ask for a status: their connections, each a task of its own, and what is said to them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use crate::control::channel::SendError;
use crate::control::protocol::{Event, Request, Status};
use crate::control::server::Connection;

/// How long the reader of a status may take for one tunnel's.
const STATUS: Duration = Duration::from_secs(5);

/// Events that may wait for a connection's task; beyond, a daemon that does not read loses them.
pub(super) const EVENTS: usize = 256;

/// What the connections' tasks tell the manager.
pub(super) enum Said {
    /// A request of this connection's.
    Request(u64, Request),
    /// It has closed.
    Closed(u64),
}

/// All connections, by number.
pub(super) struct Daemons {
    all: HashMap<u64, Daemon>,
    /// Whose tunnel is whose, by the tunnel's number.
    of_tunnels: HashMap<u16, u64>,
    /// Where the connections' tasks speak to the manager.
    say: mpsc::Sender<Said>,
    /// Number of the last connection.
    last: u64,
}

/// A connection, as the manager sees it.
struct Daemon {
    /// Its process.
    pid: u32,
    /// Its tunnel, from the attempt to attach it on.
    tunnel: Option<u16>,
    /// To its task.
    events: mpsc::Sender<Event>,
    /// Has its task close it.
    close: Arc<Notify>,
}

impl Daemons {
    /// None yet; what they say is to be sent there.
    pub(super) fn new(say: mpsc::Sender<Said>) -> Self {
        Self { all: HashMap::new(), of_tunnels: HashMap::new(), say, last: 0 }
    }

    /// Takes up a new connection.
    pub(super) fn enter(&mut self, connection: Connection) {
        self.last += 1;
        let (sender, events) = mpsc::channel(EVENTS);
        let pid = connection.peer().map_or(0, |peer| peer.pid.unsigned_abs());
        let close = Arc::new(Notify::new());
        self.all.insert(self.last, Daemon { pid, tunnel: None, events: sender, close: close.clone() });
        tokio::spawn(converse(self.last, connection, events, close, self.say.clone()));
    }

    /// Forgets a connection that has closed; returns its tunnel, which [`Self::part`] takes from it.
    pub(super) fn leave(&mut self, connection: u64) -> Option<u16> {
        self.all.remove(&connection)?.tunnel
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// The process behind a connection.
    pub(super) fn pid(&self, connection: u64) -> Option<u32> {
        Some(self.all.get(&connection)?.pid)
    }

    /// The tunnel of a connection.
    pub(super) fn tunnel_of(&self, connection: u64) -> Option<u16> {
        self.all.get(&connection)?.tunnel
    }

    /// Gives a connection its tunnel.
    pub(super) fn join(&mut self, connection: u64, number: u16) {
        if let Some(daemon) = self.all.get_mut(&connection) {
            daemon.tunnel = Some(number);
            self.of_tunnels.insert(number, connection);
        }
    }

    /// Takes a tunnel from its connection.
    pub(super) fn part(&mut self, number: u16) {
        if let Some(daemon) = self.of_tunnels.remove(&number).and_then(|connection| self.all.get_mut(&connection)) {
            daemon.tunnel = None;
        }
    }

    /// Says something to a connection. One that does not read loses it: what comes again, or, with its tunnel, what does not.
    pub(super) fn say(&self, connection: u64, event: Event) {
        let Some(daemon) = self.all.get(&connection) else { return };
        match daemon.events.try_send(event) {
            Ok(()) => {}
            // Its task has ended, and has said so.
            Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(event)) if comes_once(&event) => {
                tracing::warn!("control connection {connection} does not listen; it is closed");
                daemon.close.notify_one();
            }
            Err(TrySendError::Full(_)) => tracing::debug!("control connection {connection} does not listen"),
        }
    }

    /// Says something to the daemon of a tunnel.
    pub(super) fn tell(&self, number: u16, event: Event) {
        if let Some(connection) = self.of_tunnels.get(&number) {
            self.say(*connection, event);
        }
    }

    /// Tells a tunnel's daemon something for its log that the operator should look at.
    pub(super) fn notice(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: false });
    }

    /// Tells a tunnel's daemon something for its log that is as it should be.
    pub(super) fn news(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: true });
    }

    /// Hands a status over to who asked for it, as fast as it is read.
    pub(super) fn report(&self, connection: u64, all: Vec<Status>) {
        if let Some(daemon) = self.all.get(&connection) {
            tokio::spawn(report(daemon.events.clone(), all));
        }
    }
}

/// Hands over a whole status, however many tunnels it has, as fast as its reader reads.
pub(super) async fn report(events: mpsc::Sender<Event>, all: Vec<Status>) {
    for event in all.into_iter().map(|status| Event::Status(Box::new(status))).chain([Event::StatusEnd]) {
        // The reader has gone.
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Whether a daemon that has lost an event would wait for it for ever.
fn comes_once(event: &Event) -> bool {
    matches!(event, Event::Attached { .. } | Event::Failed { .. } | Event::DeviceDown)
}

/// Carries the requests of one connection to the manager, and its events back.
pub(super) async fn converse(
    number: u64,
    mut connection: Connection,
    mut events: mpsc::Receiver<Event>,
    close: Arc<Notify>,
    say: mpsc::Sender<Said>,
) {
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
            () = close.notified() => break,
            event = events.recv() => {
                // The manager has forgotten it.
                let Some(event) = event else { return };
                if matches!(event, Event::Status(_) | Event::StatusEnd) {
                    let delivered = tokio::time::timeout(STATUS, connection.deliver(&event)).await;
                    if !matches!(delivered, Ok(Ok(()))) {
                        break;
                    }
                    continue;
                }
                match connection.send(&event) {
                    // What it said before it went is still to be heard, such as its farewell to the peer; then its end is.
                    Ok(()) | Err(SendError::Closed) => {}
                    Err(error) => {
                        tracing::warn!("control connection {number}: {error}");
                        if comes_once(&event) {
                            break;
                        }
                    }
                }
            }
        }
    }
    // A manager that is gone has no connections.
    let _ = say.send(Said::Closed(number)).await;
}
