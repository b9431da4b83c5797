//! What daemon and engine tell each other of sealed packets (docs/SEALED.md). The daemon has the handshake, the engine the packets.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{KeyOctets, MessageOctets};
use crate::sealed::Refused;
use crate::sealed::cipher::Suite;
use crate::sealed::packet::Epoch;

/// A key of one direction of a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedKey {
    /// Names the session; those of later sessions are greater.
    pub serial: u64,
    /// In the packets: of a receive key our number, of a send key the peer's.
    pub epoch: Epoch,
    /// The AEAD.
    pub suite: Suite,
    /// The key.
    pub key: KeyOctets<32>,
}

/// Whether a tunnel uses packets of protocol 3 or 4 beside sealed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsealed {
    /// Whether they are sent while there is no key for sealed ones.
    pub sends: bool,
    /// Whether they are accepted; if not, they are dropped as `unsealed`, data and control packets alike.
    pub accepts: bool,
}

/// The keys of a tunnel whose engine has ended. The engine uses each only if the ledger has its record.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedKeys {
    /// The send key, and the milliseconds until another one is wanted.
    pub send: Option<(SealedKey, u64)>,
    /// The receive keys, of different epochs.
    pub receive: Vec<SealedKey>,
}

/// How a tunnel uses sealed packets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachSealed {
    /// The use of other packets, at first.
    pub unsealed: Unsealed,
    /// The keys of the engine before this one. If not all of them can be used, none is, and the engine says
    /// [`SealedEvent::KeysLost`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<SealedKeys>,
}

impl AttachSealed {
    /// Whether it goes on with a send key.
    pub fn sends(&self) -> bool {
        self.resume.as_ref().is_some_and(|keys| keys.send.is_some())
    }
}

/// From daemon to engine, for a tunnel that was attached with [`AttachSealed`]. They are carried out in the order in which they come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "sealed")]
pub enum SealedRequest {
    /// Receives under this new key, too. It takes the place of one with the same epoch.
    Receive(SealedKey),
    /// Wipes the receive key with this serial.
    Forget {
        /// [`SealedKey::serial`].
        serial: u64,
    },
    /// Sends under this new key from now on.
    Send {
        /// The key.
        key: SealedKey,
        /// The age in milliseconds at which another key is wanted.
        renew_ms: u64,
    },
    /// Wipes the send key.
    StopSending,
    /// Replaces [`AttachSealed::unsealed`].
    Unsealed(Unsealed),
    /// Sends a control packet without content, under the send key.
    Confirm,
    /// Sends a handshake message.
    Transmit {
        /// The whole datagram.
        datagram: MessageOctets,
        /// Where to; `None`: to the peer.
        to: Option<SocketAddr>,
    },
    /// The handshake has judged a [`SealedEvent::Handshake`], so that it can be counted.
    Judged {
        /// Why it was dropped; `None`: it was taken.
        refused: Option<Refused>,
    },
}

/// Why a handshake is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealedWanted {
    /// Something is to be sent, and there is no key, or it is old or worn.
    Send,
    /// Sealed packets come that cannot be opened.
    Receive,
    /// Packets of protocol 3 come, which are not accepted.
    Unsealed,
}

/// From engine to daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "sealed")]
pub enum SealedEvent {
    /// A handshake is wanted. Not said of a tunnel that knows no address of its peer.
    Wanted {
        /// Why.
        reason: SealedWanted,
    },
    /// A handshake message with a right MAC came; answered by [`SealedRequest::Judged`].
    Handshake {
        /// The whole datagram.
        datagram: MessageOctets,
        /// Where it came from.
        from: SocketAddr,
        /// Whether that is the address that data goes to.
        from_peer: bool,
    },
    /// The first packet under a receive key has opened. May come again after another engine has taken over.
    Opened {
        /// [`SealedKey::serial`].
        serial: u64,
    },
    /// A control packet without content has opened.
    Probed {
        /// Of the receive key.
        serial: u64,
    },
    /// The keys of [`AttachSealed::resume`] are not used.
    KeysLost,
}
