//! What workers tell the control thread of a tunnel.

use std::net::SocketAddr;

use crate::control::protocol::Event;

/// One such report.
#[derive(Debug)]
pub enum WorkerReport {
    /// For its daemon.
    Event(Event),
    /// Its peer is at another address than before, as this worker has seen and acts by.
    NewPeer {
        /// That address.
        peer: SocketAddr,
        /// Number of the worker.
        worker: usize,
    },
    /// Many single frames go through UDP sockets, the last of them through the tunnel's.
    SingleFrames,
    /// Much leaves by UDP sockets, the last of it by the tunnel's.
    ManySent,
}

/// Where workers tell: tunnel number and report. A worker never waits for room there.
pub(super) type Reports = tokio::sync::mpsc::Sender<(u16, WorkerReport)>;
