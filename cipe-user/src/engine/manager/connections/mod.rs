//! The connections of the control socket, of daemons and of those who ask for a status. Each is served by a task of its own.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Notify, mpsc};

use crate::control::channel::SendError;
use crate::control::protocol::{Event, Request, Status};
use crate::control::server::Connection;

/// How long the reader of a status may take for that of one tunnel, before its connection is closed.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the engine that stands by may take to end.
const DISMISSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Requests of one connection that may wait for the manager, besides those in the socket.
const MAX_WAITING_REQUESTS: usize = 16;

/// Events that may wait for a connection's task; a daemon that does not read loses those beyond.
pub(super) const MAX_QUEUED_EVENTS: usize = 256;

/// An event of a connection, by the connection's number.
pub(super) enum ConnectionEvent {
    /// It has sent a request.
    Request(u64, Request),
    /// It has closed.
    Closed(u64),
}

/// All connections, by number.
pub(super) struct Daemons {
    all: HashMap<u64, Daemon>,
    /// The connection of each tunnel.
    of_tunnels: HashMap<u16, u64>,
    /// The connection of the engine that is to take the place of this one.
    successor: Option<u64>,
    /// From the connections' tasks to the manager.
    to_manager: mpsc::Sender<ConnectionEvent>,
    /// Number of the last connection.
    last: u64,
}

/// A connection, as the manager sees it.
struct Daemon {
    /// The process id of the peer; 0: unknown.
    pid: u32,
    /// Its tunnel, from the time on that the tunnel is handed to the workers.
    tunnel: Option<u16>,
    /// It has sent [`Request::Detach`].
    detaches: bool,
    /// To its task.
    events: mpsc::Sender<Event>,
    /// Tells its task to close it.
    close: Arc<Notify>,
}

impl Daemons {
    /// No connection yet. Their events are sent to `to_manager`.
    pub(super) fn new(to_manager: mpsc::Sender<ConnectionEvent>) -> Self {
        Self { all: HashMap::new(), of_tunnels: HashMap::new(), successor: None, to_manager, last: 0 }
    }

    /// Adds a new connection, and starts its task.
    pub(super) fn add(&mut self, connection: Connection) {
        self.last += 1;
        let (sender, events) = mpsc::channel(MAX_QUEUED_EVENTS);
        let pid = connection.peer().map_or(0, |peer| peer.pid.unsigned_abs());
        let close = Arc::new(Notify::new());
        self.all.insert(self.last, Daemon { pid, tunnel: None, detaches: false, events: sender, close: close.clone() });
        tokio::spawn(converse(self.last, connection, events, close, self.to_manager.clone()));
    }

    /// Forgets a connection that has closed; returns its tunnel, which is still to be [unassigned](Self::unassign), and whether the
    /// tunnel is to end with it.
    pub(super) fn remove(&mut self, connection: u64) -> Option<(u16, bool)> {
        let daemon = self.all.remove(&connection)?;
        self.successor.take_if(|successor| *successor == connection);
        Some((daemon.tunnel?, daemon.detaches))
    }

    /// The tunnel of a connection is to end with it.
    pub(super) fn set_detaches(&mut self, connection: u64) {
        if let Some(daemon) = self.all.get_mut(&connection) {
            daemon.detaches = true;
        }
    }

    /// Whether there is none, but that of an engine that is to take the place of this one.
    pub(super) fn is_empty(&self) -> bool {
        self.all.len() == usize::from(self.successor.is_some())
    }

    /// Whether there is an engine that is to take the place of this one.
    pub(super) fn has_successor(&self) -> bool {
        self.successor.is_some()
    }

    /// This connection is that of the engine that is to take the place of this one. One that was so before is dismissed.
    pub(super) fn set_successor(&mut self, connection: u64) {
        self.tell_successor(vec![Event::Dismissed]);
        self.successor = self.all.contains_key(&connection).then_some(connection);
    }

    /// Sends events to that engine, as fast as it reads.
    pub(super) fn tell_successor(&self, all: Vec<Event>) {
        if let Some(daemon) = self.successor.and_then(|successor| self.all.get(&successor)) {
            tokio::spawn(send_all(daemon.events.clone(), all));
        }
    }

    /// Dismisses the engine that is to take the place of this one, and waits until it has heard that.
    pub(super) async fn dismiss_successor(&self) {
        let Some(successor) = self.successor.and_then(|successor| self.all.get(&successor)) else { return };
        let dismiss = async {
            // It fails if its connection has closed.
            let _ = successor.events.send(Event::Dismissed).await;
            successor.events.closed().await;
        };
        if tokio::time::timeout(DISMISSAL_TIMEOUT, dismiss).await.is_err() {
            tracing::warn!("the engine that stands by does not end");
        }
    }

    /// The process behind a connection.
    pub(super) fn pid(&self, connection: u64) -> Option<u32> {
        Some(self.all.get(&connection)?.pid)
    }

    /// The tunnel of a connection.
    pub(super) fn tunnel_of(&self, connection: u64) -> Option<u16> {
        self.all.get(&connection)?.tunnel
    }

