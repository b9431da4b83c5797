//! The short cut of gateways: packets of a LAN card to the tunnels, and opened ones straight out of it.

use std::io::IoSlice;
use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use super::packets::Delivery;
use super::refusals::Refusals;
use super::{BATCH, Endpoint, Worker};
use crate::engine::carrier::outer::{self, ETHERNET};
use crate::engine::lan::{Exit, count_hop};
use crate::engine::port::{Port, Turns};
use crate::inner::coalesce::{MAX_SEGMENTS, Run, VNET_HEADER};
use crate::xsk::{Injector, Packet, Pool, Umem};

/// A LAN card with a short cut.
pub struct Lan {
    ports: Vec<Port>,
    turns: Turns,
    injector: Injector,
    /// Runs are worth joining: each frame is copied anyway, and one of many segments costs less.
    superframes: bool,
    refusals: Refusals,
}

/// The longest headers of a run.
const MAX_HEADERS: usize = 40 + 60;

impl Worker {
    /// Takes one batch from a LAN card, seals it and sends it; returns whether there may be more.
    pub(super) fn outbound_lan(&mut self, slot: usize) -> bool {
        let Some(Some(Lan { ports, turns, .. })) = self.lans.get_mut(slot) else { return false };
        let (_, more) =
            turns.take(ports.len(), BATCH, |port, most| ports[port].receive(&mut self.received, most, &mut self.pool));
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
        more
    }
}

impl Lan {
    /// With the sockets of this worker's queues, and another way out.
    pub fn new(ports: Vec<Port>, injector: Injector, superframes: bool) -> Self {
        Self { ports, turns: Turns::default(), injector, superframes, refusals: Refusals::default() }
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
    pub fn joins(&self, packet: &[u8], now: Instant) -> bool {
        self.superframes && self.refusals.allow(packet, now)
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
        if !self.superframes {
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
            let packet = delivery.octets(umem);
            pieces.push(IoSlice::new(packet.get(headers.len()..).unwrap_or_default()));
        }
        let sent = self.injector.send(&pieces);
        if let Some((what, errno, wait)) = self.refusals.take_in(run.headers(), sent, Instant::now()) {
            let wait = wait.as_secs();
            tracing::warn!("{}: superframes of {what} refused: {errno}; single frames for {wait} s", self.injector);
        }
        if sent.is_err() {
            return false;
        }
        for delivery in run.packets().map(|index| &batch[index]) {
            endpoint.tunnel.counters.delivered(delivery.inner.len());
        }
        true
    }
}
