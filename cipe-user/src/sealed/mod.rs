//! Sealed packets: the second kind of packet, between two of this program. docs/SEALED.md specifies it; sections here are its.
//!
//! It knows no sockets, no clocks and no files, and imports nothing of the program: everything is functions over slices and
//! atomics, and a state machine for the handshake.
//!
//! - [`packet`]: layout, sealing and opening in place; [`cipher`]: the two AEADs;
//! - [`counter`]: the counters of a key, for sending in ranges and for completing the low bits; [`window`]: each one once;
//! - [`direction`]: the two halves of a session as the engine uses them;
//! - [`secrets`]: all that is derived from the static key; [`noise`]: the handshake pattern; [`message`]: layout of its messages;
//! - [`gate`]: which handshake messages a worker passes on; [`handshake`]: the state machine behind it.

pub mod cipher;
pub mod counter;
pub mod direction;
pub mod gate;
pub mod handshake;
pub mod message;
mod noise;
pub mod packet;
pub mod secrets;
#[cfg(test)]
mod vectors;
pub mod window;

use serde::{Deserialize, Serialize};

/// Why a sealed datagram is dropped. Each is one verdict (section 11).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refused {
    /// Too short for a packet, or not the length of its kind of message.
    BadLength,
    /// Its epoch names no key.
    NoKey,
    /// The tag or the MAC does not verify.
    BadTag,
    /// Authentic, and below the window.
    TooOld,
    /// Authentic, and taken before; of a first message: its time stamp is not newer.
    Replayed,
    /// A handshake message of our own.
    Reflected,
    /// A type that is not defined.
    BadType,
    /// A message that is not valid, or of a tunnel of the other kind.
    BadMessage,
    /// A first message without a cookie, under load.
    NoCookie,
}
