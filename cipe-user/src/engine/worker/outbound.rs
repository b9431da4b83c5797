//! Private to carrier: checked, padded, sealed in the frame that it came in, and sent from there.

use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict, stamp};

use super::{BATCH, FRESH, Worker};
use crate::cipher::Job;
use crate::control::protocol::Event;
use crate::engine::checksum::complete_partial;
use crate::engine::outer::{self, Marks};
use crate::engine::segment::Superframe;
use crate::engine::tunnel::{Tunnel, Way};
use crate::wire::inner::{self, Inner};
use crate::wire::packet::{self, KeyKind, Type};
use crate::xsk::{Frame, Packet, Pool, Umem};

/// A payload on its way out.
pub struct Outgoing {
    tunnel: u16,
    frame: Frame,
    /// Where the datagram stands in the chunk once it is sealed.
    datagram: Range<usize>,
    /// Payload octets.
    octets: usize,
    kind: Type,
    /// Key to seal under; `None`: bare (`nokey`).
    slot: Option<Slot>,
    marks: Marks,
}

impl Outgoing {
    /// The payload of `octets` octets stands at `at` in the chunk, with room before and behind it.
    fn new(tunnel: u16, frame: Frame, at: usize, octets: usize, kind: Type, slot: Option<Slot>, marks: Marks) -> Self {
        let datagram = match slot {
            Some(_) => at - packet::IV..at - packet::IV + packet::sealed_len(octets),
            None => at..at + octets,
        };
        Self { tunnel, frame, datagram, octets, kind, slot, marks }
    }
}

/// Outer header of our own messages.
const OWN: Marks = Marks { tos: 0, ttl: 64, dont_fragment: false };

