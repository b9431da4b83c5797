//! The status of a tunnel, for `cipe show` and its JSON.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Cipher, Protocol, Unsealed};
use crate::sealed::cipher::Suite;

/// Status of one tunnel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Interface name.
    pub device: String,
    /// [`Attach::name`](super::Attach::name).
    #[serde(default)]
    pub name: String,
    /// Seconds since its daemon has gone without a word; `None`: it has a daemon.
    #[serde(default)]
    pub orphaned_seconds: Option<u64>,
    /// The kind of packets that it carries.
    #[serde(default)]
    pub protocol: Protocol,
    /// Cipher.
    pub cipher: Cipher,
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's carrier address, if known.
    pub peer: Option<SocketAddr>,
    /// Key slots that hold a live key: `static`, `send`, `receive`, `previous`.
    pub keys: Vec<String>,
    /// Age of each of these keys in seconds.
    #[serde(default)]
    pub key_seconds: std::collections::BTreeMap<String, u64>,
    /// The use of sealed packets; `None`: they are dropped.
    #[serde(default)]
    pub sealed: Option<SealedStatus>,
    /// Packets by verdict, without zeros.
    pub verdicts: std::collections::BTreeMap<String, u64>,
    /// Payload octets sent and delivered.
    pub octets: (u64, u64),
    /// The doors and modes in use.
    pub doors: Vec<String>,
    /// What the kernel lacks, and the effect; one line each.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// The work of each worker thread, by number.
    #[serde(default)]
    pub workers: Vec<WorkerShare>,
}

/// Sealed packets of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedStatus {
    /// The use of other packets.
    pub unsealed: Unsealed,
    /// The AEAD of the send key; `None`: there is no send key.
    pub suite: Option<Suite>,
    /// Age of the send key in seconds.
    pub send_seconds: Option<u64>,
    /// Counter of the next packet under the send key.
    pub send_counter: Option<u64>,
    /// Age of each receive key in seconds, the newest first.
    pub receive_seconds: Vec<u64>,
}

/// The work of one worker thread for a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerShare {
    /// Packets sent.
    pub sent: u64,
    /// Packets delivered.
    pub delivered: u64,
    /// Packets of any tunnel that it encrypted or decrypted for another, overloaded worker.
    pub helped: u64,
}
