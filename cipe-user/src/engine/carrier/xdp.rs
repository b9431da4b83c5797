//! The AF_XDP sockets of a carrier card, one a receive queue: whole frames, with headers of our own making.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cipe_common::Verdict;

use super::{Arrival, Door, Group, Path, Room, Route, Sealed};
use crate::engine::BATCH;
use crate::engine::outer;
use crate::engine::port::Port;
use crate::xsk::{Packet, Pool, Umem};

/// A carrier card.
pub struct XdpCarrier {
    queues: Vec<Queue>,
    received: Vec<Packet>,
    /// Where all that arrives waits until [`XdpCarrier::begin`]; `None` from then on.
    waiting: Option<Vec<Arrival>>,
    /// Counts what goes through the card, both ways and at all workers.
    traffic: Arc<AtomicU64>,
}

/// Part of a worker's frames that may wait so; the rest stays in the ring.
const MOST_WAITING: usize = 4;

struct Queue {
    port: Port,
    /// Whether the frame of the last piece has more after it.
    in_chain: bool,
}

impl XdpCarrier {
    /// A card by its queues' sockets. It counts datagrams in `traffic`, and hands none out before [`XdpCarrier::begin`].
    pub fn new(ports: Vec<Port>, traffic: Arc<AtomicU64>) -> Self {
        let queues = ports.into_iter().map(|port| Queue { port, in_chain: false }).collect();
        Self { queues, received: Vec::with_capacity(BATCH), waiting: Some(Vec::new()), traffic }
    }

    /// Hands out what has waited; what arrives from now on is [`Door::receive`]'s.
    pub fn begin(&mut self) -> Vec<Arrival> {
        self.waiting.take().unwrap_or_default()
    }

    /// Whether this worker has any of the card's queues.
    pub fn has_queues(&self) -> bool {
        !self.queues.is_empty()
    }

    /// The sockets, for what is to be done with each.
    pub fn ports(&mut self) -> impl Iterator<Item = &mut Port> {
        self.queues.iter_mut().map(|queue| &mut queue.port)
    }

    /// Closes the sockets and takes their frames back.
    pub fn close(self, pool: &mut Pool) {
        self.queues.into_iter().for_each(|queue| queue.port.close(pool));
    }
}

impl Door for XdpCarrier {
    fn receive(&mut self, most: usize, room: &mut Room<'_>, arrivals: &mut Vec<Arrival>) -> io::Result<bool> {
        let arrivals = match &mut self.waiting {
            Some(waiting) if waiting.len() >= room.pool.total() / MOST_WAITING => return Ok(false),
            Some(waiting) => waiting,
            None => arrivals,
        };
        let mut taken = 0;
        for queue in &mut self.queues {
            taken += queue.port.receive(&mut self.received, most - taken, room.pool);
            warm(&self.received, room.umem);
            arrivals.extend(self.received.drain(..).filter_map(|packet| {
                let is_later_piece = std::mem::replace(&mut queue.in_chain, packet.more);
                arrival(packet, is_later_piece, room)
            }));
        }
        self.traffic.fetch_add(taken as u64, Ordering::Relaxed);
        Ok(taken >= most)
    }

    fn send(&mut self, group: Group, route: &Route, room: &mut Room<'_>) -> usize {
        let mut group = group.into_iter();
        let mut sent = 0;
        if let (Some(queue), Some(path)) = (self.queues.first_mut(), &route.path) {
            for sealed in group.by_ref() {
                let ip_id = route.ip_id.wrapping_add(sent as u16);
                if let Err(refused) = queue.port.transmit(framed(sealed, route, path, ip_id, room.umem), room.pool) {
                    room.pool.put(refused.frame);
                    break;
                }
                sent += 1;
            }
        }
        group.for_each(|sealed| room.pool.put(sealed.frame));
        self.traffic.fetch_add(sent as u64, Ordering::Relaxed);
        sent
    }
}

/// Reads where the headers begin, and forgets it. Another core has just written them: done for all packets of a batch before
/// the first is parsed, the waits for them overlap.
fn warm(packets: &[Packet], umem: &Umem) {
    for packet in packets {
        std::hint::black_box(packet.data(umem).first().copied());
    }
}

/// What came in a frame; nothing for the later pieces of one that is larger than a UMEM frame. Such a frame is no datagram of
/// ours, each of which fits one, but a superframe; it counts once.
fn arrival(packet: Packet, is_later_piece: bool, room: &mut Room<'_>) -> Option<Arrival> {
    let frame = packet.data(room.umem);
    let found = if packet.more { outer::parse_front(frame) } else { outer::parse_frame(frame) };
    let Some(found) = found.filter(|_| !is_later_piece) else {
        // The XDP program sends only what it has parsed: there is nothing else.
        room.pool.put(packet.frame);
        return None;
    };
    let start = packet.offset as usize;
    let datagram = if packet.more {
        room.pool.put(packet.frame);
        Err(Verdict::BadLength)
    } else {
        Ok((packet.frame, start + found.payload.start..start + found.payload.end))
    };
    Some(Arrival { to: Some(found.to), from: found.from, was_joined: false, datagram })
}

/// Puts carrier headers in front of a datagram.
fn framed(sealed: Sealed, route: &Route, path: &Path, ip_id: u16, umem: &Umem) -> Packet {
    let Sealed { mut frame, datagram } = sealed;
    let end = datagram.end;
    let chunk = umem.chunk_mut(&mut frame);
    let addresses = (path.source, route.to);
    let start = outer::write_frame(chunk, datagram, path.hop, addresses, route.marks, ip_id, route.checksum);
    Packet { frame, offset: start as u32, len: (end - start) as u32, more: false }
}
