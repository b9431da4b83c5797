//! A carrier card by XDP: whole frames, with headers that the engine writes. AF_XDP sockets receive, one per queue;
//! they also send, or the engine sends live frames.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cipe_common::Verdict;
use cipe_common::maps::Departure;

use super::{Arrival, Door, Group, GroupRoute, Path, Room, Sealed, Share, Via};
use crate::engine::BATCH;
use crate::engine::carrier::outer;
use crate::engine::port::{Turns, XskPort};
use crate::kernel::bpf::LiveFrames;
use crate::kernel::zone;
use crate::xsk::{Packet, Pool, Umem};

/// Datagrams through a card, of all workers.
#[derive(Debug, Default)]
pub(crate) struct Traffic {
    sent: AtomicU64,
    received: AtomicU64,
    authentic: AtomicU64,
}

impl Traffic {
    /// Returns the number of received datagrams, decrypted or not.
    pub(crate) fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Returns the number of datagrams in both directions that are the tunnels' own: sent ones, and received ones that were decrypted.
    pub(crate) fn authentic(&self) -> u64 {
        self.sent.load(Ordering::Relaxed) + self.authentic.load(Ordering::Relaxed)
    }
}

/// A carrier card.
pub(crate) struct XdpCarrier {
    ifindex: u32,
    queues: Vec<Queue>,
    turns: Turns,
    received: Vec<Packet>,
    /// The queue of received datagrams until [`XdpCarrier::begin`]; `None` after that.
    waiting: Option<Vec<Arrival>>,
    /// The counter of the card's datagrams.
    traffic: Arc<Traffic>,
    live: Option<Live>,
}

/// Sending by live frames.
struct Live {
    frames: LiveFrames,
    waiting: Vec<Packet>,
    departures: Vec<Departure>,
}

/// Divisor of a worker's frames: the maximum that is queued before [`XdpCarrier::begin`]; the rest stays in the ring.
const QUEUE_DIVISOR: usize = 4;

struct Queue {
    port: XskPort,
    /// Whether the next descriptor continues the last frame.
    in_chain: bool,
}

impl XdpCarrier {
    /// Creates the card of this ifindex with the sockets of its queues. It counts datagrams in `traffic`, and returns
    /// none before [`XdpCarrier::begin`].
    pub(crate) fn new(ifindex: u32, ports: Vec<XskPort>, traffic: Arc<Traffic>) -> Self {
        let queues = ports.into_iter().map(|port| Queue { port, in_chain: false }).collect();
        let received = Vec::with_capacity(BATCH);
        Self { ifindex, queues, turns: Turns::default(), received, waiting: Some(Vec::new()), traffic, live: None }
    }

    /// Adds sending by live frames.
    pub(crate) fn with_live_frames(self, frames: LiveFrames) -> Self {
        let (waiting, departures) =
            (Vec::with_capacity(LiveFrames::MAX_FRAMES), Vec::with_capacity(LiveFrames::MAX_FRAMES));
        Self { live: Some(Live { frames, waiting, departures }), ..self }
    }

    /// Returns the queued datagrams. From now on, [`Door::receive`] returns new ones.
    pub(crate) fn begin(&mut self) -> Vec<Arrival> {
        self.waiting.take().unwrap_or_default()
    }

    /// Counts received datagrams that were decrypted.
    pub(crate) fn count_authentic(&self, datagrams: u64) {
        self.traffic.authentic.fetch_add(datagrams, Ordering::Relaxed);
    }

    /// Whether this worker has any queues of the card.
    pub(crate) fn has_queues(&self) -> bool {
        !self.queues.is_empty()
    }

    /// Returns the sockets.
    pub(crate) fn ports(&mut self) -> impl Iterator<Item = &mut XskPort> {
        self.queues.iter_mut().map(|queue| &mut queue.port)
    }

    /// Sends the queued packets. Returns whether the kernel took all.
    pub(crate) fn flush(&mut self, pool: &mut Pool) -> bool {
        self.depart(pool);
        let mut all = true;
        self.ports().for_each(|port| all &= port.flush(pool));
        all
    }

    /// Sends the queued live frames.
    fn depart(&mut self, pool: &mut Pool) {
        let Some(live) = &mut self.live else { return };
        live.departures.clear();
        let departure =
            |packet: &Packet| Departure::new(packet.frame.index(), packet.offset as usize, packet.len as usize);
        live.departures.extend(live.waiting.iter().map_while(departure));
        let sent = live.frames.send(self.ifindex, &live.departures);
        let mut waiting = live.waiting.drain(..);
        waiting.by_ref().take(sent).for_each(|packet| pool.put(packet.frame));
        // The call was interrupted: the program did not run for the rest.
        let Some(queue) = self.queues.first_mut() else { return waiting.for_each(|packet| pool.put(packet.frame)) };
        for packet in waiting {
            if let Err(refused) = queue.port.transmit(packet, pool) {
                pool.put(refused.frame);
            }
        }
    }

