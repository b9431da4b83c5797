//! Messages of the control socket: one JSON object a `SOCK_SEQPACKET` message, at most [`MAX_MESSAGE`] octets.
//!
//! A connection attaches at most one tunnel and owns it: when it closes, the tunnel goes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Largest message in octets.
pub const MAX_MESSAGE: usize = 16 * 1024;

/// Changes whenever an older peer would misread a message.
pub const VERSION: u32 = 4;

/// Smallest device MTU in octets: RFC 791's minimum.
pub const MIN_MTU: u32 = 68;
/// Largest device MTU in octets: what fits a frame of the engine with all headers.
pub const MAX_MTU: u32 = 3500;

/// 16 key octets, as hexadecimal text on the socket. Never in Debug output.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct KeyOctets(pub [u8; 16]);

impl std::fmt::Debug for KeyOctets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KeyOctets(..)")
    }
}

impl Serialize for KeyOctets {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(self.0))
    }
}

impl<'de> Deserialize<'de> for KeyOctets {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let mut octets = [0; 16];
        hex::decode_to_slice(&*text, &mut octets)
            .map_err(|_| serde::de::Error::custom("a key is 32 hexadecimal digits"))?;
        Ok(Self(octets))
    }
}

/// Cipher of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cipher {
    /// Blowfish (`ciped-cb`).
    Blowfish,
    /// IDEA, big-endian words (`ciped-ci`).
    Idea,
    /// IDEA, little-endian words (`idea_words=little`).
    IdeaLittle,
}

/// What a tunnel carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub enum Protocol {
    /// Protocol 3: IP packets.
    #[default]
    Ip,
    /// Protocol 4: whole Ethernet frames.
    Ethernet,
}

impl Protocol {
    /// Its number, which a configuration message tells (protocol section 3).
    pub const fn number(self) -> u8 {
        match self {
            Self::Ip => 3,
            Self::Ethernet => 4,
        }
    }

    /// Octets of a payload that the MTU of the device does not count: an Ethernet header.
    pub const fn header(self) -> usize {
        match self {
            Self::Ip => 0,
            Self::Ethernet => 14,
        }
    }
}

impl From<Protocol> for u8 {
    fn from(protocol: Protocol) -> Self {
        protocol.number()
    }
}

impl TryFrom<u8> for Protocol {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        match number {
            3 => Ok(Self::Ip),
            4 => Ok(Self::Ethernet),
            other => Err(format!("{other} is no protocol; 3 carries IP packets, 4 Ethernet frames")),
        }
    }
}

/// How datagrams get to and from the carrier network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Carrier {
    /// By what the device shows.
    #[default]
    Auto,
    /// AF_XDP.
    Xdp,
    /// A UDP socket.
    Udp,
}

/// Where XDP programs run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// Native where the driver has it, else generic.
    #[default]
    Auto,
    /// In the driver, or not at all.
    Native,
    /// In the stack.
    Generic,
}

/// The key that a message is sealed under.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Under {
    /// The dynamic send key if there is one, else the static key.
    #[default]
    Live,
    /// The static key, which every peer has, whatever else it has lost.
    Static,
    /// This dynamic key, which is the send key no longer.
    Retired(KeyOctets),
}