    /// Assigns a tunnel to a connection.
    pub(super) fn assign(&mut self, connection: u64, number: u16) {
        if let Some(daemon) = self.all.get_mut(&connection) {
            daemon.tunnel = Some(number);
            self.of_tunnels.insert(number, connection);
        }
    }

    /// Takes a tunnel from its connection.
    pub(super) fn unassign(&mut self, number: u16) {
        if let Some(daemon) = self.of_tunnels.remove(&number).and_then(|connection| self.all.get_mut(&connection)) {
            daemon.tunnel = None;
        }
    }

    /// Sends an event to a connection. If too many wait already, because it does not read, the event is lost; and if the event comes
    /// only once, the connection is closed, and its tunnel ends. Returns whether the event waits for the connection's task.
    pub(super) fn send(&self, connection: u64, event: Event) -> bool {
        let Some(daemon) = self.all.get(&connection) else { return false };
        let sent = daemon.events.try_send(event);
        let waits = sent.is_ok();
        match sent {
            Ok(()) => {}
            // Its task has ended, and the event of that is on its way.
            Err(TrySendError::Closed(_)) => {}
            Err(TrySendError::Full(event)) if comes_once(&event) => {
                tracing::warn!("control connection {connection} does not listen; it is closed");
                daemon.close.notify_one();
            }
            Err(TrySendError::Full(_)) => tracing::debug!("control connection {connection} does not listen"),
        }
        waits
    }

    /// Sends an event to the daemon of a tunnel. Returns whether it waits there.
    pub(super) fn tell(&self, number: u16, event: Event) -> bool {
        self.of_tunnels.get(&number).is_some_and(|connection| self.send(*connection, event))
    }

    /// Sends a line for the log of a tunnel's daemon, for the operator to look at.
    pub(super) fn notice(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: false });
    }

    /// Sends a line for the log of a tunnel's daemon that tells of nothing wrong.
    pub(super) fn news(&self, number: u16, message: String) {
        self.tell(number, Event::Notice { message, well: true });
    }

    /// Sends a status to the connection that asked for it, as fast as it reads.
    pub(super) fn report(&self, connection: u64, all: Vec<Status>) {
        if let Some(daemon) = self.all.get(&connection) {
            tokio::spawn(report(daemon.events.clone(), all));
        }
    }
}

/// Sends a status of any number of tunnels, as fast as its reader reads.
async fn report(events: mpsc::Sender<Event>, all: Vec<Status>) {
    let all = all.into_iter().map(|status| Event::Status(Box::new(status))).chain([Event::StatusEnd]);
    send_all(events, all).await;
}

async fn send_all(events: mpsc::Sender<Event>, all: impl IntoIterator<Item = Event>) {
    for event in all {
        // The reader has gone.
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Whether an event comes only once, so that a daemon that has lost it would wait for ever.
fn comes_once(event: &Event) -> bool {
    matches!(
        event,
        Event::Attached { .. }
            | Event::Failed { .. }
            | Event::DeviceDown
            | Event::DeviceLost
            | Event::Stop
            | Event::Dismissed
    )
}

/// Forwards the requests of one connection to the manager, and the manager's events to it. Sends [`ConnectionEvent::Closed`] at its
/// end.
async fn converse(
    number: u64,
    mut connection: Connection,
    mut events: mpsc::Receiver<Event>,
    close: Arc<Notify>,
    to_manager: mpsc::Sender<ConnectionEvent>,
) {
    let mut waiting = VecDeque::new();
    loop {
        tokio::select! {
            request = connection.receive(), if waiting.len() < MAX_WAITING_REQUESTS => match request {
                // Not by the manager: it may have the attaches of many tunnels before it.
                Ok(Some(Request::Beat)) => {
                    // A daemon that does not read has no need of it.
                    let _ = connection.send(&Event::Beat);
                }
                Ok(Some(request)) => waiting.push_back(request),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!("control connection {number}: {error}");
                    break;
                }
            },
            room = to_manager.reserve(), if !waiting.is_empty() => {
                let Ok(room) = room else { return };
                if let Some(request) = waiting.pop_front() {
                    room.send(ConnectionEvent::Request(number, request));
                }
            }
            () = close.notified() => break,
            event = events.recv() => {
                // The manager has forgotten the connection.
                let Some(event) = event else { return };
                if matches!(event, Event::Status(_) | Event::StatusEnd) {
                    let delivered = tokio::time::timeout(STATUS_TIMEOUT, connection.deliver(&event)).await;
                    match delivered {
                        // As below.
                        Ok(Ok(()) | Err(SendError::Closed)) => continue,
                        _ => break,
                    }
                }
                match connection.send(&event) {
                    // The requests that it sent before it closed are still to be read, such as the last message to its peer.
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
    let rest = waiting.into_iter().map(|request| ConnectionEvent::Request(number, request));
    for event in rest.chain([ConnectionEvent::Closed(number)]) {
        // It fails only when the manager has ended, which has no connections any more.
        if to_manager.send(event).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests;
