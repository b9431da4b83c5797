//! Opened packets to the tunnel device: runs of TCP segments as one superframe, the rest in the frames where they stand. Those
//! that may take the short cut go straight out of a LAN card.

use std::io::IoSlice;
use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use rustix::io::Errno;

use super::lan::Lan;
use super::packets::Delivery;
use super::{Endpoint, Hub, Worker, ethernet};
use crate::control::protocol::Protocol;
use crate::engine::carrier::outer::{self, ETHERNET};
use crate::engine::lan::{self, Exit, Exits};
use crate::inner::coalesce::{MAX_SEGMENTS, Run, VNET_HEADER};
use crate::xsk::{Packet, Pool, Umem};

impl Worker {
    /// Hands all waiting deliveries to their tunnel devices.
    pub(super) fn deliver(&mut self) {
        for batch in self.deliveries.chunk_by_mut(|a, b| a.tunnel == b.tunnel) {
            let Some(endpoint) = self.endpoints.get_mut(&batch[0].tunnel) else { continue };
            let Some(Some(hub)) = self.hubs.get_mut(endpoint.hub) else {
                endpoint.tunnel.counters.count_all(Verdict::PrivateFull, batch.len() as u64);
                continue;
            };
            if endpoint.tunnel.protocol == Protocol::Ethernet {
                ethernet::deliver(hub, endpoint, &self.umem, &mut self.pool, &mut self.coalescer, batch);
                continue;
            }
            let mut left = 0;
            for delivery in &mut *batch {
                match way_out(&mut self.exits, &mut self.lans, &self.umem, delivery) {
                    Some((exit, lan)) if !lan.joins(delivery.octets(&self.umem), self.now) => {
                        lan.transmit(&exit, endpoint, &self.umem, &mut self.pool, delivery);
                    }
                    _ => left += 1,
                }
            }
            if left == 0 {
                continue;
            }
            self.coalescer.clear();
            for delivery in &*batch {
                self.coalescer.push(delivery.octets(&self.umem));
            }
            for run in self.coalescer.runs() {
                // Its packets have the addresses, the TTL and at most the length of the first.
                let first = run.packets().next().map(|index| &batch[index]);
                let exit = first.and_then(|first| way_out(&mut self.exits, &mut self.lans, &self.umem, first));
                if let Some((exit, lan)) = exit {
                    if run.count() == 1 || !lan.inject(&exit, endpoint, &self.umem, &mut self.pool, batch, &run) {
                        for index in run.packets() {
                            lan.transmit(&exit, endpoint, &self.umem, &mut self.pool, &mut batch[index]);
                        }
                    }
                    continue;
                }
                if run.count() == 1 || !inject(hub, endpoint, &self.umem, &mut self.pool, batch, &run, self.now) {
                    for index in run.packets() {
                        transmit(hub, endpoint, &self.umem, &mut self.pool, &mut batch[index]);
                    }
                }
            }
        }
        for frame in self.deliveries.drain(..).filter_map(|delivery| delivery.frame) {
            self.pool.put(frame);
        }
    }
}

/// The way of a packet straight out of a LAN card, if it has one.
fn way_out<'a>(
    exits: &mut Exits,
    lans: &'a mut [Option<Lan>],
    umem: &Umem,
    delivery: &Delivery,
) -> Option<(Exit, &'a mut Lan)> {
    if lans.is_empty() {
        return None;
    }
    let packet = delivery.octets(umem);
    let (source, destination) = lan::plain(packet)?;
    let exit = exits.find(delivery.tunnel, source, destination).filter(|exit| packet.len() <= exit.mtu)?;
    let lan = lans.get_mut(exit.slot)?.as_mut()?;
    Some((exit, lan))
}

/// Sends one packet in its own frame.
fn transmit(hub: &mut Hub, endpoint: &Endpoint, umem: &Umem, pool: &mut Pool, delivery: &mut Delivery) {
    let Some(mut frame) = delivery.frame.take() else { return };
    let chunk = umem.chunk_mut(&mut frame);
    let is_ipv4 = chunk[delivery.inner.start] >> 4 == 4;
    outer::write_ethernet(chunk, delivery.inner.start, endpoint.tunnel.private_hop, is_ipv4);
    let octets = delivery.inner.len();
    // A hub that another engine made may have no queue for this worker.
    let Some(port) = hub.ports.first_mut() else {
        let packet = &chunk[delivery.inner.start - ETHERNET..delivery.inner.end];
        match hub.injector.send(&[IoSlice::new(&[0; VNET_HEADER]), IoSlice::new(packet)]) {
            Ok(()) => endpoint.tunnel.counters.delivered(octets),
            Err(_) => endpoint.tunnel.counters.count(Verdict::PrivateFull),
        }
        return pool.put(frame);
    };
    let offset = (delivery.inner.start - ETHERNET) as u32;
    let packet = Packet { frame, offset, len: (octets + ETHERNET) as u32, more: false };
    match port.transmit(packet, pool) {
        Ok(()) => endpoint.tunnel.counters.delivered(octets),
        Err(packet) => {
            endpoint.tunnel.counters.count(Verdict::PrivateFull);
            pool.put(packet.frame);
        }
    }
}

/// Sends a run of packets as one superframe; their frames stay. `false` if the kernel does not take such superframes (those of
/// UDP before Linux 6.2), and nothing was sent.
fn inject(
    hub: &mut Hub,
    endpoint: &Endpoint,
    umem: &Umem,
    pool: &mut Pool,
    batch: &[Delivery],
    run: &Run<'_>,
    now: Instant,
) -> bool {
    if !hub.refusals.allow(run.headers(), now) {
        return false;
    }
    // What waits in a port may belong to the same flow, and came before.
    for port in &mut hub.ports {
        port.flush(pool);
    }
    let vnet = run.vnet_header(ETHERNET);
    let headers = run.headers();
    let ethernet = outer::ethernet(endpoint.tunnel.private_hop, headers.first().is_some_and(|first| first >> 4 == 4));
    let mut pieces: ArrayVec<IoSlice<'_>, { MAX_SEGMENTS + 3 }> = ArrayVec::new();
    pieces.extend([IoSlice::new(&vnet), IoSlice::new(&ethernet), IoSlice::new(headers)]);
    for delivery in run.packets().map(|index| &batch[index]) {
        let packet = delivery.octets(umem);
        pieces.push(IoSlice::new(packet.get(headers.len()..).unwrap_or_default()));
    }
    let sent = hub.injector.send(&pieces);
    if let Some((what, errno, wait)) = hub.refusals.take_in(run.headers(), sent, now) {
        let wait = wait.as_secs();
        tracing::debug!("{}: superframes of {what} refused: {errno}; single frames for {wait} s", hub.injector);
    }
    // A full queue drops single frames, too.
    if !matches!(sent, Ok(()) | Err(Errno::NOBUFS | Errno::AGAIN)) {
        return false;
    }
    for delivery in run.packets().map(|index| &batch[index]) {
        match sent {
            Ok(()) => endpoint.tunnel.counters.delivered(delivery.inner.len()),
            Err(_) => endpoint.tunnel.counters.count(Verdict::PrivateFull),
        }
    }
    true
}
