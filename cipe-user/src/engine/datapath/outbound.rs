//! Private to carrier: checks, pads and seals packets in their frames.

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict};

use super::admission::{Admission, Dropped, Pieces, data_form};
use super::crew::{Chunk, Packets};
use super::packets::{Form, Outgoing, identity, jobs};
use super::{Datapath, want, want_handshake};
use crate::control::protocol::SealedWanted;
use crate::engine::BATCH;
use crate::engine::report::Reports;
use crate::engine::tunnel::Tunnel;
use crate::wire::packet::{self, KeyKind};
use crate::xsk::Packet;

impl Datapath {
    /// Seals the packets of stamped private frames, and appends them to `outgoing`.
    pub fn seal(&mut self, received: &mut Vec<Packet>, outgoing: &mut Vec<Outgoing>) {
        self.release_held(outgoing);
        for piece in &*received {
            // A later piece of a superframe has no stamp. If it looks like one, the prefetch is wasted but harmless.
            let stamp = piece.data(&self.umem).first_chunk().copied().and_then(Stamp::from_mac);
            if let Some(tunnel) = stamp.and_then(|stamp| self.tunnels.get(&stamp.tunnel)) {
                tunnel.prefetch(Slot::Send);
            }
        }
        let first = outgoing.len();
        let mut pieces = Pieces::new();
        for piece in received.drain(..) {
            let last = !piece.more;
            if let Err(full) = pieces.try_push(piece) {
                // The frame has more pieces than the largest one; only a kernel with larger frames sends that.
                self.pool.put(full.element().frame);
            }
            if last {
                self.admit(&mut pieces, outgoing);
            }
        }
        // Pieces of a frame whose last piece never came.
        pieces.drain(..).for_each(|piece| self.pool.put(piece.frame));
        self.seal_from(first, outgoing);
    }

    /// Seals the frames of Ethernet tunnel `number`, and appends them to `outgoing`. If the tunnel was removed, it frees them.
    pub fn seal_frames(&mut self, number: Option<u16>, received: &mut Vec<Packet>, outgoing: &mut Vec<Outgoing>) {
        self.release_held(outgoing);
        let Some(tunnel) = number.and_then(|number| self.tunnels.get_mut(&number)) else {
            return received.drain(..).for_each(|piece| self.pool.put(piece.frame));
        };
        tunnel.prefetch(Slot::Send);
        tunnel.refresh(self.now);
        let first = outgoing.len();
        let mut pieces = Pieces::new();
        for piece in received.drain(..) {
            let last = !piece.more;
            if let Err(full) = pieces.try_push(piece) {
                self.pool.put(full.element().frame);
            }
            if !last {
                continue;
            }
            if self.held.take(tunnel, &mut pieces, self.pool.total(), self.now) {
                want_key(&self.reports, tunnel, self.now);
                continue;
            }
            let (umem, pool, too_big) = (&self.umem, &mut self.pool, &mut self.too_big);
            let admitted = Admission { tunnel, umem, pool, outgoing, too_big, now: self.now }.ethernet(&mut pieces);
            pieces.drain(..).for_each(|piece| self.pool.put(piece.frame));
            if let Err(dropped) = admitted {
                drop_admitted(&self.reports, tunnel, dropped, self.now);
            }
        }
        pieces.drain(..).for_each(|piece| self.pool.put(piece.frame));
        self.seal_from(first, outgoing);
    }

    /// Admits one private frame of one or more pieces: queues its packet, segments or fragments.
    fn admit(&mut self, pieces: &mut Pieces, outgoing: &mut Vec<Outgoing>) {
        let mac = pieces.first().and_then(|first| first.data(&self.umem).first_chunk().copied());
        let number = mac.and_then(Stamp::from_mac).map(|stamp| stamp.tunnel);
        // The XDP program redirects only frames with a stamp. If their tunnel was removed, its counters are gone too.
        let Some(tunnel) = number.and_then(|number| self.tunnels.get_mut(&number)) else {
            return pieces.drain(..).for_each(|piece| self.pool.put(piece.frame));
        };
        tunnel.refresh(self.now);
        if self.held.take(tunnel, pieces, self.pool.total(), self.now) {
            return want_key(&self.reports, tunnel, self.now);
        }
        let (umem, pool, too_big) = (&self.umem, &mut self.pool, &mut self.too_big);
        let mut admission = Admission { tunnel, umem, pool, outgoing, too_big, now: self.now };
        let admitted = if admission.fits(pieces) {
            pieces.pop().map_or(Ok(()), |packet| admission.single(packet))
        } else {
            admission.cut(pieces)
        };
        for piece in pieces.drain(..) {
            self.pool.put(piece.frame);
        }
        if let Err(dropped) = admitted {
            drop_admitted(&self.reports, tunnel, dropped, self.now);
        }
    }

