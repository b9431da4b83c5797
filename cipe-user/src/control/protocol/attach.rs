//! What a daemon states of its tunnel when it attaches it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{AttachSealed, Descriptor, KeyOctets};
use crate::kernel::bpf::XdpMode;

/// The dynamic keys of a tunnel whose engine has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionKeys {
    /// The send key.
    pub send: Option<KeyOctets>,
    /// The receive keys that the peer may still use, the newest first.
    pub receive: Vec<KeyOctets>,
    /// How long packets under a previous receive key are accepted, in milliseconds.
    pub keep_ms: u64,
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

/// The kind of packets that a tunnel carries.
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
    /// Its number, as in a configuration message (protocol section 3).
    pub const fn number(self) -> u8 {
        match self {
            Self::Ip => 3,
            Self::Ethernet => 4,
        }
    }

    /// Octets of a payload that the device's MTU does not include: an Ethernet header.
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
            other => Err(format!("{other} is not a protocol; 3 carries IP packets, 4 Ethernet frames")),
        }
    }
}

/// How datagrams reach the carrier network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CarrierChoice {
    /// Chosen by what the device supports.
    #[default]
    Auto,
    /// AF_XDP.
    Xdp,
    /// A UDP socket.
    Udp,
}

/// The key under which a message is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Under {
    /// The dynamic send key if there is one, else the static key.
    #[default]
    Live,
    /// The static key, which every peer has even if it has lost the others.
    Static,
    /// This dynamic key, which is no longer the send key.
    Retired(KeyOctets),
}

/// Configuration of the interface, as `ifconfig` sets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Whether the engine sets the addresses; else `ip-up` does.
    pub configure: bool,
    /// Metric of the routes that come with the addresses; 0 and 1 mean the kernel's default.
    pub metric: u32,
    /// Prefix length of the network around the peer's address on the tunnel that is routed into the tunnel; `None`:
    /// that address alone.
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

/// Everything that a tunnel needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// [`VERSION`](super::VERSION).
    pub version: u32,
    /// What the operator calls it: the name of its option file without the directories. Empty: nothing.
    #[serde(default)]
    pub name: String,
    /// Whether it stays when its connection closes without [`Request::Detach`](super::Request::Detach): its interface drops everything until a daemon
    /// of the same tunnel attaches, or [`Request::End`](super::Request::End).
    #[serde(default)]
    pub stays: bool,
    /// Interface to make, such as `cipcb0`; `None`: the first free one of `prefix`. An interface that a dead engine
    /// left is reused.
    pub device: Option<String>,
    /// `cipcb`, `cipci`, `cipdb` or `cipdi`.
    pub prefix: String,
    /// The kind of packets that it carries.
    pub protocol: Protocol,
    /// Cipher and word order.
    pub cipher: Cipher,
    /// The static key; `None`: `nokey`.
    pub key: Option<KeyOctets>,
    /// The file that keeps which packets under the static key were accepted, for the next engine; `None`: there is none.
    #[serde(default)]
    pub journal: Option<PathBuf>,
    /// Own address on the tunnel; unspecified: none.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel; unspecified: none.
    pub ptpaddr: IpAddr,
    /// Device MTU in octets.
    pub mtu: u32,
    /// The rest of the interface's configuration.
    pub interface: Interface,
    /// Own carrier address; if the address is unspecified or the port 0, the system chooses it.
    pub me: SocketAddr,
    /// Whether this host may get its own carrier address, or a route to the peer, later; nothing is sent until then.
    pub me_may_come: bool,
    /// The peer's carrier address; unspecified: it is learned.
    pub peer: SocketAddr,
    /// Never follow the peer to another carrier address.
    pub pin_peer: bool,
    /// Outer TTL; 0: the inner packet's.
    pub cttl: u8,
    /// Whether to send UDP checksums over IPv4.
    pub checksum: bool,
    /// Whether to send the outer packet without DF, whatever the inner packet has.
    pub ignore_df: bool,
    /// Whether to ignore the carrier's path MTU.
    pub force_mtu: bool,
    /// Whether to clamp the MSS of TCP through the tunnel.
    pub mss_clamp: bool,
    /// Maximum microseconds that a worker busy-polls for the next packet; the largest value of all tunnels applies to
    /// all.
    pub busy_poll_us: u32,
    /// Whether data may be sent under the static key while there is no dynamic send key; otherwise it is held for up to a
    /// second, and then dropped.
    pub static_data: bool,
    /// Whether the own carrier address may change.
    pub dynip: bool,
    /// The SOCKS5 server on the path to the peer; the daemon speaks to it, and the carrier is then a UDP socket.
    pub socks: Option<SocketAddr>,
    /// Device that the carrier socket is bound to, by name.
    #[serde(default)]
    pub carrier_device: Option<String>,
    /// How datagrams reach the carrier network.
    pub carrier: CarrierChoice,
    /// Where XDP programs run.
    pub xdp_mode: XdpMode,
    /// Mark of the datagrams (SO_MARK), also in look-ups of their route; 0: none.
    pub mark: u32,
    /// LAN card whose packets to and from the tunnel bypass the kernel's forwarding (the short cut).
    pub lan: Option<String>,
    /// Whether to space transmitted packets: the peer may be an original, whose receive buffer is small.
    pub paced: bool,
    /// Packets under one send key before the engine requests a new one.
    pub send_packets: u64,
    /// Payload octets under one send key before the engine requests a new one.
    pub send_octets: u64,
    /// Packets under one receive key before the key is dropped; 0: never.
    pub receive_packets: u64,
    /// Lifetime of a send key in seconds before the engine requests a new one (tokey).
    pub send_seconds: u64,
    /// Minimum seconds between two [`Event::KeyWanted`](super::Event::KeyWanted) of one direction (tokxc).
    pub retry_seconds: u64,
    /// The tunnel is to go on under these keys, if the engine can read the ledger; else keys are exchanged anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume: Option<SessionKeys>,
    /// The use of sealed packets; `None`: they are dropped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sealed: Option<AttachSealed>,
    /// The ledger of the engine before this one.
    #[serde(skip)]
    pub ledger: Option<Descriptor>,
}
