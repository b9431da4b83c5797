//! Packets on their way through a worker, as its stages pass them on.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;

use super::rounds::Inside;
use crate::cipher::Job;
use crate::engine::BATCH;
use crate::engine::carrier::outer::Marks;
use crate::engine::tunnel::Head;
use crate::engine::tunnel::keys::LiveKey;
use crate::inner::payload::PayloadHeaders;
use crate::wire::packet::{self, Type};
use crate::xsk::{Frame, Umem};

/// A payload on its way out.
pub struct Outgoing {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in.
    pub frame: Frame,
    /// Where the datagram stands in the chunk once it is sealed.
    pub datagram: Range<usize>,
    /// Payload octets.
    pub octets: usize,
    /// Data or control.
    pub kind: Type,
    /// Key to seal under; `None`: bare (`nokey`).
    pub slot: Option<Slot>,
    /// What its outer header says.
    pub marks: Marks,
    /// Encrypted, or bare by order; nothing else may be shipped.
    pub ready: bool,
    /// What was read of the payload; `None` for messages, and for fragments but the first.
    pub headers: Option<PayloadHeaders>,
    /// Tunnels whose datagrams it holds, if it does.
    pub inside: Option<Box<Inside>>,
}

impl Outgoing {
    /// The payload of `octets` octets stands at `at` in the chunk, with room before and behind it.
    pub fn new(
        tunnel: u16,
        frame: Frame,
        at: usize,
        octets: usize,
        kind: Type,
        slot: Option<Slot>,
        marks: Marks,
    ) -> Self {
        let datagram = match slot {
            Some(_) => at - packet::IV..at - packet::IV + packet::sealed_len(octets),
            None => at..at + octets,
        };
        Self { tunnel, frame, datagram, octets, kind, slot, marks, ready: slot.is_none(), headers: None, inside: None }
    }

    /// What is now to be encrypted, and what its first block is chained to.
    pub fn framed<'a>(&'a mut self, umem: &'a Umem) -> ([u8; packet::IV], &'a mut [u8]) {
        self.ready = true;
        let (iv, data) = umem.chunk_mut(&mut self.frame)[self.datagram.clone()].split_at_mut(packet::IV);
        (std::array::from_fn(|i| iv[i]), data)
    }
}

/// A datagram of ours on its way in.
pub struct Incoming {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in.
    pub frame: Frame,
    /// Where the datagram stands in the chunk.
    pub datagram: Range<usize>,
    /// Who sent it.
    pub from: SocketAddr,
    /// TOS or traffic class of its header.
    pub tos: u8,
    /// IV and first cipher block as on the wire.
    pub head: Head,
    /// Key to open it under; `None`: bare (`nokey`).
    pub slot: Option<Slot>,
}

impl Incoming {
    /// What is to be decrypted, and what its first block is chained to.
    pub fn sealed<'a>(&'a mut self, umem: &'a Umem) -> ([u8; packet::IV], &'a mut [u8]) {
        let data = &mut umem.chunk_mut(&mut self.frame)[self.datagram.clone()][packet::IV..];
        (iv_of(&self.head), data)
    }
}

/// An opened inner packet or frame.
pub(super) struct Delivery {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in, until that is handed on.
    pub frame: Option<Frame>,
    /// Where it stands in the chunk: a packet, or in protocol 4 a whole frame.
    pub inner: Range<usize>,
    /// What was read of it.
    pub headers: PayloadHeaders,
}

impl Delivery {
    /// The octets of the inner packet; none if its frame was handed on.
    pub(super) fn octets<'a>(&'a self, umem: &'a Umem) -> &'a [u8] {
        let chunk = self.frame.as_ref().map_or(&[][..], |frame| umem.chunk(frame));
        chunk.get(self.inner.clone()).unwrap_or_default()
    }
}

/// What a cipher does for the packets that have a key; `parts` tells IV and blocks of one.
pub(super) fn jobs<'a, T: 'a>(
    packets: impl Iterator<Item = (&'a mut T, Option<&'a Arc<LiveKey>>)>,
    parts: impl Fn(&'a mut T) -> ([u8; 8], &'a mut [u8]),
) -> ArrayVec<Job<'a>, BATCH> {
    let job = |(packet, live): (&'a mut T, Option<&'a Arc<LiveKey>>)| {
        let key = &live?.key;
        let (iv, data) = parts(packet);
        Some(Job { key, iv, data })
    };
    packets.filter_map(job).collect()
}

fn iv_of(head: &Head) -> [u8; packet::IV] {
    std::array::from_fn(|i| head[i])
}
