//! Doors to the carrier network: a tunnel's own UDP socket, and the AF_XDP sockets of a carrier card.
//!
//! Knows datagrams, frames, sockets and outer headers, but no keys. Imported by the tunnel and its worker.

mod door_stats;
mod inbox;
pub(super) mod losses;
mod options;
pub mod outer;
mod segmentation;
pub mod socks;
mod udp;
mod xdp;

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use self::outer::{Hop, Marks};
use crate::xsk::{Frame, Pool, Umem};

pub(super) use door_stats::{Authentic, DoorHint, DoorStats};
pub(super) use inbox::Inbox;
pub(super) use segmentation::{Ask, Segmentation, SegmentationChange};
pub(super) use udp::UdpCarrier;
pub(super) use xdp::{Traffic, XdpCarrier};

/// A door to the carrier network, as used by the worker that owns it: a batch of datagrams per call, each in a UMEM
/// frame.
pub(super) trait Door {
    /// Receives `most` datagrams, or a few more if they come as superframes, and appends them to `arrivals`. Returns
    /// whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; otherwise the error of a datagram sent earlier, with details in the socket's
    /// error queue.
    fn receive(&mut self, most: usize, room: &mut Room<'_>, arrivals: &mut Vec<Arrival>) -> io::Result<bool>;

    /// Sends a group. Returns how many of it, from the front, were taken. All frames then belong to the pool or the
    /// kernel.
    fn send(&mut self, group: Group, route: &GroupRoute, room: &mut Room<'_>) -> usize;
}

/// The worker's resources that a door uses during a call.
pub(super) struct Room<'a> {
    /// The memory of all frames.
    pub umem: &'a Umem,
    /// Free frames.
    pub pool: &'a mut Pool,
    /// The buffers of UDP sockets, before each datagram gets a frame.
    pub inbox: &'a mut Inbox,
    /// The statistics of the UDP sockets.
    pub stats: &'a mut DoorStats,
}

/// A datagram from the carrier network.
pub struct Arrival {
    /// The own address that it was sent to; `None`: that of the tunnel that owns the socket.
    pub to: Option<SocketAddr>,
    /// Its source address.
    pub from: SocketAddr,
    /// TOS or traffic class of its header.
    pub tos: u8,
    /// Whether the kernel has reassembled it from fragments.
    pub was_joined: bool,
    /// How it came.
    pub via: Via,
    /// Its frame, and its range in the chunk; or the verdict if it was dropped.
    pub datagram: Result<(Frame, Range<usize>), Verdict>,
}

/// How a datagram came from the carrier network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// By an AF_XDP socket.
    Card,
    /// By a UDP socket, alone in its message.
    Alone,
    /// By a UDP socket, in a superframe.
    Superframe,
}

/// A datagram for the carrier network.
pub(super) struct Sealed {
    /// Its frame, with space for headers in front.
    pub frame: Frame,
    /// Its range in the chunk.
    pub datagram: Range<usize>,
}

/// Datagrams that can be sent in one call, with equal headers. Either all have one size, and the last may be smaller;
/// or each has another size than the one before. At most [`MAX_GROUP`] octets.
pub(super) type Group = ArrayVec<Sealed, MAX_DATAGRAMS>;

/// Maximum datagrams of a group: every kernel with UDP_SEGMENT supports as many (`UDP_MAX_SEGMENTS`).
pub(super) const MAX_DATAGRAMS: usize = 64;

/// Maximum octets of a group: the maximum of the IPv4 length field, less IP and UDP headers, and a SOCKS5 header for
/// each datagram.
pub(super) const MAX_GROUP: usize = 65_535 - 20 - 8 - MAX_DATAGRAMS * socks::HEADER;

/// The destination of a group, and the fields of its outer headers.
pub(super) struct GroupRoute {
    /// The peer, or the relay of a SOCKS5 server.
    pub to: SocketAddr,
    /// The header that the relay expects in front of each datagram.
    pub relayed: Option<[u8; socks::HEADER]>,
    /// Type of service, TTL, DF.
    pub marks: Marks,
    /// UDP checksums over IPv4.
    pub checksum: bool,
    /// IPv4 id of the first datagram; the next ones follow. With a UDP socket, the kernel chooses them.
    pub ip_id: u16,
    /// The path through AF_XDP; with a UDP socket, the kernel chooses it.
    pub path: Option<Path>,
}

/// A resolved path to the peer through an AF_XDP carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Slot of the carrier in the worker's table.
    pub carrier: usize,
    /// Link-layer addresses.
    pub hop: Hop,
    /// Own carrier address.
    pub source: SocketAddr,
    /// Maximum IP packet of the carrier, in octets.
    pub mtu: usize,
    /// Which datagrams use this path.
    pub share: Share,
}

/// Which datagrams a card sends, and how; the UDP socket sends the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All, by AF_XDP.
    All,
    /// By AF_XDP: datagrams that cannot be sent in a group. The card copies packets, so the UDP socket is faster for
    /// groups.
    Alone,
    /// Large batches, as live frames ([`crate::kernel::bpf::LiveFrames`]); for the rest as [`Share::Alone`].
    Many,
}