/// From daemon to engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "request")]
pub enum Request {
    /// Makes a tunnel; answered by [`Event::Attached`] or [`Event::Failed`].
    Attach(Box<Attach>),
    /// Installs a dynamic key for sending; data goes under it from the next packet on.
    SetSendKey {
        /// The new key.
        key: KeyOctets,
    },
    /// Installs a dynamic key for receiving; the one before it stays valid for `keep_ms` milliseconds.
    SetReceiveKey {
        /// The new key.
        key: KeyOctets,
        /// How long packets under the previous key are still taken.
        keep_ms: u64,
    },
    /// Stops using the dynamic send key; data goes under the static key until the next one.
    DropSendKey,
    /// Replaces what [`Attach`] set of a send key's limits and of spacing, from the next packet on: a peer of our own kind
    /// bears more than an original.
    SetSendLimits {
        /// [`Attach::send_packets`].
        packets: u64,
        /// [`Attach::send_octets`].
        octets: u64,
        /// [`Attach::paced`].
        paced: bool,
    },
    /// Sends to the peer at this address from now on, as if it had been learned there: its name resolves to another one.
    SetPeer {
        /// Carrier address.
        peer: SocketAddr,
    },
    /// Sends and receives through a SOCKS5 server's relay; without one, nothing. For a tunnel with [`Attach::socks`].
    SetRelay {
        /// Where the server relays datagrams.
        relay: Option<SocketAddr>,
    },
    /// Seals `payload` as a control packet (type 01) and sends it.
    SendControl {
        /// Message octets in hexadecimal, before padding.
        payload: String,
        /// The key to seal it under.
        under: Under,
        /// It is the first NK_IND of a key. Packets under the static key count as packets under that key from here on,
        /// since an original counts them so.
        announces: bool,
    },
    /// Sends a control message in clear, by the UDP socket.
    SendClear {
        /// The whole datagram in hexadecimal.
        datagram: String,
        /// Carrier address that it goes to.
        to: SocketAddr,
    },
    /// Asks for [`Event::Status`], one a tunnel, then [`Event::StatusEnd`]. Needs no attached tunnel.
    Status,
    /// Asks for [`Event::Status`] of the attached tunnel, then [`Event::StatusEnd`].
    OwnStatus,
}

/// Configuration of the interface for those who know what `ifconfig` does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Set the addresses; else `ip-up` does.
    pub configure: bool,
    /// Metric of the routes that come with the addresses; 0 and 1: the kernel's own.
    pub metric: u32,
    /// Bits of the network around the peer's address on the tunnel that is routed into it; `None`: the address alone.
    pub prefix: Option<u8>,
    /// Broadcast address.
    pub broadcast: Option<Ipv4Addr>,
    /// Ethernet address.
    pub mac: Option<[u8; 6]>,
}

impl Default for Interface {
    fn default() -> Self {
        Self { configure: true, metric: 0, prefix: None, broadcast: None, mac: None }
    }
}

/// What a tunnel needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// [`VERSION`].
    pub version: u32,
    /// Interface to make, such as `cipcb0`; `None`: the next free of `prefix`. One that a dead engine left is taken over.
    pub device: Option<String>,
    /// `cipcb`, `cipci`, `cipdb` or `cipdi`.
    pub prefix: String,
    /// What it carries.
    pub protocol: Protocol,
    /// Cipher and word order.
    pub cipher: Cipher,
    /// The static key; `None`: `nokey`.
    pub key: Option<KeyOctets>,
    /// Own address on the tunnel; unspecified: none.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel; unspecified: none.
    pub ptpaddr: IpAddr,
    /// Device MTU in octets.
    pub mtu: u32,
    /// How the interface is configured beside that.
    pub interface: Interface,
    /// Own carrier address; unspecified address and port 0: the system picks.
    pub me: SocketAddr,
    /// This host may get the own carrier address, or a way to the peer, later; till then nothing is sent.
    pub me_may_come: bool,
    /// The peer's carrier address; unspecified: learn it.
    pub peer: SocketAddr,
    /// Never re-point the peer.
    pub pin_peer: bool,
    /// Outer TTL; 0: the inner packet's.
    pub cttl: u8,
    /// Whether to send UDP checksums over IPv4.
    pub checksum: bool,
    /// Whether to send the outer packet without DF, whatever the inner one has.
    pub ignore_df: bool,
    /// Whether to ignore the carrier's path MTU.
    pub force_mtu: bool,
    /// Whether to clamp the MSS of TCP through the tunnel.
    pub mss_clamp: bool,
    /// Microseconds that a worker stays awake for the next packet at most; that of the tunnel that wants most counts for all.
    pub busy_poll_us: u32,
    /// Whether data may go under the static key while there is no dynamic send key; else it is held back or dropped.
    pub static_data: bool,
    /// Whether the own carrier address may change.
    pub dynip: bool,
    /// The SOCKS5 server that the peer is reached through, which the daemon speaks to; the carrier is then a UDP socket.
    pub socks: Option<SocketAddr>,
    /// Device that the carrier socket is bound to, by name.
    #[serde(default)]
    pub carrier_device: Option<String>,
    /// How to get to the carrier network.
    pub carrier: Carrier,
    /// Where XDP programs run.
    pub xdp_mode: XdpMode,
    /// Mark of the datagrams (SO_MARK), in look-ups of their route too; 0: none.
    pub mark: u32,
    /// LAN card whose packets go to the tunnel, and come from it, past the kernel's forwarding.
    pub lan: Option<String>,
    /// Whether to space what leaves: the peer may be an original, whose receive buffer is small.
    pub paced: bool,
    /// Packets under one send key before a new one is wanted.
    pub send_packets: u64,
    /// Payload octets under one send key before a new one is wanted.
    pub send_octets: u64,
    /// Packets under one receive key before it is forgotten; 0: never.
    pub receive_packets: u64,
    /// Seconds of a send key's life before a new one is wanted (tokey).
    pub send_seconds: u64,
    /// Least seconds between two key-wanted events of one direction (tokxc).
    pub retry_seconds: u64,
}

