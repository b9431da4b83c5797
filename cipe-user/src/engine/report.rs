//! Reports of workers to the control thread about a tunnel.

use std::net::SocketAddr;

use crate::control::protocol::Event;

/// A report about a tunnel.
#[derive(Debug)]
pub enum WorkerReport {
    /// An event for its daemon.
    Event(Event),
    /// The peer has another address; this worker uses it already.
    NewPeer {
        /// The new address.
        peer: SocketAddr,
        /// Number of the worker.
        worker: usize,
    },
    /// Many single frames arrive or leave by UDP sockets, the last of them by this tunnel's.
    SingleFrames,
    /// Many datagrams come that no key opens, the last of them to this tunnel.
    Flooded,
    /// Many datagrams leave by UDP sockets, the last of them by this tunnel's.
    ManySent,
}

/// The queue of reports: tunnel number and report. A worker never waits for space in it.
pub(super) type Reports = tokio::sync::mpsc::Sender<(u16, WorkerReport)>;
