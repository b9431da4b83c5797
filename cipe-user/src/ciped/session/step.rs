//! What a session gets from an earlier daemon, and what it has the daemon do.

use std::net::SocketAddr;

use crate::ciped::exchange::TakenKeys;
use crate::control::protocol::Request;
use crate::sealed::handshake::Kept;

/// How important a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is wrong.
    Warning,
    /// Worth knowing.
    Info,
    /// Details.
    Debug,
}

/// The reason why the tunnel ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Somebody asked for it.
    Asked(String),
    /// Somebody has taken the interface down or away. The daemon ends as if it was asked to, but nobody has asked that private
    /// packets leave by another route.
    Down(String),
    /// The tunnel has to begin again.
    Again(String),
    /// Something is wrong.
    Failed(String),
}

/// What to do, in order. Not `Debug`: requests hold keys.
pub enum Step {
    /// Send a request to the engine.
    Send(Request),
    /// Log a line for the operator; it has no interface name.
    Log(Level, String),
    /// The peer's address has changed to this one.
    Peer(SocketAddr),
    /// Our address has changed to this one.
    Me(SocketAddr),
    /// The peer does not answer: if it was given by name, the name may have a new address.
    LookUpPeer,
    /// What is known of the peer does not fit: if somebody has asked to forget it, do.
    Forget,
    /// Keep this on disk before the next step.
    Keep(Kept),
    /// The peer does not answer where it is said to be: go back to its configured address.
    FallBack,
    /// Stop.
    End(End),
}

/// What an earlier daemon knew of the peer.
pub struct Past {
    /// The newest time stamp of its key exchange, in seconds since 1970.
    pub newest_stamp: Option<u32>,
    /// The keys that it has announced.
    pub taken: TakenKeys,
    /// Whether it runs this program.
    pub is_ours: bool,
    /// Of handshakes with it.
    pub sealed: Option<Kept>,
}
