//! The daemons' connections, each a task of its own.

use std::time::Duration;

use tokio::sync::mpsc;

use crate::control::channel::SendError;
use crate::control::protocol::{Event, Request};
use crate::control::server::Connection;

/// How long the reader of a status may take for one tunnel's.
const STATUS: Duration = Duration::from_secs(5);

/// A connection, as the manager sees it.
pub struct Daemon {
    /// Its process.
    pub pid: u32,
    /// Its tunnel, once attached.
    pub tunnel: Option<u16>,
    /// To its task.
    pub events: mpsc::Sender<Event>,
}

/// Events that may wait for a connection's task; beyond, a daemon that does not read loses them.
pub const EVENTS: usize = 256;

/// What the connections' tasks tell the manager.
pub enum Said {
    /// A request of this connection's.
    Request(u64, Request),
    /// It has closed.
    Closed(u64),
    /// The losses of these tunnels are counted, for the status that it asked for.
    Counted(u64, Vec<u16>),
}

/// Hands over a whole status, however many tunnels it has, as fast as its reader reads.
pub async fn report(events: mpsc::Sender<Event>, all: Vec<Event>) {
    for event in all.into_iter().chain([Event::StatusEnd]) {
        // The reader has gone.
        if events.send(event).await.is_err() {
            return;
        }
    }
}

/// Carries the requests of one connection to the manager, and its events back.
pub async fn converse(
    number: u64,
    mut connection: Connection,
    mut events: mpsc::Receiver<Event>,
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
            event = events.recv() => {
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
                        if matches!(event, Event::Attached { .. } | Event::Failed { .. } | Event::DeviceDown) {
                            break;
                        }
                    }
                }
            }
        }
    }
    let _ = say.send(Said::Closed(number)).await;
}
