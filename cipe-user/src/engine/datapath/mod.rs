//! The packet path of a worker, without descriptors: frames of the private side in, sealed datagrams out; datagrams of the
//! carrier in, opened packets out.
//!
//! ```text
//! frames ──> admission ──> seal ──────────────> Outgoing ──> a door of the carrier
//!            (check, cut)  (IV, pad, CRC, cipher)
//! device <── delivery <── judge <── decrypt <── Incoming <── Arrival
//!            (coalesce)   (CRC, replay, ECN)    (classify)
//! ```
//!
//! The headers of a packet are read once each way: in the admission, and in the judgement on what was decrypted. What was read
//! goes along with it ([`PayloadHeaders`](crate::inner::payload::PayloadHeaders)).
//!
//! [`Datapath`] knows frames, keys and tunnels; no socket and no epoll. Its time is [`Datapath::now`], which whoever calls it sets;
//! only a question to a peer bears the time of day. Of descriptors it touches those by which workers wake each other to share
//! cipher work ([`Crew`]); one of no workers has none. So tests, fuzzers and benchmarks run it without a kernel. The worker around
//! it does the I/O. Each frame that is handed in is handed on, or is the pool's again; each packet that is dropped is counted
//! under one verdict of its tunnel, but for those of a tunnel that has gone, which took its counters along, and for a frame whose
//! end never came.

mod admission;
mod control;
mod crew;
mod delivery;
mod ethernet;
mod frames;
mod inbound;
mod looped;
mod opener;
mod outbound;
mod outlet;
mod packets;
#[cfg(any(test, feature = "harness"))]
pub mod pair;
mod recent;
mod rounds;
mod table;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::bucket::Bucket;
use super::carrier::SegmentationChange;
use super::carrier::outer::Marks;
use super::lan::Exits;
use super::random::Random;
use super::report::{Reports, WorkerReport};
use super::tunnel::{Opened, Tunnel};
use crate::cipher::Lanes;
use crate::control::protocol::{Event, Wanted};
use crate::engine::BATCH;
use crate::inner::coalesce::Coalescer;
use crate::inner::headers::Headers;
use crate::inner::too_big;
use crate::xsk::{Pool, Umem};

pub(super) use control::ControlMessage;
pub(super) use crew::Crew;
pub(super) use outlet::{Device, Devices, Injected};
pub(super) use packets::Outgoing;
pub(super) use table::TunnelTable;

use cipe_common::Verdict;
use packets::{Delivery, Incoming};
use rounds::Targets;
use table::Addresses;

/// Outer header of our own messages.
pub(super) const OWN: Marks = Marks { tos: 0, ttl: 64, dont_fragment: false };

/// The packet path of one worker.
pub struct Datapath {
    /// The memory of all frames.
    pub umem: Umem,
    /// Free frames.
    pub pool: Pool,
    /// The tunnels, by number.
    pub tunnels: TunnelTable<Tunnel>,
    /// What goes straight out of LAN cards.
    pub exits: Exits,
    /// The time of the batch at hand.
    pub now: Instant,
    /// What senders of inner packets are to be told.
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
    /// Whose the arrivals of a batch are.
    owners: Vec<Option<u16>>,
    incoming: Vec<Incoming>,
    opened: Vec<Result<Opened, Verdict>>,
    deliveries: Vec<Delivery>,
}

impl Datapath {
    /// Without tunnels, with the frames of `pool`, for worker `number` of `crew`.
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
            reports,
            lanes: Lanes::new(),
            random: Random::new()?,
            addresses: Addresses::default(),
            targets: Targets::default(),
            coalescer: Coalescer::default(),
            owners: Vec::with_capacity(BATCH),
            incoming: Vec::with_capacity(BATCH),
            opened: Vec::with_capacity(BATCH),
            deliveries: Vec::with_capacity(BATCH),
        })
    }

    /// Random octets, such as for the mark of a question.
    pub fn draw<const N: usize>(&mut self) -> [u8; N] {
        self.random.octets()
    }

    /// Gives a carrier address to a tunnel; one that had it before has it no longer.
    pub fn add_address(&mut self, address: SocketAddr, number: u16) {
        self.addresses.insert(address, number);
        self.targets.set_port(number, address.port());
    }

    /// Takes a carrier address back.
    pub fn remove_address(&mut self, address: &SocketAddr) {
        self.addresses.remove(address);
    }

    /// Does cipher work that other workers have too much of.
    pub fn help(&mut self) {
        self.crew.help(self.number, &self.umem, &mut self.lanes);
    }

    /// Has the log tell of a change in how datagrams leave. If the queue is full, the status has it still.
    pub fn note_change(&self, number: u16, change: SegmentationChange) {
        let (message, well) = change.notice();
        self.note(number, message, well);
    }

    /// Has the daemon log something. If the queue is full, the line is missing, and the counters tell.
    fn note(&self, number: u16, message: String, well: bool) {
        let _ = self.reports.try_send((number, WorkerReport::Event(Event::Notice { message, well })));
    }
}

/// Answers to packets that are larger than their tunnel takes, as many as may be sent.
pub struct TooBig {
    bucket: Bucket,
    messages: Vec<too_big::TooBigMessage>,
}

impl TooBig {
    /// Has the sender of `packet` told that it is larger than `mtu` octets, if it may be told, and not too often.
    fn tell(&mut self, packet: &[u8], headers: &Headers, mtu: usize, now: Instant) {
        let message = too_big::TooBigMessage::too_big(packet, headers, mtu).filter(|_| self.bucket.take(now));
        self.messages.extend(message);
    }

    /// The messages since the last call.
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

#[cfg(test)]
mod tests;
