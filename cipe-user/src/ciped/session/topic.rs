//! Which log lines may repeat, and how important each note of the key exchange is.

use super::Level;
use crate::ciped::exchange::Note;
use crate::ciped::sealing;
use crate::sealed::handshake;

/// A kind of log line that is written at the 1st, 2nd, 4th, 8th ... time only.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::ciped) enum Topic {
    NewPeer,
    Stale,
    Old,
    Unknown,
    PeerSays,
    Kill,
    NetworkError,
    LastCall,
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
    Sealed,
    SealedAgain,
    OnlySealed,
    KeysLost,
    NoAnswer,
    ClockBehind,
    OtherKind,
    Reflected,
    Overdue,
    Downgraded,
    Unsealed,
    SealedKey,
}

/// The topic of a note. Each note may repeat often: because of a dead peer, a peer that requests key after key, or
/// replayed packets.
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

/// The importance of a note.
pub(super) fn level(note: Note) -> Level {
    match note {
        Note::ReusedKey | Note::NoAcknowledgement { .. } | Note::NoIndication { .. } => Level::Warning,
        Note::NewSendKey { .. } | Note::NewReceiveKey | Note::PeerKeepsKeys => Level::Info,
        Note::Requested | Note::Forgotten | Note::StrayAcknowledgement => Level::Debug,
    }
}

/// The topic and the importance of a note about sealed packets.
pub(super) fn of_sealing(note: sealing::Note) -> (Topic, Level) {
    match note {
        sealing::Note::Handshake(note) => match note {
            handshake::Note::Sealed { .. } => (Topic::Sealed, Level::Info),
            handshake::Note::NoAnswer { .. } => (Topic::NoAnswer, Level::Warning),
            handshake::Note::ClockBehind => (Topic::ClockBehind, Level::Warning),
            handshake::Note::OtherKind => (Topic::OtherKind, Level::Warning),
            handshake::Note::Reflected => (Topic::Reflected, Level::Warning),
        },
        sealing::Note::Renewed(_) => (Topic::SealedAgain, Level::Debug),
        sealing::Note::OnlySealed => (Topic::OnlySealed, Level::Info),
        sealing::Note::KeysLost => (Topic::KeysLost, Level::Info),
        sealing::Note::Overdue => (Topic::Overdue, Level::Warning),
        sealing::Note::Downgraded => (Topic::Downgraded, Level::Warning),
        sealing::Note::Unsealed => (Topic::Unsealed, Level::Warning),
    }
}
