//! The short cut of gateways: packets of a LAN card to the tunnels, and opened ones straight out of it.

use std::io::IoSlice;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use super::delivery::Delivery;
use super::{BATCH, Endpoint, Worker};
use crate::engine::coalesce::{MAX_SEGMENTS, Run, VNET_HEADER};
use crate::engine::headers::TCP;
use crate::engine::lan::{Exit, count_hop};
use crate::engine::outer::{self, ETHERNET};
use crate::engine::port::Port;
use crate::xsk::{Injector, Packet, Pool, Umem};

/// A LAN card with a short cut.
pub struct Lan {
    ports: Vec<Port>,
    injector: Injector,
    /// Runs are worth joining: each frame is copied anyway, and one of many segments costs less.
    superframes: bool,
    /// Times in a row that it refused superframes of each [`kind`].
    refusals: [u8; KINDS],
}

/// Kinds of superframes that a card may or may not cut: TCP over IPv4, over IPv6, UDP.
const KINDS: usize = 3;

/// Refusals in a row after which it is the card that does not cut such superframes, not its queue that is full.
const ENOUGH: u8 = 8;

/// The longest headers of a run.
const MAX_HEADERS: usize = 40 + 60;

impl Worker {
    /// Takes one batch from a LAN card, seals it and sends it; returns the packets taken.
    pub(super) fn outbound_lan(&mut self, slot: usize) -> usize {
        let Some(Some(lan)) = self.lans.get_mut(slot) else { return 0 };
        let mut taken = 0;
        for port in &mut lan.ports {
            taken += port.receive(&mut self.received, BATCH, &mut self.pool);
        }
        for packet in &mut self.received {
            let frame = packet.data(&self.umem);
            let total = match frame.get(ETHERNET..) {
                Some([0x40..=0x4F, _, high, low, ..]) => usize::from(u16::from_be_bytes([*high, *low])),
                _ => continue,
            };
            // What follows is Ethernet's padding.
            packet.len = packet.len.min((ETHERNET + total) as u32);
        }
        self.take_out();
        taken
    }
}

impl Lan {
    /// With the sockets of this worker's queues, and another way out.
    pub fn new(ports: Vec<Port>, injector: Injector, superframes: bool) -> Self {
        Self { ports, injector, superframes, refusals: [0; KINDS] }
    }

    /// The sockets.
    pub fn ports(&mut self) -> impl Iterator<Item = &mut Port> {
        self.ports.iter_mut()
    }

    /// The sockets, to be closed.
    pub fn into_ports(self) -> Vec<Port> {
        self.ports
    }

    /// Whether packets like this one are worth joining: the card cuts such superframes itself.
    pub fn joins(&self, packet: &[u8]) -> bool {
        self.superframes && self.refusals[kind(packet)] < ENOUGH
    }

    /// Sends one opened packet out in its own frame.
    pub fn transmit(
        &mut self,
        exit: &Exit,
        endpoint: &Endpoint,
        umem: &Umem,
        pool: &mut Pool,
        delivery: &mut Delivery,
    ) {
        let Some(mut frame) = delivery.frame.take() else { return };
        let (start, octets) = (delivery.inner.start, delivery.inner.len());
        let chunk = umem.chunk_mut(&mut frame);
        count_hop(&mut chunk[delivery.inner.clone()]);
        outer::write_ethernet(chunk, start, exit.hop, chunk[start] >> 4 == 4);
        // A card may have fewer queues than there are workers.
        let Some(port) = self.ports.first_mut() else {
            let packet = &chunk[start - ETHERNET..delivery.inner.end];
            match self.injector.send(&[IoSlice::new(&[0; VNET_HEADER]), IoSlice::new(packet)]) {
                Ok(()) => endpoint.tunnel.counters.delivered(octets),
                Err(_) => endpoint.tunnel.counters.count(Verdict::PrivateFull),
            }
            return pool.put(frame);
        };
        let packet = Packet { frame, offset: (start - ETHERNET) as u32, len: (octets + ETHERNET) as u32, more: false };
        match port.transmit(packet, pool) {
            Ok(()) => endpoint.tunnel.counters.delivered(octets),
            Err(packet) => {
                endpoint.tunnel.counters.count(Verdict::PrivateFull);
                pool.put(packet.frame);
            }
        }
    }

    /// Sends a run of opened packets out as one superframe; their frames stay. `false` if the card does not take it, and
    /// nothing was sent.
    pub fn inject(
        &mut self,
        exit: &Exit,
        endpoint: &Endpoint,
        umem: &Umem,
        pool: &mut Pool,
        batch: &[Delivery],
        run: &Run<'_>,
    ) -> bool {
        let kind = kind(run.headers());
        if !self.superframes || self.refusals[kind] >= ENOUGH {
            return false;
        }
        // What waits in a port may belong to the same flow, and came before.
        for port in &mut self.ports {
            port.flush(pool);
        }
        let vnet = run.vnet_header(ETHERNET);
        let mut headers: ArrayVec<u8, MAX_HEADERS> = run.headers().iter().copied().take(MAX_HEADERS).collect();
        count_hop(&mut headers);
        let ethernet = outer::ethernet(exit.hop, headers.first().is_some_and(|first| first >> 4 == 4));
        let mut pieces: ArrayVec<IoSlice<'_>, { MAX_SEGMENTS + 3 }> = ArrayVec::new();
        pieces.extend([IoSlice::new(&vnet), IoSlice::new(&ethernet), IoSlice::new(&headers)]);
        for delivery in run.packets().map(|index| &batch[index]) {
            let packet = delivery.frame.as_ref().map_or(&[][..], |frame| &umem.chunk(frame)[delivery.inner.clone()]);
            pieces.push(IoSlice::new(packet.get(headers.len()..).unwrap_or_default()));
        }
        if self.injector.send(&pieces).is_err() {
            self.refusals[kind] += 1;
            return false;
        }
        self.refusals[kind] = 0;
        for delivery in run.packets().map(|index| &batch[index]) {
            endpoint.tunnel.counters.delivered(delivery.inner.len());
        }
        true
    }
}

/// Which of [`KINDS`] a superframe is, by its headers.
fn kind(headers: &[u8]) -> usize {
    match headers {
        [0x40..=0x4F, _, _, _, _, _, _, _, _, TCP, ..] => 0,
        [0x60..=0x6F, _, _, _, _, _, TCP, ..] => 1,
        _ => 2,
    }
}
