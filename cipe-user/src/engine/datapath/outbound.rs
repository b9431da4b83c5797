//! Private to carrier: taken in, padded, sealed in the frame that it came in or was cut into, and sent from there.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict};

use super::admission::{self, Pieces};
use super::crew::{Chunk, Packets};
use super::packets::{Outgoing, jobs};
use super::{BATCH, FRESH, Hub, Message, Worker, want};
use crate::control::protocol::Under;
use crate::engine::carrier::outer::Marks;
use crate::engine::carrier::socks;
use crate::kernel::bpf::Ends;
use crate::wire::packet::{self, KeyKind, Type};

/// Outer header of our own messages.
pub(super) const OWN: Marks = Marks { tos: 0, ttl: 64, dont_fragment: false };

impl Worker {
    /// Takes one batch from a hub, seals it and sends it; returns whether there may be more.
    pub(super) fn outbound(&mut self, hub: usize) -> bool {
        let Some(Some(Hub { ports, turns, ends, of, .. })) = self.hubs.get_mut(hub) else { return false };
        let (_, more) =
            turns.take(ports.len(), BATCH, |port, most| ports[port].receive(&mut self.received, most, &mut self.pool));
        match (*ends, *of) {
            (Ends::Hub, _) => self.take_out(),
            (Ends::Ethernet, of) => self.take_out_frames(of),
        }
        more
    }

    /// Seals and sends what was received from a private side.
    pub(super) fn take_out(&mut self) {
        let mut received = std::mem::take(&mut self.received);
        for piece in &received {
            // The later pieces of a superframe look like anything; what they seem to be stamped for is read for nothing.
            let stamp = piece.data(&self.umem).first_chunk().copied().and_then(Stamp::from_mac);
            if let Some(endpoint) = stamp.and_then(|stamp| self.endpoints.get(&stamp.tunnel)) {
                endpoint.tunnel.warm(Slot::Send);
            }
        }
        let mut pieces = ArrayVec::new();
        for piece in received.drain(..) {
            let last = !piece.more;
            if let Err(full) = pieces.try_push(piece) {
                // More than the largest frame has: only a kernel of another build sends that.
                self.pool.put(full.element().frame);
            }
            if last {
                self.admit(&mut pieces);
            }
        }
        self.received = received;
        self.send_outgoing();
    }

    /// Takes in one private frame of one or more pieces: a packet to seal, or several to cut it into.
    fn admit(&mut self, pieces: &mut Pieces) {
        let mac = pieces.first().and_then(|first| first.data(&self.umem).first_chunk().copied());
        let number = mac.and_then(Stamp::from_mac).map(|stamp| stamp.tunnel);
        // The XDP program sends only what is stamped for a live tunnel; one that went since took its counters along.
        let Some(endpoint) = number.and_then(|number| self.endpoints.get_mut(&number)) else {
            return pieces.drain(..).for_each(|piece| self.pool.put(piece.frame));
        };
        let tunnel = &mut endpoint.tunnel;
        tunnel.keys.refresh(self.now);
        let admitted = if admission::fits(tunnel, &self.umem, pieces) {
            pieces.pop().map_or(Ok(()), |packet| {
                admission::single(tunnel, &self.umem, packet, &mut self.outgoing, &mut self.pool)
            })
        } else {
            admission::cut(tunnel, &self.umem, pieces, &mut self.outgoing, &mut self.pool, &mut self.icmp)
        };
        for piece in pieces.drain(..) {
            self.pool.put(piece.frame);
        }
        if let Err(verdict) = admitted {
            tunnel.counters.count(verdict);
            let wanted = (verdict == Verdict::NoSendKey).then(|| tunnel.want_send_key(self.now)).flatten();
            if let Some(reason) = wanted {
                want(&self.reports, tunnel, reason);
            }
        }
    }

