//! Messages of the control socket: each is one JSON object in a `SOCK_SEQPACKET` message of at most [`MAX_MESSAGE`]
//! octets.
//!
//! A connection attaches at most one tunnel and owns it. When the connection closes, the tunnel is removed if the daemon has
//! said so ([`Request::Detach`]) or does not want otherwise ([`Attach::stays`]); else it stays without a daemon, *orphaned*, and
//! drops everything.

mod attach;
mod sealed;
mod status;

use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::channel::Carries;
pub use super::secret::{KeyOctets, MessageOctets};
use crate::kernel::bpf::XdpMode;
use crate::kernel::hub::Hub;
pub use attach::{Attach, CarrierChoice, Cipher, Interface, Protocol, SessionKeys, Under};
pub use sealed::{AttachSealed, SealedEvent, SealedKey, SealedKeys, SealedRequest, SealedWanted, Unsealed};
pub use status::{SealedStatus, Status, WorkerShare};

/// Maximum octets of a message.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Changes whenever an older version would misread a message.
pub const VERSION: u32 = 6;

/// The version of an engine that does not state one ([`Event::Replaceable`]).
const fn unstated_version() -> u32 {
    4
}

/// Minimum device MTU in octets (RFC 791).
pub const MIN_MTU: u32 = 68;
/// Maximum device MTU in octets: it fits a frame of the engine with all headers.
pub const MAX_MTU: u32 = 3500;

/// A descriptor, which is sent beside a message, not in it. That of a tunnel's ledger: memory in which the engine records the use of the
/// keys, and which the daemon holds for the next engine.
#[derive(Clone, Debug)]
pub struct Descriptor(pub Arc<OwnedFd>);

impl PartialEq for Descriptor {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Descriptor {}

/// From daemon to engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Makes a tunnel; answered by [`Event::Attached`] or [`Event::Failed`].
    Attach(Box<Attach>),
    /// Installs a dynamic key for sending; data is sealed under it from the next packet on.
    SetSendKey {
        /// The new key.
        key: KeyOctets,
    },
    /// Installs a dynamic key for receiving; the previous one stays valid for `keep_ms` milliseconds.
    SetReceiveKey {
        /// The new key.
        key: KeyOctets,
        /// How long packets under the previous key are still accepted.
        keep_ms: u64,
    },
    /// Stops using the dynamic send key; data is sealed under the static key until the next one.
    DropSendKey,
    /// Replaces the limits of a send key, the spacing, and the use of the static key that [`Attach`] set, from the next packet
    /// on: a peer that runs this program can take more than an original.
    SetSendLimits {
        /// [`Attach::send_packets`].
        packets: u64,
        /// [`Attach::send_octets`].
        octets: u64,
        /// [`Attach::paced`].
        paced: bool,
        /// [`Attach::static_data`].
        static_data: bool,
    },
    /// Sends to the peer at this address from now on, as if the address had been learned: the peer's name resolves to a
    /// new address.
    SetPeer {
        /// Carrier address.
        peer: SocketAddr,
    },
    /// Sends and receives through the relay of a SOCKS5 server; `None` stops both. For a tunnel with [`Attach::socks`].
    SetRelay {
        /// The address where the server relays datagrams.
        relay: Option<SocketAddr>,
    },
    /// Asks whether another engine may take the place of this one; answered by [`Event::Replaceable`]. Needs no attached tunnel.
    Replace,
    /// The other engine is ready: this one ends at once, and leaves the control socket to it.
    Leave,
    /// Another engine is to stand by on this connection: it takes the place of this one if the connection closes without
    /// [`Event::Dismissed`]. Answered by [`Event::Replaceable`] or [`Event::Failed`]. Needs no attached tunnel.
    StandBy,
    /// Asks whether the engine still goes on; answered by [`Event::Beat`]. Needs no attached tunnel. Only for an engine that knows it
    /// ([`Event::Attached`]).
    Beat,
    /// The tunnel ends with this connection, also one with [`Attach::stays`].
    Detach,
    /// Ends the tunnels that an operator calls by this name, an interface's or a [`Attach::name`]; answered by
    /// [`Event::Ending`]. Needs no attached tunnel.
    End {
        /// The name.
        name: String,
    },
    /// Seals `payload` as a control packet (type 01) and sends it.
    SendControl {
        /// The message, before padding.
        payload: MessageOctets,
        /// The key to seal it under.
        under: Under,
        /// Whether it is the first NK_IND of a key. From here on, packets under the static key count as packets under
        /// that key, because an original counts them so.
        announces: bool,
    },
    /// Sends a control message in clear, by the UDP socket.
    SendClear {
        /// The whole datagram.
        datagram: MessageOctets,
        /// Carrier address of the receiver.
        to: SocketAddr,
    },
    /// Concerns sealed packets.
    Sealed(SealedRequest),
    /// Requests one [`Event::Status`] per tunnel, then [`Event::StatusEnd`]. Needs no attached tunnel.
    Status,
    /// Requests [`Event::Status`] of the attached tunnel, then [`Event::StatusEnd`].
    OwnStatus,
}

impl Carries for Request {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Attach(attach) => attach.ledger.as_ref().map(|ledger| ledger.0.as_fd()),
            _ => None,
        }
    }

    fn take_descriptor(&mut self, descriptor: OwnedFd) {
        if let Self::Attach(attach) = self {
            attach.ledger = Some(Descriptor(Arc::new(descriptor)));
        }
    }
}

