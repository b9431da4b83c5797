//! What of the log lines may come again and again, and how important each note of the key exchange is.

use super::Level;
use crate::ciped::exchange::Note;

/// What is told again and again at the 1st, 2nd, 4th, 8th ... time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::ciped) enum Topic {
    NewPeer,
    Stale,
    Unknown,
    PeerSays,
    Kill,
    NetworkError,
    ReusedKey,
    NoAcknowledgement,
    NoIndication,
    Mismatch,
    Unreadable,
    Forbidden,
    NewSendKey,
    NewReceiveKey,
    KeepsKeys,
    Requested,
    Forgotten,
    StrayAcknowledgement,
    PeerIsAt,
    PeerStaysAt,
    PeerNameLost,
}

/// What a note is about. A dead peer, one that asks for key after key, or whoever replays packets can bring about any of them
/// again and again.
pub(super) fn topic(note: Note) -> Topic {
    match note {
        Note::ReusedKey => Topic::ReusedKey,
        Note::NoAcknowledgement { .. } => Topic::NoAcknowledgement,
        Note::NoIndication { .. } => Topic::NoIndication,
        Note::NewSendKey { .. } => Topic::NewSendKey,
        Note::NewReceiveKey => Topic::NewReceiveKey,
        Note::PeerKeepsKeys => Topic::KeepsKeys,
        Note::Requested => Topic::Requested,
        Note::Forgotten => Topic::Forgotten,
        Note::StrayAcknowledgement => Topic::StrayAcknowledgement,
    }
}

/// How important a note is.
pub(super) fn level(note: Note) -> Level {
    match note {
        Note::ReusedKey | Note::NoAcknowledgement { .. } | Note::NoIndication { .. } => Level::Warning,
        Note::NewSendKey { .. } | Note::NewReceiveKey | Note::PeerKeepsKeys => Level::Info,
        Note::Requested | Note::Forgotten | Note::StrayAcknowledgement => Level::Debug,
    }
}
