//! The packet types that the stages of a worker pass on.

use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;

use super::rounds::Inside;
use crate::cipher::Job;
use crate::engine::BATCH;
use crate::engine::carrier::Via;
use crate::engine::carrier::outer::Marks;
use crate::engine::tunnel::Head;
use crate::engine::tunnel::keys::LiveKey;
use crate::inner::payload::PayloadHeaders;
use crate::wire::packet::{self, Type};
use crate::xsk::{Frame, Umem};

/// An outbound payload.
pub struct Outgoing {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in.
    pub frame: Frame,
    /// The place of the sealed datagram in the chunk.
    pub datagram: Range<usize>,
    /// Payload octets.
    pub octets: usize,
    /// Data or control.
    pub kind: Type,
    /// Key to seal with; `None`: no encryption (`nokey`).
    pub slot: Option<Slot>,
    /// Fields of the outer header.
    pub marks: Marks,
    /// The payload is encrypted, or needs no encryption (`nokey`). Only then may it be sent.
    pub ready: bool,
    /// Headers of the payload; `None` for messages, and for fragments other than the first.
    pub headers: Option<PayloadHeaders>,
    /// Tunnels whose datagrams it holds; `None` if there are none.
    pub inside: Option<Box<Inside>>,
    /// The address that it is sent to, if that is not the peer's: a candidate for it. Such a datagram is a message.
    pub to: Option<Box<SocketAddr>>,
}

impl Outgoing {
    /// Returns a payload of `octets` octets at `at` in the chunk, which has room for the IV before it and the padding behind it.
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
        let ready = slot.is_none();
        Self { tunnel, frame, datagram, octets, kind, slot, marks, ready, headers: None, inside: None, to: None }
    }

    /// Returns the IV and the octets to encrypt, and marks the payload as ready.
    pub fn framed<'a>(&'a mut self, umem: &'a Umem) -> ([u8; packet::IV], &'a mut [u8]) {
        self.ready = true;
        let (iv, data) = umem.chunk_mut(&mut self.frame)[self.datagram.clone()].split_at_mut(packet::IV);
        (std::array::from_fn(|i| iv[i]), data)
    }
}

/// An inbound datagram of a tunnel.
pub struct Incoming {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in.
    pub frame: Frame,
    /// The place of the datagram in the chunk.
    pub datagram: Range<usize>,
    /// Its source address.
    pub from: SocketAddr,
    /// TOS or traffic class of its outer header.
    pub tos: u8,
    /// IV and first cipher block, as received.
    pub head: Head,
    /// Key to open it with; `None`: no encryption (`nokey`).
    pub slot: Option<Slot>,
    /// How it came.
    pub via: Via,
}

impl Incoming {
    /// Returns the IV and the octets to decrypt.
    pub fn sealed<'a>(&'a mut self, umem: &'a Umem) -> ([u8; packet::IV], &'a mut [u8]) {
        let data = &mut umem.chunk_mut(&mut self.frame)[self.datagram.clone()][packet::IV..];
        (iv_of(&self.head), data)
    }
}

/// An opened inner packet or frame.
pub(super) struct Delivery {
    /// Its tunnel.
    pub tunnel: u16,
    /// The frame that it is in; `None` once the frame is passed on.
    pub frame: Option<Frame>,
    /// The place of the packet in the chunk; in protocol 4, of the whole frame.
    pub inner: Range<usize>,
    /// Its headers.
    pub headers: PayloadHeaders,
}

impl Delivery {
    /// Returns the octets of the inner packet; none if its frame was passed on.
    pub(super) fn octets<'a>(&'a self, umem: &'a Umem) -> &'a [u8] {
        let chunk = self.frame.as_ref().map_or(&[][..], |frame| umem.chunk(frame));
        chunk.get(self.inner.clone()).unwrap_or_default()
    }
}

/// Returns the cipher's jobs for the packets that have a key. `parts` returns the IV and the blocks of a packet.
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