impl Worker {
    /// Takes one batch from a tunnel device, seals it and sends it; returns the packets taken.
    pub(super) fn outbound(&mut self, number: u16) -> usize {
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return 0 };
        endpoint.tunnel.keys.refresh(self.now);
        let mut taken = 0;
        for port in &mut endpoint.ports {
            taken += port.receive(&mut self.received, BATCH, &mut self.pool);
        }
        let mut received = std::mem::take(&mut self.received);
        let mut pieces = ArrayVec::new();
        for piece in received.drain(..) {
            let last = !piece.more;
            if let Err(full) = pieces.try_push(piece) {
                // More than the largest frame has: only a kernel of another build sends that.
                self.pool.put(full.element().frame);
            }
            if last {
                self.admit(number, &mut pieces);
            }
        }
        self.received = received;
        self.send_outgoing();
        taken
    }

    /// Takes in one private frame of one or more pieces: a packet to seal, or several to cut it into.
    fn admit(&mut self, number: u16, pieces: &mut Pieces) {
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return };
        let tunnel = &mut endpoint.tunnel;
        let octets = pieces.iter().map(|piece| piece.len as usize).sum::<usize>().saturating_sub(outer::ETHERNET);
        let admitted = if octets <= tunnel.mtu && pieces.len() == 1 {
            pieces.pop().map_or(Ok(()), |packet| single(tunnel, &self.umem, packet, &mut self.outgoing, &mut self.pool))
        } else {
            cut(tunnel, &self.umem, pieces, &mut self.outgoing, &mut self.pool)
        };
        for piece in pieces.drain(..) {
            self.pool.put(piece.frame);
        }
        if let Err(verdict) = admitted {
            tunnel.counters.count(verdict);
            let wanted = (verdict == Verdict::NoSendKey).then(|| tunnel.want_send_key(self.now)).flatten();
            if let Some(reason) = wanted {
                // The daemon that cannot keep up is asked again after the retry time.
                let _ = self.events.try_send((number, Event::KeyWanted { reason }));
            }
        }
    }

    /// Seals and sends a message of the daemon's.
    pub(super) fn send_control(&mut self, number: u16, message: &[u8]) {
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return };
        let tunnel = &mut endpoint.tunnel;
        tunnel.keys.refresh(self.now);
        let fits = FRESH + packet::sealed_len(message.len()) <= self.umem.frame_size() as usize;
        let slot = tunnel.keys.sending();
        let frame = match slot {
            _ if !fits => Err(Verdict::TooBig),
            None => Err(Verdict::NoSendKey),
            Some(_) => self.pool.take().ok_or(Verdict::NoFrame),
        };
        match frame {
            Ok(mut frame) => {
                self.umem.chunk_mut(&mut frame)[FRESH..FRESH + message.len()].copy_from_slice(message);
                let out = Outgoing::new(number, frame, FRESH, message.len(), Type::Control, slot, OWN);
                self.outgoing.push(out);
                self.send_outgoing();
                self.flush();
            }
            Err(verdict) => tunnel.counters.count(verdict),
        }
    }

    fn send_outgoing(&mut self) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        for batch in outgoing.chunks_mut(BATCH) {
            self.seal(batch);
        }
        for out in outgoing.drain(..) {
            self.ship(out);
        }
        self.outgoing = outgoing;
    }

    /// Frames and encrypts at most [`BATCH`] payloads where they stand.
    fn seal(&mut self, batch: &mut [Outgoing]) {
        for out in batch.iter_mut() {
            let (Some(endpoint), Some(slot)) = (self.endpoints.get_mut(&out.tunnel), out.slot) else { continue };
            let random: [u8; 15] = self.random.octets();
            let kind = if slot == Slot::Static { KeyKind::Static } else { KeyKind::Dynamic };
            let iv = kind.mark(std::array::from_fn(|i| random[i]));
            if slot == Slot::Static {
                endpoint.tunnel.sent_ivs.insert(&iv);
            }
            if let Some(reason) = endpoint.tunnel.sealed(slot, out.octets, out.kind, self.now) {
                // The daemon that cannot keep up is asked again after the retry time.
                let _ = self.events.try_send((out.tunnel, Event::KeyWanted { reason }));
            }
            let datagram = &mut self.umem.chunk_mut(&mut out.frame)[out.datagram.clone()];
            packet::frame(datagram, out.octets, out.kind, iv, std::array::from_fn(|i| random[packet::IV + i]));
        }
        let mut jobs: ArrayVec<Job<'_>, BATCH> = ArrayVec::new();
        for out in batch.iter_mut() {
            let (Some(endpoint), Some(slot)) = (self.endpoints.get(&out.tunnel), out.slot) else { continue };
            let Some(live) = endpoint.tunnel.keys.get(slot) else { continue };
            let datagram = &mut self.umem.chunk_mut(&mut out.frame)[out.datagram.clone()];
            let (iv, data) = datagram.split_at_mut(packet::IV);
            jobs.push(Job { key: &live.key, iv: std::array::from_fn(|i| iv[i]), data });
        }
        self.lanes.encrypt(&mut jobs);
    }

    /// Sends one sealed datagram by the tunnel's door and counts it.
    fn ship(&mut self, out: Outgoing) {
        let Outgoing { tunnel: number, mut frame, datagram, octets, kind, marks, .. } = out;
        let Some(tunnel) = self.endpoints.get_mut(&number).map(|endpoint| &mut endpoint.tunnel) else {
            return self.pool.put(frame);
        };
        let Some(peer) = tunnel.peer else {
            tunnel.counters.count(Verdict::NoPeer);
            return self.pool.put(frame);
        };
        let ip_len = outer::room(peer.ip()) - outer::ETHERNET + datagram.len();
        let path = match tunnel.way {
            Way::Carrier(path) if ip_len <= path.mtu => Some(path),
            Way::Carrier(_) | Way::Socket => None,
            Way::NoRoute | Way::Looped => {
                let verdict = if tunnel.way == Way::Looped { Verdict::RouteLoop } else { Verdict::NoRoute };
                tunnel.counters.count(verdict);
                return self.pool.put(frame);
            }
        };
        let port = path.and_then(|path| self.carriers.get_mut(path.carrier)?.as_mut()?.first_mut());
        let result = match path.zip(port) {
            Some((path, port)) => {
                tunnel.ip_id = tunnel.ip_id.wrapping_add(1);
                let end = datagram.end;
                let chunk = self.umem.chunk_mut(&mut frame);
                let addresses = (path.source, peer);
                let start =
                    outer::write_frame(chunk, datagram, path.hop, addresses, marks, tunnel.ip_id, tunnel.checksum);
                let packet = Packet { frame, offset: start as u32, len: (end - start) as u32, more: false };
                port.transmit(packet, &mut self.pool).map_err(|packet| self.pool.put(packet.frame))
            }
            None => {
                let sent = send_by_udp(tunnel, &self.umem.chunk(&frame)[datagram], peer, marks);
                self.pool.put(frame);
                sent
            }
        };
        match (result, kind) {
            (Ok(()), Type::Data) => tunnel.counters.sent(octets),
            (Ok(()), Type::Control) => tunnel.counters.count(Verdict::ControlSent),
            (Err(()), _) => tunnel.counters.count(Verdict::CarrierFull),
        }
    }
}

