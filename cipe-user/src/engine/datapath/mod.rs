//! The packet path of a worker, without descriptors. It turns frames of the private side into sealed datagrams, and datagrams of
//! the carrier into opened packets.
//!
//! ```text
//! frames ──> admission ──> seal ──────────────> Outgoing ──> a door of the carrier
//!            (check, cut)  (IV, pad, CRC, cipher)
//! device <── delivery <── judge <── decrypt <── Incoming <── Arrival
//!            (coalesce)   (CRC, replay, ECN)    (classify)
//! ```
//!
//! The headers of a packet are read once in each direction: at admission, and after decryption. The result stays with the packet
//! ([`PayloadHeaders`](crate::inner::payload::PayloadHeaders)).
//!
//! [`Datapath`] knows frames, keys and tunnels, but no socket and no epoll: the worker around it does the I/O. Its caller sets the
//! time, [`Datapath::now`]; only a ping to a peer reads the system clock. The only descriptors are those by which workers wake each
//! other to share work ([`Crew`]), and a crew of no workers has none. So tests, fuzzers and benchmarks run it without a kernel.
//!
//! Each frame that comes in is passed on or returned to the pool. Each dropped packet is counted under one verdict of its tunnel.
//! There are two exceptions: packets of a tunnel that was removed with its counters, and a frame whose last piece never came.

mod admission;
mod control;
mod crew;
mod delivery;
mod ethernet;
mod frames;
mod held;
mod inbound;
mod looped;
mod moves;
mod opener;
mod outbound;
mod outlet;
mod packets;
#[cfg(any(test, feature = "harness"))]
pub mod pair;
mod recent;
mod rounds;
mod sealed;
mod suspicion;
mod table;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::bucket::Bucket;
use super::carrier::outer::Marks;
use super::carrier::{Authentic, SegmentationChange};
use super::lan::Exits;
use super::random::Random;
use super::report::{Reports, WorkerReport};
use super::tunnel::{Opened, Tunnel};
use crate::cipher::Lanes;
use crate::control::protocol::{Event, SealedEvent, SealedWanted, Wanted};
use crate::engine::BATCH;
use crate::inner::coalesce::Coalescer;
use crate::inner::headers::Headers;
use crate::inner::too_big;
use crate::xsk::{Pool, Umem};

pub(super) use control::ControlMessage;
pub(super) use crew::Crew;
pub(super) use outlet::{Device, Devices, Injected};
pub(super) use packets::{Form, IDENTITY, Outgoing, identity};
pub(super) use table::TunnelTable;

use cipe_common::Verdict;
use held::HeldFrames;
use moves::Moves;
use packets::{Delivery, Incoming};
use rounds::Targets;
use sealed::Cookie;
use suspicion::Suspicion;
use table::Addresses;

/// Fields of the outer header of our own messages.
pub(super) const OWN: Marks = Marks { tos: 0, ttl: 64, dont_fragment: false };

/// The packet path of one worker.
pub struct Datapath {
    /// The memory of all frames.
    pub umem: Umem,
    /// Free frames.
    pub pool: Pool,
    /// The tunnels, by number.
    pub tunnels: TunnelTable<Tunnel>,
    /// Routes of the short cut to LAN cards.
    pub exits: Exits,
    /// The time of the batch at hand.
    pub now: Instant,
    /// Messages to senders of inner packets that are too large.
    pub too_big: TooBig,
    /// Number of the worker.
    number: usize,
    crew: Arc<Crew>,
    reports: Reports,
    lanes: Lanes,
    random: Random,
    addresses: Addresses,
    targets: Targets,
    coalescer: Coalescer,
    /// The tunnel of each arrival of a batch.
    owners: Vec<Option<u16>>,
    incoming: Vec<Incoming>,
    opened: Vec<Result<Opened, Verdict>>,
    suspicion: Suspicion,
    /// The messages in clear of a batch that came too fast, and the tunnel of the last one.
    refused_in_clear: Option<(usize, u16)>,
    /// When a flood was reported last.
    flood_reported: Option<Instant>,
    authentic: Authentic,
    deliveries: Vec<Delivery>,
    moves: Moves,
    /// Answers with cookies that are to be sent.
    cookies: Vec<Cookie>,
    /// Sealed packets of a batch that were tried.
    tried: usize,
    held: HeldFrames,
}

