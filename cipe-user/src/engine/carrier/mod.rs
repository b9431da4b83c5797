//! Doors to the carrier network: a tunnel's own UDP socket, and the AF_XDP sockets of a carrier card.
//!
//! Knows datagrams, frames, sockets and outer headers; knows no keys. Imported by the tunnel and its worker.

mod door_stats;
mod inbox;
pub(super) mod losses;
mod options;
pub(super) mod outer;
mod segmentation;
pub(super) mod socks;
mod udp;
mod xdp;

use std::io;
use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use self::outer::{Hop, Marks};
use crate::xsk::{Frame, Pool, Umem};

pub(super) use door_stats::{Shows, Sight};
pub(super) use inbox::Inbox;
pub(super) use segmentation::{Ask, Segmentation, SegmentationChange};
pub(super) use udp::UdpCarrier;
pub(super) use xdp::{Traffic, XdpCarrier};

/// A door to the carrier network, as the worker that owns it uses it: a batch of datagrams a call, each in a UMEM frame.
pub(super) trait Door {
    /// Takes in what has arrived, and appends it to `arrivals`: `most` datagrams or, where they come as superframes, some more.
    /// Returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there is nothing; else that of a datagram sent earlier, whose details wait in a socket's error queue.
    fn receive(&mut self, most: usize, room: &mut Room<'_>, arrivals: &mut Vec<Arrival>) -> io::Result<bool>;

    /// Sends a group, and returns how many of it, from the front, were taken. All frames are the pool's again, or the
    /// kernel's.
    fn send(&mut self, group: Group, route: &GroupRoute, room: &mut Room<'_>) -> usize;
}

/// What a worker lends a door for a call.
pub(super) struct Room<'a> {
    /// The memory of all frames.
    pub umem: &'a Umem,
    /// Free frames.
    pub pool: &'a mut Pool,
    /// Where sockets receive before there is a frame for each datagram.
    pub inbox: &'a mut Inbox,
    /// What goes through UDP sockets.
    pub sight: &'a mut Sight,
}

/// A datagram from the carrier network.
pub struct Arrival {
    /// Own address that it was sent to; `None`: that of the tunnel whose socket got it.
    pub to: Option<SocketAddr>,
    /// Where it came from.
    pub from: SocketAddr,
    /// TOS or traffic class of its header.
    pub tos: u8,
    /// It came in fragments, which the kernel joined.
    pub was_joined: bool,
    /// Its frame, and where it stands in the chunk; or what it was dropped under.
    pub datagram: Result<(Frame, Range<usize>), Verdict>,
}

/// A datagram for the carrier network.
pub(super) struct Sealed {
    /// The frame that it is in, with room for headers before it.
    pub frame: Frame,
    /// Where it stands in the chunk.
    pub datagram: Range<usize>,
}

/// Datagrams that can leave in one call, with equal headers: of one size but for the last, which may be smaller, or of sizes
/// that change from one to the next; at most [`MAX_GROUP`] octets.
pub(super) type Group = ArrayVec<Sealed, MAX_DATAGRAMS>;

/// Datagrams of a group: as many as every kernel with UDP_SEGMENT cuts (`UDP_MAX_SEGMENTS`).
pub(super) const MAX_DATAGRAMS: usize = 64;

/// Most octets of a group: what the IPv4 length field can say, less IP and UDP headers, and a SOCKS5 header for each datagram.
pub(super) const MAX_GROUP: usize = 65_535 - 20 - 8 - MAX_DATAGRAMS * socks::HEADER;

/// Where a group goes, and what its outer headers say.
pub(super) struct GroupRoute {
    /// The peer, or the relay of a SOCKS5 server.
    pub to: SocketAddr,
    /// What such a relay wants in front of each datagram.
    pub relayed: Option<[u8; socks::HEADER]>,
    /// Type of service, TTL, DF.
    pub marks: Marks,
    /// UDP checksums over IPv4.
    pub checksum: bool,
    /// IPv4 identification of the first datagram; the next ones count on. A UDP socket leaves it to the kernel.
    pub ip_id: u16,
    /// The way there through AF_XDP; a UDP socket leaves that to the kernel too.
    pub path: Option<Path>,
}

/// A resolved way to the peer through an AF_XDP carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Path {
    /// Slot of the carrier in the worker.
    pub carrier: usize,
    /// Link-layer addresses.
    pub hop: Hop,
    /// Own carrier address.
    pub source: SocketAddr,
    /// Largest IP packet that the carrier takes, in octets.
    pub mtu: usize,
    /// What goes this way.
    pub share: Share,
}

/// What goes through a card, and how; the rest goes by the UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Share {
    /// All, by AF_XDP.
    All,
    /// Datagrams that would leave one a call, by AF_XDP: the card copies, and a UDP socket sends many a call for less.
    Alone,
    /// What leaves in numbers, as live frames ([`crate::kernel::bpf::LiveFrames`]); of the rest, what [`Share::Alone`] has.
    Many,
}
