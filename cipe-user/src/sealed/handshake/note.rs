//! What an operator may want to know of handshakes.

use std::time::Duration;

use super::super::cipher::Suite;

/// An event that may interest an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    /// A session was confirmed.
    #[error("sealed by {suite}, after {} ms", after.as_millis())]
    Sealed {
        /// Its AEAD.
        suite: Suite,
        /// Since the first message was sent or came.
        after: Duration,
    },
    /// An attempt had no answer.
    #[error("no answer to a handshake for {} s; is the peer up, and does it have the same static key?", after.as_secs())]
    NoAnswer {
        /// Since its first message.
        after: Duration,
    },
    /// The peer has taken a time stamp that is newer than ours.
    #[error(
        "the peer knows a newer time stamp than this clock's; it was set back, here or at a former peer: going on from there"
    )]
    ClockBehind,
    /// The peer's tunnel carries the other kind of payload.
    #[error("one end's tunnel carries IP packets and the other's Ethernet frames; run the same kind at both ends")]
    OtherKind,
    /// A message with our own id.
    #[error(
        "a handshake message of our own came back: somebody reflects it, or the peer's state file is a copy of ours (`cipe forget`)"
    )]
    Reflected,
}