impl Datapath {
    /// Returns a datapath without tunnels for worker `number` of `crew`, with the frames of `pool`.
    ///
    /// # Errors
    /// If the kernel has no random octets.
    pub fn new(number: usize, crew: Arc<Crew>, umem: Umem, pool: Pool, reports: Reports) -> anyhow::Result<Self> {
        let now = Instant::now();
        Ok(Self {
            umem,
            pool,
            tunnels: TunnelTable::default(),
            exits: Exits::default(),
            now,
            too_big: TooBig { bucket: Bucket::new(now), messages: Vec::new() },
            number,
            crew,
            moves: Moves::new(number, reports.clone()),
            cookies: Vec::new(),
            tried: 0,
            held: HeldFrames::default(),
            reports,
            lanes: Lanes::new(),
            random: Random::new()?,
            addresses: Addresses::default(),
            targets: Targets::default(),
            coalescer: Coalescer::default(),
            owners: Vec::with_capacity(BATCH),
            incoming: Vec::with_capacity(BATCH),
            opened: Vec::with_capacity(BATCH),
            suspicion: Suspicion::new(now),
            refused_in_clear: None,
            flood_reported: None,
            authentic: Authentic::default(),
            deliveries: Vec::with_capacity(BATCH),
        })
    }

    /// Returns random octets, such as for the mark of a ping.
    pub fn draw<const N: usize>(&mut self) -> [u8; N] {
        self.random.octets()
    }

    /// Assigns a carrier address to a tunnel. Another tunnel that had it loses it.
    pub fn add_address(&mut self, address: SocketAddr, number: u16) {
        self.addresses.insert(address, number);
        self.targets.set_port(number, address.port());
    }

    /// Removes a carrier address from its tunnel.
    pub fn remove_address(&mut self, address: &SocketAddr) {
        self.addresses.remove(address);
    }

    /// Returns the authentic datagrams since the last call.
    pub(in crate::engine) fn take_authentic(&mut self) -> Authentic {
        std::mem::take(&mut self.authentic)
    }

    /// Does cipher work that other workers lend.
    pub fn help(&mut self) {
        self.crew.help(self.number, &self.umem, &mut self.lanes);
    }

    /// Logs a change of segmentation. If the queue is full, the line is lost; the status still shows the change.
    pub fn note_change(&self, number: u16, change: SegmentationChange) {
        let (message, well) = change.notice();
        self.note(number, message, well);
    }

    /// Sends a line for the daemon to log. If the queue is full, the line is lost; the counters still show the event.
    fn note(&self, number: u16, message: String, well: bool) {
        let _ = self.reports.try_send((number, WorkerReport::Event(Event::Notice { message, well })));
    }
}

/// ICMP messages to senders of packets that are larger than their tunnel's MTU, with a rate limit.
pub struct TooBig {
    bucket: Bucket,
    messages: Vec<too_big::TooBigMessage>,
}

impl TooBig {
    /// Queues a message to the sender of `packet` that it is larger than `mtu` octets, if it may cause one and the rate
    /// limit allows it.
    fn tell(&mut self, packet: &[u8], headers: &Headers, mtu: usize, now: Instant) {
        let message = too_big::TooBigMessage::too_big(packet, headers, mtu).filter(|_| self.bucket.take(now));
        self.messages.extend(message);
    }

    /// Returns the messages since the last call.
    pub fn take(&mut self) -> impl Iterator<Item = too_big::TooBigMessage> {
        self.messages.drain(..)
    }
}

/// Asks the daemon for a key; if its queue is full, the next packet asks again.
fn want(reports: &Reports, tunnel: &Tunnel, reason: Wanted) {
    if reports.try_send((tunnel.number, WorkerReport::Event(Event::KeyWanted { reason }))).is_err() {
        tunnel.common.ask_again();
    }
}

/// Asks the daemon for a handshake, at a limited rate; if its queue is full, the next packet asks again. A tunnel that knows no address
/// of its peer waits for the peer to begin one.
fn want_handshake(reports: &Reports, tunnel: &Tunnel, reason: SealedWanted, now: Instant) {
    let Some(sealed) = tunnel.sealed.as_ref().filter(|_| tunnel.peer.is_some()) else { return };
    let event = Event::Sealed(SealedEvent::Wanted { reason });
    if sealed.shared.may_ask(reason, now) && reports.try_send((tunnel.number, WorkerReport::Event(event))).is_err() {
        sealed.shared.ask_again(reason);
    }
}

#[cfg(test)]
mod tests;