    /// Makes datagrams of the payloads in `outgoing`, from index `first` on.
    pub(super) fn seal_from(&mut self, first: usize, outgoing: &mut Vec<Outgoing>) {
        self.drop_looped(first, outgoing);
        let mut unsaved = None;
        for out in &mut outgoing[first..] {
            self.frame(out);
            if out.form == Form::Keyed(Slot::Static)
                && let Some(before) = unsaved.replace(out.tunnel).filter(|before| *before != out.tunnel)
            {
                self.save(before);
            }
        }
        if let Some(last) = unsaved {
            self.save(last);
        }
        if outgoing[first..].iter().any(|out| out.form.slot().is_some()) {
            self.encrypt(first, outgoing);
        }
        self.seal_packets(&mut outgoing[first..]);
    }

    /// Keeps the IVs that a tunnel is about to send under its static key.
    fn save(&self, number: u16) {
        if let Some(tunnel) = self.tunnels.get(&number) {
            tunnel.common.save();
        }
    }

    /// Chooses the IV of a payload, pads it, and counts it for its key.
    fn frame(&mut self, out: &mut Outgoing) {
        let slot = match out.form {
            Form::Keyed(slot) => slot,
            Form::Whole => return self.remember(out),
            // Later, with the counters of its key ([`Self::seal_packets`]).
            Form::Sealed => return,
        };
        let Some(tunnel) = self.tunnels.get(&out.tunnel) else { return };
        let kind = if slot == Slot::Static { KeyKind::Static } else { KeyKind::Dynamic };
        let iv = packet::draw_iv(kind, || self.random.octets());
        if slot == Slot::Static {
            tunnel.common.note_iv(&iv);
        }
        if let Some(reason) = tunnel.account(slot, out.octets, out.kind, self.now) {
            want(&self.reports, tunnel, reason);
        }
        let datagram = &mut self.umem.chunk_mut(&mut out.frame)[out.datagram.clone()];
        packet::frame(datagram, out.octets, out.kind, iv, self.random.octets());
        self.remember(out);
    }

    /// Remembers what identifies a datagram, and the tunnels inside it.
    pub(super) fn remember(&self, out: &mut Outgoing) {
        let Some(identity) = self.umem.chunk(&out.frame).get(out.datagram.clone()).and_then(identity) else { return };
        self.crew.remember_sent(self.number, identity);
        if let Some(inside) = out.inside.take() {
            self.crew.rounds().remember(identity, *inside);
        }
    }

    /// Encrypts padded payloads in place.
    fn encrypt(&mut self, first: usize, outgoing: &mut Vec<Outgoing>) {
        let key_of = |out: &Outgoing| self.tunnels.get(&out.tunnel)?.keys.get(out.form.slot()?);
        if outgoing.len() - first > BATCH && self.crew.has_help(self.number) {
            let chunks = Chunk::cut(outgoing.drain(first..), Packets::Outgoing, key_of);
            for chunk in self.crew.work(self.number, chunks, &self.umem, &mut self.lanes) {
                if let Packets::Outgoing(packets) = chunk.packets {
                    outgoing.extend(packets);
                }
            }
            return;
        }
        for batch in outgoing[first..].chunks_mut(BATCH) {
            let keys: ArrayVec<_, BATCH> = batch.iter().map(key_of).collect();
            let mut jobs = jobs(batch.iter_mut().zip(keys), |out| out.framed(&self.umem));
            self.lanes.encrypt(&mut jobs);
        }
    }
}

/// Counts dropped packets, and asks for a key if there is none.
fn drop_admitted(reports: &Reports, tunnel: &Tunnel, dropped: Dropped, now: std::time::Instant) {
    tunnel.counters.count_all(dropped.verdict, dropped.packets);
    if dropped.verdict == Verdict::NoSendKey {
        want_key(reports, tunnel, now);
    }
}

/// Asks for a key for data that cannot leave without one, if there is none.
fn want_key(reports: &Reports, tunnel: &Tunnel, now: std::time::Instant) {
    if data_form(tunnel) != Err(Verdict::NoSendKey) {
        return;
    }
    if !tunnel.sends_unsealed() {
        want_handshake(reports, tunnel, SealedWanted::Send, now);
    } else if let Some(reason) = tunnel.want_send_key(now) {
        want(reports, tunnel, reason);
    }
}
