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
use crate::sealed;
use crate::wire::packet::{self, Type};
use crate::xsk::{Frame, Umem};

/// How a payload leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As it is: without encryption (`nokey`), or already encrypted.
    Whole,
    /// As a packet of protocol 3 or 4, under the key in this slot.
    Keyed(Slot),
    /// As a sealed packet (docs/SEALED.md).
    Sealed,
}

impl Form {
    /// Octets in front of the payload.
    pub fn headroom(self) -> usize {
        match self {
            Self::Whole => 0,
            Self::Keyed(_) => packet::IV,
            Self::Sealed => sealed::packet::HEADROOM,
        }
    }

    /// Returns the place of the datagram with a payload of `octets` octets at `at`.
    pub fn datagram(self, at: usize, octets: usize) -> Range<usize> {
        let length = match self {
            Self::Whole => octets,
            Self::Keyed(_) => packet::sealed_len(octets),
            Self::Sealed => octets + sealed::packet::OVERHEAD,
        };
        let start = at - self.headroom();
        start..start + length
    }

    /// Returns the slot of its key.
    pub fn slot(self) -> Option<Slot> {
        match self {
            Self::Keyed(slot) => Some(slot),
            Self::Whole | Self::Sealed => None,
        }
    }
}

/// Octets of a datagram that identify it, as nobody can guess them.
pub(crate) const IDENTITY: usize = 8;

/// Returns the octets that identify a datagram: the IV; of a sealed one, octets 8 to 15. `None` if it is too short.
pub(crate) fn identity(datagram: &[u8]) -> Option<[u8; IDENTITY]> {
    let at = if sealed::packet::is_sealed(datagram) { sealed::packet::HEADER } else { 0 };
    datagram.get(at..)?.first_chunk().copied()
}

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
    /// How it leaves.
    pub form: Form,
    /// Fields of the outer header.
    pub marks: Marks,
    /// The payload is encrypted, or needs no encryption. Only then may it be sent.
    pub ready: bool,
    /// Headers of the payload; `None` for messages, and for fragments other than the first.
    pub headers: Option<PayloadHeaders>,
    /// Tunnels whose datagrams it holds; `None` if there are none.
    pub inside: Option<Box<Inside>>,
    /// The address that it is sent to, if that is not the peer's: a candidate for it. Such a datagram is a message.
    pub to: Option<Box<SocketAddr>>,
}

impl Outgoing {
    /// Returns a payload of `octets` octets at `at` in the chunk, which has room for the rest of the datagram around it.
    pub fn new(tunnel: u16, frame: Frame, at: usize, octets: usize, kind: Type, form: Form, marks: Marks) -> Self {
        let (datagram, ready) = (form.datagram(at, octets), form == Form::Whole);
        Self { tunnel, frame, datagram, octets, kind, form, marks, ready, headers: None, inside: None, to: None }
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
