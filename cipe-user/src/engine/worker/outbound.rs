//! Private to carrier: checked, padded, sealed in the frame that it came in, and sent from there.

use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::{BATCH, FRESH, Worker};
use crate::cipher::Job;
use crate::control::protocol::Event;
use crate::engine::outer::{self, Marks};
use crate::engine::tunnel::{Tunnel, Way};
use crate::wire::inner;
use crate::wire::packet::{self, KeyKind, Type};
use crate::xsk::{Frame, Packet, Umem};

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
            taken += port.receive(&mut self.received, BATCH - taken, &mut self.pool);
        }
        for packet in self.received.drain(..) {
            match admit(&endpoint.tunnel, &self.umem, &packet) {
                Ok((at, octets, slot, marks)) => {
                    self.outgoing.push(Outgoing::new(number, packet.frame, at, octets, Type::Data, slot, marks));
                }
                Err(verdict) => {
                    endpoint.tunnel.counters.count(verdict);
                    self.pool.put(packet.frame);
                    let wanted = (verdict == Verdict::NoSendKey).then(|| endpoint.tunnel.want_send_key(self.now));
                    if let Some(reason) = wanted.flatten() {
                        // The daemon that cannot keep up is asked again after the retry time.
                        let _ = self.events.try_send((number, Event::KeyWanted { reason }));
                    }
                }
            }
        }
        self.send_outgoing();
        taken
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

/// Checks a frame from the private side; returns where its payload stands, its length, the key to seal it under and
/// what its outer header copies.
fn admit(tunnel: &Tunnel, umem: &Umem, packet: &Packet) -> Result<(usize, usize, Option<Slot>, Marks), Verdict> {
    if packet.more {
        return Err(Verdict::TooBig);
    }
    let at = packet.offset as usize + outer::ETHERNET;
    let chunk = umem.chunk(&packet.frame);
    let payload = chunk.get(at..packet.offset as usize + packet.len as usize).ok_or(Verdict::PrivateMalformed)?;
    let octets = payload.len();
    let inner = inner::check(payload).map_err(|_| Verdict::PrivateMalformed)?;
    if octets > tunnel.mtu || at + packet::sealed_len(octets) > chunk.len() {
        return Err(Verdict::TooBig);
    }
    if tunnel.peer.is_none() {
        return Err(Verdict::NoPeer);
    }
    let slot = match tunnel.nokey {
        true => None,
        false => Some(tunnel.data_slot()?),
    };
    let ttl = if tunnel.cttl == 0 { inner.ttl } else { tunnel.cttl };
    Ok((at, octets, slot, Marks { tos: inner.tos, ttl, dont_fragment: inner.dont_fragment && !tunnel.ignore_df }))
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