    /// Returns the sockets, to be closed.
    pub(crate) fn into_ports(mut self, pool: &mut Pool) -> Vec<XskPort> {
        self.depart(pool);
        self.queues.into_iter().map(|queue| queue.port).collect()
    }
}

impl Door for XdpCarrier {
    fn receive(&mut self, most: usize, room: &mut Room<'_>, arrivals: &mut Vec<Arrival>) -> io::Result<bool> {
        let arrivals = match &mut self.waiting {
            Some(waiting) if waiting.len() >= room.pool.total() / QUEUE_DIVISOR => return Ok(false),
            Some(waiting) => waiting,
            None => arrivals,
        };
        let (taken, more) = self.turns.take(self.queues.len(), most, |queue, most| {
            let queue = &mut self.queues[queue];
            let taken = queue.port.receive(&mut self.received, most, room.pool);
            prefetch(&self.received, room.umem);
            arrivals.extend(self.received.drain(..).filter_map(|packet| {
                let is_later_piece = std::mem::replace(&mut queue.in_chain, packet.more);
                arrival(packet, is_later_piece, self.ifindex, room)
            }));
            taken
        });
        self.traffic.received.fetch_add(taken as u64, Ordering::Relaxed);
        Ok(more)
    }

    fn send(&mut self, group: Group, route: &GroupRoute, room: &mut Room<'_>) -> usize {
        let mut group = group.into_iter();
        let mut sent = 0;
        for sealed in group.by_ref() {
            let Some(path) = &route.path else {
                room.pool.put(sealed.frame);
                break;
            };
            let ip_id = route.ip_id.wrapping_add(sent as u16);
            let packet = framed(sealed, route, path, ip_id, room.umem);
            if let Err(refused) = self.transmit(packet, path.share, room.pool) {
                room.pool.put(refused.frame);
                break;
            }
            sent += 1;
        }
        group.for_each(|sealed| room.pool.put(sealed.frame));
        self.traffic.sent.fetch_add(sent as u64, Ordering::Relaxed);
        sent
    }
}

impl XdpCarrier {
    /// Queues one frame for [`XdpCarrier::flush`]; returns it if there is no space.
    fn transmit(&mut self, packet: Packet, share: Share, pool: &mut Pool) -> Result<(), Packet> {
        if share == Share::Many
            && let Some(live) = &mut self.live
        {
            live.waiting.push(packet);
            if live.waiting.len() == LiveFrames::MAX_FRAMES {
                self.depart(pool);
            }
            return Ok(());
        }
        match self.queues.first_mut() {
            Some(queue) => queue.port.transmit(packet, pool),
            None => Err(packet),
        }
    }
}

/// Prefetches the start of the headers. Another core has just written them; if this is done for all packets of a batch
/// before the first is parsed, the cache misses overlap.
fn prefetch(packets: &[Packet], umem: &Umem) {
    for packet in packets {
        std::hint::black_box(packet.data(umem).first().copied());
    }
}

/// Returns the datagram in a frame from the device `ifindex`. Returns `None` for the later pieces of a frame that is
/// larger than a UMEM frame. Such a frame is a superframe, because each of our datagrams fits one; it counts once.
fn arrival(packet: Packet, is_later_piece: bool, ifindex: u32, room: &mut Room<'_>) -> Option<Arrival> {
    let frame = packet.data(room.umem);
    let found = if packet.more { outer::parse_front(frame) } else { outer::parse_frame(frame) };
    let Some(found) = found.filter(|_| !is_later_piece) else {
        // The XDP program redirects only frames that it has parsed, so this does not happen.
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
    let (to, from) = (zone::moved(found.to, ifindex), zone::moved(found.from, ifindex));
    Some(Arrival { to: Some(to), from, tos: found.tos, was_joined: false, via: Via::Card, datagram })
}

/// Writes the carrier headers in front of a datagram.
fn framed(sealed: Sealed, route: &GroupRoute, path: &Path, ip_id: u16, umem: &Umem) -> Packet {
    let Sealed { mut frame, datagram } = sealed;
    let end = datagram.end;
    let chunk = umem.chunk_mut(&mut frame);
    let addresses = (path.source, route.to);
    let start = outer::write_frame(chunk, datagram, path.hop, addresses, route.marks, ip_id, route.checksum);
    Packet { frame, offset: start as u32, len: (end - start) as u32, more: false }
}