impl Carries for Event {
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Attached { ledger: descriptor, .. } | Self::HubPart { descriptor, .. } => {
                descriptor.as_ref().map(|descriptor| descriptor.0.as_fd())
            }
            _ => None,
        }
    }

    fn take_descriptor(&mut self, descriptor: OwnedFd) {
        if let Self::Attached { ledger: place, .. } | Self::HubPart { descriptor: place, .. } = self {
            *place = Some(Descriptor(Arc::new(descriptor)));
        }
    }
}

/// Why a new key is needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// A packet was sent and there is no dynamic send key yet (or the key exchange has not ended).
    NoSendKey,
    /// The send key is old.
    Age,
    /// The send key has reached its limit of packets.
    Packets,
    /// The send key has reached its limit of octets.
    Octets,
    /// A packet came under a dynamic key that we do not have; the peer must make a new one (NK_REQ).
    NoReceiveKey,
    /// The receive key has reached its limit, or is too old; the peer must make a new one (NK_REQ).
    ReceiveKeySpent,
    /// For a while, no packet under a dynamic key could be opened: each end may have a key that the other one lacks.
    Undecryptable,
}

/// A part of a hub.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HubPart {
    /// The link of the program on its visible end.
    TcLink,
    /// The link of the program on its hidden end.
    XdpLink,
    /// An AF_XDP socket of one of its queues. Another engine holds it until the death of this one, and then closes it: the kernel takes
    /// long for that, and otherwise would do it before anybody notices the death.
    Queue,
    /// A packet socket on its hidden end, which is held for the same reason.
    Injector,
}

/// From engine to daemon.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// The tunnel is up.
    Attached {
        /// Interface name.
        device: String,
        /// Own carrier address as bound.
        me: SocketAddr,
        /// The modes in use, for the log, such as `wire0: native XDP, copy mode, 1 queue`.
        notes: Vec<String>,
        /// Whether it goes on under the keys of [`Attach::resume`].
        #[serde(default)]
        resumed: bool,
        /// Whether the engine answers [`Request::Beat`].
        #[serde(default)]
        beats: bool,
        /// Whether it goes on writing in [`Attach::ledger`].
        #[serde(default)]
        keeps_ledger: bool,
        /// The ledger, for the daemon to hold.
        #[serde(skip)]
        ledger: Option<Descriptor>,
    },
    /// Another engine may take the place of this one, if it suits its tunnels.
    Replaceable {
        /// The [`VERSION`] of this engine and its daemons.
        #[serde(default = "unstated_version")]
        version: u32,
        /// Whether this engine stays when its last tunnel has ended.
        stay: bool,
        /// The largest MTU of a tunnel, in octets.
        largest_mtu: u32,
        /// The number of workers that was asked for.
        workers: Option<usize>,
    },
    /// A part of a hub, for an engine that stands by or replaces this one ([`Request::StandBy`], [`Request::Replace`]).
    HubPart {
        /// Index of its hidden end.
        hidden: u32,
        /// What it is.
        part: HubPart,
        /// Its descriptor.
        #[serde(skip)]
        descriptor: Option<Descriptor>,
    },
    /// A hub whose parts have been sent.
    Hub {
        /// The hub.
        hub: Hub,
        /// The mode in which its programs are attached.
        mode: XdpMode,
    },
    /// A hub has gone.
    HubGone {
        /// Index of its hidden end.
        hidden: u32,
    },
    /// All hubs that there are have been sent.
    HubsTold,
    /// The engine goes on.
    Beat,
    /// An engine that stands by is to be started ([`Request::StandBy`]).
    StandbyWanted,
    /// The engine ends, and nobody needs another one: the one that stands by is to end as well.
    Dismissed,
    /// The last request failed; the message says what failed, where, and how to fix it.
    Failed {
        /// One line.
        message: String,
    },
    /// A control packet was opened.
    Control {
        /// The message.
        payload: MessageOctets,
        /// Where it came from.
        from: SocketAddr,
        /// Whether it was under the static key.
        under_static: bool,
        /// Whether it was a sealed packet.
        #[serde(default)]
        sealed: bool,
    },
    /// Concerns sealed packets.
    Sealed(SealedEvent),
    /// A control message in clear came. Anybody may have sent it; if there are many, only some are passed on.
    Clear {
        /// The whole datagram.
        datagram: MessageOctets,
        /// Where it came from.
        from: SocketAddr,
    },
    /// A new key is needed.
    KeyWanted {
        /// Why.
        reason: Wanted,
    },
    /// The peer's address was learned, or has changed to this one.
    NewPeer {
        /// Its carrier address.
        peer: SocketAddr,
    },
    /// The own carrier address has changed ([`Attach::dynip`]), or is known for the first time.
    NewMe {
        /// Own carrier address.
        me: SocketAddr,
        /// The former address; unspecified: none.
        before: SocketAddr,
    },
    /// The network reported an error (ICMP) that quotes one of our packets.
    NetworkError {
        /// One line.
        message: String,
        /// Whether an authentic packet has come from the peer since the last such report.
        #[serde(default)]
        heard: bool,
    },
    /// A message that the operator should see once.
    Notice {
        /// One line.
        message: String,
        /// Whether the notice is good news. False if the engine does not send the field.
        #[serde(default)]
        well: bool,
    },
    /// The interface was taken down or deleted.
    DeviceDown,
    /// The interface has gone with its hub. Only told of a tunnel with [`Attach::stays`].
    DeviceLost,
    /// An operator ends the tunnel ([`Request::End`]).
    Stop,
    /// These tunnels end, by interface.
    Ending {
        /// Interfaces.
        devices: Vec<String>,
    },
    /// The interface has been renamed.
    Renamed {
        /// The new name.
        device: String,
    },
    /// Status of one tunnel.
    Status(Box<Status>),
    /// No more tunnels.
    StatusEnd,
}
