//! Follows the peers' addresses: asks an address that an authentic datagram came from whether the peer is there, and makes
//! it the peer's when that is proven ([`Challenge`](crate::engine::tunnel::challenge::Challenge)).

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use cipe_common::maps::Slot;

use super::rounds::Targets;
use crate::engine::report::{Reports, WorkerReport};
use crate::engine::tunnel::{Tunnel, challenge};
use crate::wire::clear::Clear;
use crate::wire::message::Message;

/// A question to an address where the peer of a tunnel may be now.
pub(super) struct Question {
    /// The tunnel.
    pub tunnel: u16,
    /// The address.
    pub to: SocketAddr,
    /// What the answer has to copy.
    pub mark: challenge::Mark,
    /// How long it may wait for a key.
    pub until: Instant,
}

/// How long a question may wait for the send key of the session that it is asked in: about as long as its answer is of use.
const MAX_QUESTION_WAIT: Duration = Duration::from_secs(2);

/// How long the key of a datagram lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyLife {
    /// There is no key (`nokey`).
    None,
    /// For ever: the static key. Recorded packets open after a restart.
    Static,
    /// For a session.
    Session,
}

impl From<Option<Slot>> for KeyLife {
    fn from(slot: Option<Slot>) -> Self {
        match slot {
            None => Self::None,
            Some(Slot::Static) => Self::Static,
            Some(_) => Self::Session,
        }
    }
}

/// Follows the peers of a worker's tunnels.
pub(super) struct Moves {
    /// The questions that are to be sent.
    pub questions: Vec<Question>,
    /// The queue to the control thread.
    reports: Reports,
    /// Number of the worker.
    worker: usize,
}

impl Moves {
    /// No question yet.
    pub(super) fn new(worker: usize, reports: Reports) -> Self {
        Self { questions: Vec::new(), reports, worker }
    }

    /// Handles the source of an authentic datagram that is not the peer's known address, or whose report is to be repeated.
    /// Without encryption, the first source of all is the peer: nothing is authentic there.
    pub(super) fn came_from(
        &mut self,
        tunnel: &mut Tunnel,
        from: SocketAddr,
        under: KeyLife,
        targets: &mut Targets,
        now: Instant,
    ) {
        match tunnel.peer {
            Some(peer) if peer == from => return self.report(tunnel),
            None if under == KeyLife::None => return self.move_to(tunnel, from, targets),
            None => tunnel.common.note_asker(from),
            Some(_) => {}
        }
        let mark = tunnel.common.challenge.ask(from, under == KeyLife::Session, now);
        self.questions.extend(mark.map(|mark| Question {
            tunnel: tunnel.number,
            to: from,
            mark,
            until: now + MAX_QUESTION_WAIT,
        }));
    }

    /// Makes an address the peer's.
    pub(super) fn move_to(&self, tunnel: &mut Tunnel, to: SocketAddr, targets: &mut Targets) {
        if tunnel.peer != Some(to) {
            tunnel.set_peer(to);
            tunnel.is_move_untold = true;
            targets.set(tunnel.number, tunnel.target());
        }
        self.report(tunnel);
    }

    /// Reports the peer's new address to the control thread, which sets up a faster path to it than the socket. If the queue
    /// is full, the next datagram repeats the report.
    fn report(&self, tunnel: &mut Tunnel) {
        if let Some(peer) = tunnel.peer.filter(|_| tunnel.is_move_untold) {
            let report = WorkerReport::NewPeer { peer, worker: self.worker };
            tunnel.is_move_untold = self.reports.try_send((tunnel.number, report)).is_err();
        }
    }
}

/// Whether a message proves that the peer is where it came from.
pub(super) fn is_proof(tunnel: &Tunnel, message: &[u8], from: SocketAddr, now: Instant) -> bool {
    match Message::parse(message) {
        Ok(Message::Pong(mark)) => tunnel.common.challenge.is_proof(mark, from, now),
        _ => false,
    }
}

/// The same for a datagram in clear, which proves it to a tunnel without encryption only.
pub(super) fn is_clear_proof(tunnel: &Tunnel, datagram: &[u8], from: SocketAddr, now: Instant) -> bool {
    let Clear::Pong(mark) = Clear::parse(datagram) else { return false };
    tunnel.nokey && tunnel.common.challenge.is_proof(mark, from, now)
}
