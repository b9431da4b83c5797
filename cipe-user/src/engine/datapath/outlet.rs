//! Sends a tunnel's opened packets to a device, one by one or a run as a superframe.

use std::io::IoSlice;
use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use super::packets::Delivery;
use crate::engine::carrier::outer::{self, ETHERNET, Hop};
use crate::engine::lan::count_hop;
use crate::engine::tunnel::Tunnel;
use crate::inner::coalesce::{MAX_HEADERS, MAX_SEGMENTS, Run};
use crate::xsk::{Packet, Pool, Umem};

/// An egress device of opened packets: the hidden end of a hub or of an Ethernet tunnel's pair, or a LAN card.
pub trait Device {
    /// Transmits one frame in place, or returns it.
    ///
    /// # Errors
    /// The device has no room for the frame.
    fn transmit(&mut self, packet: Packet, umem: &Umem, pool: &mut Pool) -> Result<(), Packet>;

    /// Returns whether to send superframes with such IP headers.
    fn takes_superframes(&self, headers: &[u8], now: Instant) -> bool;

    /// Sends a superframe whose IP packet begins with `headers`. The pieces, joined, are in the form of an `AF_PACKET` socket with
    /// `PACKET_VNET_HDR`. Frames that were transmitted before leave before it.
    fn inject(&mut self, headers: &[u8], pieces: &[IoSlice<'_>], pool: &mut Pool, now: Instant) -> Injected;
}

/// The outcome of [`Device::inject`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Injected {
    /// The superframe was sent.
    Sent,
    /// The superframe was dropped, and its single packets would have been dropped too.
    Dropped,
    /// The superframe was not sent. The caller sends its packets one by one.
    Refused,
}

/// The devices of a worker.
pub trait Devices {
    /// The type of the devices.
    type Device: Device;

    /// Returns the hidden end in this slot.
    fn hub(&mut self, slot: usize) -> Option<&mut Self::Device>;

    /// Returns the LAN card in this slot.
    fn lan(&mut self, slot: usize) -> Option<&mut Self::Device>;
}

/// The link header of an inner packet on its device, and how the packet changes.
#[derive(Clone, Copy)]
pub(super) enum Link {
    /// An Ethernet header with these addresses.
    Hidden(Hop),
    /// An Ethernet header with these addresses. The TTL is decremented, as by a router.
    Lan(Hop),
    /// None, since the inner packet is a whole frame.
    Whole,
}

/// Sends packets of one tunnel to one device.
pub(super) struct Outlet<'a, D> {
    pub(super) device: &'a mut D,
    pub(super) tunnel: &'a Tunnel,
    pub(super) link: Link,
    pub(super) umem: &'a Umem,
    pub(super) pool: &'a mut Pool,
    pub(super) now: Instant,
}

impl<D: Device> Outlet<'_, D> {
    /// Sends a run as one superframe if the device takes it, else packet by packet.
    pub(super) fn send(&mut self, batch: &mut [Delivery], run: &Run<'_>) {
        if run.count() == 1 || !self.inject(batch, run) {
            for index in run.packets() {
                self.transmit(&mut batch[index]);
            }
        }
    }

    /// Sends one packet in its own frame.
    pub(super) fn transmit(&mut self, delivery: &mut Delivery) {
        let Some(mut frame) = delivery.frame.take() else { return };
        let (start, end) = (delivery.inner.start, delivery.inner.end);
        let chunk = self.umem.chunk_mut(&mut frame);
        let offset = match self.link {
            Link::Hidden(hop) | Link::Lan(hop) => {
                if matches!(self.link, Link::Lan(_)) {
                    count_hop(&mut chunk[start..end]);
                }
                outer::write_ethernet(chunk, start, hop, chunk[start] >> 4 == 4);
                start - ETHERNET
            }
            Link::Whole => start,
        };
        let packet = Packet { frame, offset: offset as u32, len: (end - offset) as u32, more: false };
        match self.device.transmit(packet, self.umem, self.pool) {
            Ok(()) => self.tunnel.counters.delivered(end - start),
            Err(packet) => {
                self.tunnel.counters.count(Verdict::PrivateFull);
                self.pool.put(packet.frame);
            }
        }
    }

    /// Sends a run as one superframe and keeps its frames. Returns `false` if the device refused it and nothing was sent.
    fn inject(&mut self, batch: &[Delivery], run: &Run<'_>) -> bool {
        if !self.device.takes_superframes(run.headers(), self.now) {
            return false;
        }
        let vnet = run.vnet_header(ETHERNET);
        let first = run.packets().next().map_or(&[][..], |index| batch[index].octets(self.umem));
        let mut routed: ArrayVec<u8, MAX_HEADERS> = ArrayVec::new();
        let headers = match self.link {
            Link::Lan(_) => {
                routed.extend(run.headers().iter().copied().take(MAX_HEADERS));
                count_hop(&mut routed);
                &routed
            }
            Link::Hidden(_) | Link::Whole => run.headers(),
        };
        let (ethernet, skipped) = match self.link {
            Link::Hidden(hop) | Link::Lan(hop) => {
                (outer::ethernet(hop, headers.first().is_some_and(|o| o >> 4 == 4)), 0)
            }
            Link::Whole => (first.first_chunk().copied().unwrap_or_default(), ETHERNET),
        };
        let mut pieces: ArrayVec<IoSlice<'_>, { MAX_SEGMENTS + 3 }> = ArrayVec::new();
        pieces.extend([IoSlice::new(&vnet), IoSlice::new(&ethernet), IoSlice::new(headers)]);
        for delivery in run.packets().map(|index| &batch[index]) {
            let payload = delivery.octets(self.umem).get(skipped + headers.len()..);
            pieces.push(IoSlice::new(payload.unwrap_or_default()));
        }
        let injected = self.device.inject(run.headers(), &pieces, self.pool, self.now);
        let counters = &self.tunnel.counters;
        match injected {
            Injected::Sent => run.packets().for_each(|index| counters.delivered(batch[index].inner.len())),
            Injected::Dropped => counters.count_all(Verdict::PrivateFull, run.count() as u64),
            Injected::Refused => {}
        }
        injected != Injected::Refused
    }
}
