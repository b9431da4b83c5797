//! What of the log lines may come again and again, and how important each note of the key exchange is.

use super::Level;
use crate::ciped::exchange::Note;

/// What is told again and again at the 1st, 2nd, 4th, 8th ... time.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Topic {
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
}

/// Of the notes, those that a dead peer or whoever replays packets can bring about again and again.
pub(super) fn topic(note: Note) -> Option<Topic> {
    match note {
        Note::ReusedKey => Some(Topic::ReusedKey),
        Note::NoAcknowledgement { .. } => Some(Topic::NoAcknowledgement),
        Note::NoIndication { .. } => Some(Topic::NoIndication),
        Note::NewSendKey { .. }
        | Note::NewReceiveKey
        | Note::PeerKeepsKeys
        | Note::Requested
        | Note::Forgotten
        | Note::StrayAcknowledgement => None,
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