    /// Seals and sends a message of the daemon's.
    pub(super) fn send_control(&mut self, number: u16, message: &Message) {
        // The keys as they are now: this is not in the middle of a batch.
        self.now = Instant::now();
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return };
        let tunnel = &mut endpoint.tunnel;
        tunnel.keys.refresh(self.now);
        let octets = &message.octets[..];
        let fits = FRESH + packet::sealed_len(octets.len()) <= self.umem.frame_size() as usize;
        let slot = match message.under {
            Under::Live => tunnel.keys.sending(),
            Under::Static | Under::Retired(_) => tunnel.keys.get(Slot::Static).map(|_| Slot::Static),
        };
        let frame = match slot {
            _ if !fits => Err(Verdict::TooBig),
            None => Err(Verdict::NoSendKey),
            Some(_) => self.pool.take().ok_or(Verdict::NoFrame),
        };
        let mut frame = match frame {
            Ok(frame) => frame,
            Err(verdict) => return tunnel.counters.count(verdict),
        };
        if message.announces {
            tunnel.common.count_from_here();
        }
        let chunk = self.umem.chunk_mut(&mut frame);
        chunk[FRESH..FRESH + octets.len()].copy_from_slice(octets);
        let out = match &message.under {
            // No slot holds it, so it is sealed here and leaves as it is.
            Under::Retired(key) => {
                let key = tunnel.keys.expand(&key.0);
                let iv = packet::draw_iv(KeyKind::Dynamic, || self.random.octets());
                let (at, filler) = (FRESH - packet::IV, self.random.octets());
                let packet = &mut chunk[at..];
                let sealed = packet::seal(&mut self.lanes, &key, packet, octets.len(), Type::Control, iv, filler);
                Outgoing::new(number, frame, at, sealed, Type::Control, None, OWN)
            }
            Under::Live | Under::Static => Outgoing::new(number, frame, FRESH, octets.len(), Type::Control, slot, OWN),
        };
        self.outgoing.push(out);
        self.send_outgoing();
        self.flush();
    }

    /// Sends a datagram in clear.
    pub(super) fn send_clear(&mut self, number: u16, to: SocketAddr, datagram: &[u8]) {
        let Some(endpoint) = self.endpoints.get(&number) else { return };
        let tunnel = &endpoint.tunnel;
        let sent = match (tunnel.socks, tunnel.relay, socks::header(to)) {
            (false, ..) => Some(tunnel.udp.send_one(to, OWN, &[IoSlice::new(datagram)])),
            (true, Some(relay), Some(header)) => {
                Some(tunnel.udp.send_one(relay, OWN, &[IoSlice::new(&header), IoSlice::new(datagram)]))
            }
            // Never past the server.
            (true, ..) => None,
        };
        tunnel.counters.count(match sent {
            Some(true) => Verdict::ControlSent,
            Some(false) => Verdict::CarrierFull,
            None => Verdict::NoRoute,
        });
    }

    pub(super) fn send_outgoing(&mut self) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        self.moved += outgoing.len();
        for out in &mut outgoing {
            self.frame(out);
        }
        self.encrypt(&mut outgoing);
        self.hold_back(&mut outgoing);
        self.ship(&mut outgoing);
        self.outgoing = outgoing;
    }

    /// Chooses the IV of a payload that is to be sealed, pads it, and accounts for it.
    fn frame(&mut self, out: &mut Outgoing) {
        let (Some(endpoint), Some(slot)) = (self.endpoints.get_mut(&out.tunnel), out.slot) else { return };
        let tunnel = &endpoint.tunnel;
        let kind = if slot == Slot::Static { KeyKind::Static } else { KeyKind::Dynamic };
        let iv = packet::draw_iv(kind, || self.random.octets());
        if slot == Slot::Static {
            tunnel.common.note_iv(&iv);
        }
        if let Some(reason) = tunnel.sealed(slot, out.octets, out.kind, self.now) {
            want(&self.reports, tunnel, reason);
        }
        let datagram = &mut self.umem.chunk_mut(&mut out.frame)[out.datagram.clone()];
        packet::frame(datagram, out.octets, out.kind, iv, self.random.octets());
    }

    /// Encrypts framed payloads where they stand.
    fn encrypt(&mut self, outgoing: &mut Vec<Outgoing>) {
        let key_of = |out: &Outgoing| self.endpoints.get(&out.tunnel)?.tunnel.keys.get(out.slot?);
        if outgoing.len() > BATCH && self.crew.has_help(self.number) {
            let chunks = Chunk::cut(outgoing, Packets::Outgoing, key_of);
            for chunk in self.crew.work(self.number, chunks, &self.umem, &mut self.lanes) {
                if let Packets::Outgoing(packets) = chunk.packets {
                    outgoing.extend(packets);
                }
            }
            return;
        }
        for batch in outgoing.chunks_mut(BATCH) {
            let keys: ArrayVec<_, BATCH> = batch.iter().map(key_of).collect();
            let mut jobs = jobs(batch.iter_mut().zip(keys), |out| out.framed(&self.umem));
            self.lanes.encrypt(&mut jobs);
        }
    }
}