/// The descriptors of one private frame; 64 KiB need 18 of them.
type Pieces = ArrayVec<Packet, 32>;

/// Checks a packet that came in one frame, and queues it where it stands.
fn single(
    tunnel: &Tunnel,
    umem: &Umem,
    mut packet: Packet,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
) -> Result<(), Verdict> {
    let at = packet.offset as usize + outer::ETHERNET;
    let end = packet.offset as usize + packet.len as usize;
    let checked =
        umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed).and_then(|payload| {
            let inner = inner::check(payload).map_err(|_| malformed(payload))?;
            complete_partial(payload);
            way_out(tunnel, &inner)
        });
    let fits = at + packet::sealed_len(end.saturating_sub(at)) <= umem.frame_size() as usize;
    match checked {
        Ok((slot, marks)) if fits => {
            outgoing.push(Outgoing::new(tunnel.number, packet.frame, at, end - at, Type::Data, slot, marks));
            Ok(())
        }
        other => {
            pool.put(packet.frame);
            other.and(Err(Verdict::TooBig))
        }
    }
}

/// Cuts a superframe into packets, each in a frame of its own.
fn cut(
    tunnel: &Tunnel,
    umem: &Umem,
    pieces: &Pieces,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
) -> Result<(), Verdict> {
    let mac: [u8; stamp::LEN] =
        pieces.first().and_then(|first| first.data(umem).first_chunk().copied()).ok_or(Verdict::PrivateMalformed)?;
    let stamp = Stamp::from_mac(mac).ok_or(Verdict::PrivateUnstamped)?;
    if stamp.gso_size == 0 {
        return Err(Verdict::TooBig);
    }
    let octets: ArrayVec<&[u8], 32> = pieces
        .iter()
        .enumerate()
        .map(|(index, piece)| piece.data(umem).get(if index == 0 { outer::ETHERNET } else { 0 }..).unwrap_or_default())
        .collect();
    let mut superframe = Superframe::parse(&octets, stamp.gso_size)?;
    if superframe.longest() > tunnel.mtu {
        return Err(Verdict::TooBig);
    }
    let (slot, marks) = way_out(tunnel, superframe.ip())?;
    for _ in 0..superframe.segments() {
        let mut frame = pool.take().ok_or(Verdict::NoFrame)?;
        match superframe.cut(&mut umem.chunk_mut(&mut frame)[FRESH..]) {
            Some(octets) => {
                outgoing.push(Outgoing::new(tunnel.number, frame, FRESH, octets, Type::Data, slot, marks));
            }
            None => pool.put(frame),
        }
    }
    Ok(())
}

/// The key to seal a packet under, and what its outer header copies.
fn way_out(tunnel: &Tunnel, inner: &Inner) -> Result<(Option<Slot>, Marks), Verdict> {
    if tunnel.peer.is_none() {
        return Err(Verdict::NoPeer);
    }
    let slot = if tunnel.nokey { None } else { Some(tunnel.data_slot()?) };
    let ttl = if tunnel.cttl == 0 { inner.ttl } else { tunnel.cttl };
    Ok((slot, Marks { tos: inner.tos, ttl, dont_fragment: inner.dont_fragment && !tunnel.ignore_df }))
}

fn malformed(payload: &[u8]) -> Verdict {
    match payload.first().map(|octet| octet >> 4) {
        Some(4 | 6) => Verdict::PrivateMalformed,
        _ => Verdict::PrivateNotIp,
    }
}

/// The door of last resort: the kernel resolves, routes and fragments.
fn send_by_udp(tunnel: &Tunnel, datagram: &[u8], peer: SocketAddr, marks: Marks) -> Result<(), ()> {
    use rustix::net::sockopt;
    if peer.is_ipv4() {
        // Refused marks cost a packet its TOS, not its way.
        let _ = sockopt::set_ip_tos(&tunnel.udp, marks.tos);
        let _ = sockopt::set_ip_ttl(&tunnel.udp, marks.ttl.into());
    }
    match tunnel.udp.send_to(datagram, peer) {
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::debug!("{peer}: {error}");
            Err(())
        }
    }
}
