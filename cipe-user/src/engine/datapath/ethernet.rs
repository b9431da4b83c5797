//! The private side of Ethernet tunnels (protocol 4): whole frames, from the tunnel's own pair and to it.

use std::io::IoSlice;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::packets::Delivery;
use super::{Endpoint, Hub, Worker, admission, want};
use crate::engine::carrier::outer::ETHERNET;
use crate::inner::coalesce::{Coalescer, MAX_SEGMENTS, Run, VNET_HEADER};
use crate::inner::ethernet::{Frame, ip_of};
use crate::inner::headers::Version;
use crate::inner::mss;
use crate::xsk::{Packet, Pool, Umem};

/// Octets of a VLAN tag, which the kernel lets a frame have beyond the MTU.
const TAG: usize = 4;

impl Worker {
    /// Seals and sends the frames that were received from the pair of a tunnel; they end here if that has gone.
    pub(super) fn take_out_frames(&mut self, of: Option<u16>) {
        let mut received = std::mem::take(&mut self.received);
        let endpoint = of.and_then(|number| self.endpoints.get_mut(&number));
        if let Some(Endpoint { tunnel, .. }) = endpoint {
            tunnel.warm(Slot::Send);
            tunnel.keys.refresh(self.now);
            // A frame in several pieces is larger than any that is taken; it counts at its last piece.
            let mut is_cut = false;
            for piece in received.drain(..) {
                let was_cut = std::mem::replace(&mut is_cut, piece.more);
                let admitted = match (was_cut, piece.more) {
                    (false, false) => {
                        admission::frame(tunnel, &self.umem, piece, &mut self.outgoing, &mut self.pool, &mut self.icmp)
                    }
                    (_, more) => {
                        self.pool.put(piece.frame);
                        if more { Ok(()) } else { Err(Verdict::TooBig) }
                    }
                };
                if let Err(verdict) = admitted {
                    tunnel.counters.count(verdict);
                    let wanted = (verdict == Verdict::NoSendKey).then(|| tunnel.want_send_key(self.now)).flatten();
                    if let Some(reason) = wanted {
                        want(&self.reports, tunnel, reason);
                    }
                }
            }
        }
        received.drain(..).for_each(|piece| self.pool.put(piece.frame));
        self.received = received;
        self.send_outgoing();
    }
}

/// Hands the opened frames of one tunnel to its device: runs of segments in frames of one header as superframes, the rest one by
/// one, as they came.
pub fn deliver(
    hub: &mut Hub,
    endpoint: &Endpoint,
    umem: &Umem,
    pool: &mut Pool,
    coalescer: &mut Coalescer,
    batch: &mut [Delivery],
) {
    if endpoint.tunnel.clamp_mss {
        let mtu = endpoint.tunnel.mtu.of(Version::V4);
        for delivery in &mut *batch {
            let (Some(frame), place) = (&mut delivery.frame, delivery.inner.clone()) else { continue };
            let octets = umem.chunk_mut(frame).get_mut(place).unwrap_or_default();
            mss::clamp(ip_of(octets), mtu);
        }
    }
    let header = |delivery: &Delivery| delivery.octets(umem).first_chunk::<ETHERNET>().copied();
    for alike in batch.chunk_by_mut(|a, b| header(a) == header(b)) {
        coalescer.clear();
        for delivery in &*alike {
            coalescer.push(Frame::parse(delivery.octets(umem)).and_then(|frame| frame.plain_ip()).unwrap_or_default());
        }
        for run in coalescer.runs() {
            if run.count() > 1 {
                inject(hub, endpoint, umem, pool, alike, &run);
            } else {
                for index in run.packets() {
                    transmit(hub, endpoint, umem, pool, &mut alike[index]);
                }
            }
        }
    }
}

/// Sends one frame where it stands.
fn transmit(hub: &mut Hub, endpoint: &Endpoint, umem: &Umem, pool: &mut Pool, delivery: &mut Delivery) {
    let Some(frame) = delivery.frame.take() else { return };
    let counters = &endpoint.tunnel.counters;
    let octets = delivery.inner.len();
    // The kernel would drop it without a word.
    if octets > ETHERNET + TAG + endpoint.tunnel.device_mtu {
        counters.count(Verdict::PrivateFull);
        return pool.put(frame);
    }
    let Some(port) = hub.ports.first_mut() else {
        // A pair that another engine made may have no queue for this worker.
        let whole = &umem.chunk(&frame)[delivery.inner.clone()];
        match hub.injector.send(&[IoSlice::new(&[0; VNET_HEADER]), IoSlice::new(whole)]) {
            Ok(()) => counters.delivered(octets),
            Err(_) => counters.count(Verdict::PrivateFull),
        }
        return pool.put(frame);
    };
    let packet = Packet { frame, offset: delivery.inner.start as u32, len: octets as u32, more: false };
    match port.transmit(packet, pool) {
        Ok(()) => counters.delivered(octets),
        Err(packet) => {
            counters.count(Verdict::PrivateFull);
            pool.put(packet.frame);
        }
    }
}

/// Sends a run of frames as one superframe; their frames stay.
fn inject(hub: &mut Hub, endpoint: &Endpoint, umem: &Umem, pool: &mut Pool, batch: &[Delivery], run: &Run<'_>) {
    // What waits in a port may belong to the same flow, and came before.
    for port in &mut hub.ports {
        port.flush(pool);
    }
    let (vnet, headers) = (run.vnet_header(ETHERNET), run.headers());
    let first = run.packets().next().map_or(&[][..], |index| batch[index].octets(umem));
    let mut pieces: ArrayVec<IoSlice<'_>, { MAX_SEGMENTS + 3 }> = ArrayVec::new();
    let ethernet = first.get(..ETHERNET).unwrap_or_default();
    pieces.extend([IoSlice::new(&vnet), IoSlice::new(ethernet), IoSlice::new(headers)]);
    for delivery in run.packets().map(|index| &batch[index]) {
        pieces.push(IoSlice::new(delivery.octets(umem).get(ETHERNET + headers.len()..).unwrap_or_default()));
    }
    let sent = hub.injector.send(&pieces);
    for delivery in run.packets().map(|index| &batch[index]) {
        match sent {
            Ok(()) => endpoint.tunnel.counters.delivered(delivery.inner.len()),
            Err(_) => endpoint.tunnel.counters.count(Verdict::PrivateFull),
        }
    }
}