/// Why a new key is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Wanted {
    /// A packet was sent and there is no dynamic send key yet (or the exchange under way has not ended).
    NoSendKey,
    /// The send key is old.
    Age,
    /// The send key has sealed its share of packets.
    Packets,
    /// The send key has sealed its share of octets.
    Octets,
    /// A packet came under a dynamic key that we do not have; the peer must make one (NK_REQ).
    NoReceiveKey,
    /// The receive key is used up, or too old; the peer must make one (NK_REQ).
    ReceiveKeySpent,
    /// For a while, no packet under a dynamic key could be opened: both ends may have keys that the other one lacks.
    Undecryptable,
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
        /// Modes got, for the log, such as `wire0: native XDP, copy mode, 1 queue`.
        notes: Vec<String>,
    },
    /// The last request failed; says what, where and how to fix it.
    Failed {
        /// One line.
        message: String,
    },
    /// A control packet was opened.
    Control {
        /// Message octets in hexadecimal.
        payload: String,
        /// Where it came from.
        from: SocketAddr,
        /// Whether it was under the static key.
        under_static: bool,
    },
    /// A control message in clear came. Anybody may have sent it; of many, some are passed on.
    Clear {
        /// The whole datagram in hexadecimal.
        datagram: String,
        /// Where it came from.
        from: SocketAddr,
    },
    /// A new key is wanted.
    KeyWanted {
        /// Why.
        reason: Wanted,
    },
    /// The peer was learned at, or moved to, this address.
    NewPeer {
        /// Its carrier address.
        peer: SocketAddr,
    },
    /// The own carrier address is another one now ([`Attach::dynip`]), or known at last.
    NewMe {
        /// Own carrier address.
        me: SocketAddr,
        /// The one before; unspecified: none.
        before: SocketAddr,
    },
    /// The carrier reported an error (ICMP) for a packet of ours.
    NetworkError {
        /// One line.
        message: String,
    },
    /// Something the operator should see once.
    Notice {
        /// One line.
        message: String,
        /// Whether all is well with it. An engine that does not say so means that it is not.
        #[serde(default)]
        well: bool,
    },
    /// The interface was taken down or deleted.
    DeviceDown,
    /// The interface has another name.
    Renamed {
        /// The new one.
        device: String,
    },
    /// Status of one tunnel.
    Status(Box<Status>),
    /// No more tunnels.
    StatusEnd,
}

/// Status of one tunnel.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Interface name.
    pub device: String,
    /// What it carries.
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
    /// Seconds that each of them has been there.
    #[serde(default)]
    pub key_seconds: std::collections::BTreeMap<String, u64>,
    /// Packets by verdict, zeros left out.
    pub verdicts: std::collections::BTreeMap<String, u64>,
    /// Payload octets sent and delivered.
    pub octets: (u64, u64),
    /// Which doors and modes are in use.
    pub doors: Vec<String>,
    /// What the kernel lacks, and what that costs; one line each.
    #[serde(default)]
    pub lacks: Vec<String>,
    /// What each worker thread did, by number.
    #[serde(default)]
    pub workers: Vec<WorkerShare>,
}

/// What one worker thread did for a tunnel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerShare {
    /// Packets sent.
    pub sent: u64,
    /// Packets delivered.
    pub delivered: u64,
    /// Packets of any tunnel that it enciphered or deciphered for another worker, which had too many.
    pub helped: u64,
}
