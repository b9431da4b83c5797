//! Carrier to private: found in its frame, opened there, judged, and sent on to the tunnel device from there.

mod opener;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::crew::{Chunk, Packets};
use super::packets::{Delivery, Incoming};
use super::{BATCH, Report, Worker, want};
use crate::control::protocol::{Event, Protocol};
use crate::engine::carrier::socks;
use crate::engine::carrier::{Arrival, Door, Room};
use crate::engine::tunnel::Opened;
use crate::inner::{ecn, ethernet};
use crate::wire::clear;
use crate::xsk::Frame;
use opener::Opener;

/// Datagrams taken in at once where other workers can open some of them.
const SHARED: usize = 4 * BATCH;

impl Worker {
    /// Takes one batch from a carrier device; returns whether there may be more.
    pub(super) fn inbound_carrier(&mut self, slot: usize) -> bool {
        // More than one batch only where there are others to open it.
        let most = if self.crew.has_help(self.number) { SHARED } else { BATCH };
        let Some(Some(carrier)) = self.carriers.get_mut(slot) else { return false };
        let mut room = Room { umem: &self.umem, pool: &mut self.pool, inbox: &mut self.inbox, sight: &mut self.sight };
        let more = carrier.receive(most, &mut room, &mut self.arrivals);
        self.take_in(None);
        more.unwrap_or(false)
    }

    /// Takes one batch from a tunnel's own UDP socket: superframes, fragments, other devices, carriers without AF_XDP.
    /// Returns whether there may be more.
    pub(super) fn inbound_udp(&mut self, number: u16) -> bool {
        if self.sockets_held {
            return false;
        }
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return false };
        let mut room = Room { umem: &self.umem, pool: &mut self.pool, inbox: &mut self.inbox, sight: &mut self.sight };
        match endpoint.tunnel.udp.receive(BATCH, &mut room, &mut self.arrivals) {
            Ok(more) => {
                self.tell_of_single_frames(number);
                self.take_in(Some(number));
                more
            }
            // Nothing there but the error of an earlier datagram.
            Err(error) => {
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    tracing::debug!("tunnel {number}: {error}");
                }
                self.hear_errors(number);
                false
            }
        }
    }

    /// Opens what has arrived and delivers it. What bears no address of its own is for the tunnel `of_socket`.
    pub(super) fn take_in(&mut self, of_socket: Option<u16>) {
        let mut arrivals = std::mem::take(&mut self.arrivals);
        let mut owners = std::mem::take(&mut self.owners);
        owners.extend(arrivals.iter().map(|arrival| arrival.to.map_or(of_socket, |to| self.owner(to))));
        for of_one in owners.chunk_by(|a, b| a == b) {
            if let Some(endpoint) = of_one[0].and_then(|number| self.endpoints.get(&number)) {
                endpoint.tunnel.warm(Slot::Receive);
            }
        }
        for (Arrival { from, tos, was_joined, datagram, .. }, owner) in arrivals.drain(..).zip(owners.drain(..)) {
            let endpoint = owner.and_then(|number| Some((number, self.endpoints.get(&number)?)));
            if let Some((_, endpoint)) = endpoint.filter(|_| was_joined) {
                endpoint.tunnel.counters.count(Verdict::Fragmented);
            }
            match (endpoint, datagram) {
                (Some((number, endpoint)), Ok((frame, place))) if endpoint.tunnel.socks => {
                    self.unwrap_relayed(number, frame, place, (from, tos));
                }
                (Some((number, _)), Ok((frame, place))) => self.classify(number, frame, place, (from, tos)),
                (Some((_, endpoint)), Err(verdict)) => endpoint.tunnel.counters.count(verdict),
                // The tunnel has gone since, and took its counters along.
                (None, Ok((frame, _))) => self.pool.put(frame),
                (None, Err(_)) => {}
            }
        }
        self.arrivals = arrivals;
        self.owners = owners;
        self.open_incoming();
    }

    /// Takes off what a SOCKS5 relay puts in front of a datagram; drops what is not from the relay.
    fn unwrap_relayed(&mut self, number: u16, frame: Frame, datagram: Range<usize>, (from, tos): (SocketAddr, u8)) {
        let Some(endpoint) = self.endpoints.get(&number) else { return self.pool.put(frame) };
        let tunnel = &endpoint.tunnel;
        let origin = socks::parse(&self.umem.chunk(&frame)[datagram.clone()]);
        match origin.filter(|_| tunnel.relay == Some(from)) {
            Some(origin) => {
                self.classify(number, frame, datagram.start + socks::HEADER..datagram.end, (origin, tos));
            }
            None => {
                tunnel.counters.count(Verdict::BadRelay);
                self.pool.put(frame);
            }
        }
    }

    fn owner(&self, to: SocketAddr) -> Option<u16> {
        let any = match to {
            SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        };
        self.addresses.get(&to).or_else(|| self.addresses.get(&SocketAddr::new(any, to.port())))
    }

    /// Chooses the key for a datagram, which came from this address with this TOS, or drops it.
    fn classify(&mut self, number: u16, frame: Frame, datagram: Range<usize>, (from, tos): (SocketAddr, u8)) {
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return self.pool.put(frame) };
        let tunnel = &mut endpoint.tunnel;
        let octets = &self.umem.chunk(&frame)[datagram.clone()];
        let slot = if tunnel.pinned && tunnel.peer != Some(from) {
            Err(Verdict::WrongPeer)
        } else if clear::is_clear(octets) {
            if tunnel.common.may_pass_on_clear(self.now) {
                let event = Event::Clear { datagram: hex::encode(octets), from };
                // One that is lost comes again.
                let _ = self.reports.try_send((number, Report::Event(event)));
            }
            Err(Verdict::ClearControl)
        } else if tunnel.nokey {
            Ok(None)
        } else {
            tunnel.keys.refresh(self.now);
            tunnel.slot_for(octets).map(Some)
        };
        match slot {
            Ok(slot) => {
                let head = std::array::from_fn(|i| octets.get(i).copied().unwrap_or(0));
                self.incoming.push(Incoming { tunnel: number, frame, datagram, from, tos, head, slot });
            }
            Err(verdict) => {
                match verdict {
                    Verdict::BadLength => tunnel.counters.bogus(octets.len()),
                    _ => tunnel.counters.count(verdict),
                }
                self.pool.put(frame);
                if verdict == Verdict::NoReceiveKey && tunnel.peer.is_none() {
                    tunnel.common.note_asker(from);
                }
                if verdict == Verdict::NoReceiveKey
                    && let Some(reason) = tunnel.receiving(self.now)
                {
                    want(&self.reports, tunnel, reason);
                }
            }
        }
    }

    fn open_incoming(&mut self) {
        let mut incoming = std::mem::take(&mut self.incoming);
        let mut opened = std::mem::take(&mut self.opened);
        self.moved += incoming.len();
        let mut opener = Opener { endpoints: &self.endpoints, umem: &self.umem, lanes: &mut self.lanes };
        if incoming.len() > BATCH && self.crew.has_help(self.number) {
            let chunks = Chunk::cut(&mut incoming, Packets::Incoming, |item| opener.key_of(item));
            for chunk in self.crew.work(self.number, chunks, opener.umem, opener.lanes) {
                if let Packets::Incoming(packets) = chunk.packets {
                    incoming.extend(packets);
                }
            }
        } else {
            opener.decrypt(&mut incoming);
        }
        opener.judge_all(&mut incoming, &mut opened);
        for (item, opened) in incoming.drain(..).zip(opened.drain(..)) {
            self.conclude(item, opened);
        }
        self.incoming = incoming;
        self.opened = opened;
        self.deliver();
    }

    /// Hands one judged datagram on.
    fn conclude(&mut self, mut item: Incoming, opened: Result<Opened, Verdict>) {
        let number = item.tunnel;
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return self.pool.put(item.frame) };
        let tunnel = &mut endpoint.tunnel;
        let is_dynamic = matches!(item.slot, Some(Slot::Receive | Slot::Previous));
        let verdict = match opened {
            Ok(opened) => {
                if is_dynamic {
                    tunnel.common.opened();
                }
                if tunnel.peer != Some(item.from) {
                    tunnel.set_peer(item.from);
                    // Without the event the way stays as it is now.
                    let report = Report::NewPeer { peer: item.from, worker: self.number };
                    let _ = self.reports.try_send((number, report));
                }
                if item.slot == Some(Slot::Receive)
                    && let Some(reason) = tunnel.receiving(self.now)
                {
                    want(&self.reports, tunnel, reason);
                }
                let at = item.datagram.start;
                match opened {
                    Opened::Data(range) => {
                        let inner = at + range.start..at + range.end;
                        let octets = &mut self.umem.chunk_mut(&mut item.frame)[inner.clone()];
                        // In a frame only an IP packet has the field.
                        let packet = match tunnel.protocol {
                            Protocol::Ip => octets,
                            Protocol::Ethernet => ethernet::ip_of(octets),
                        };
                        match ecn::decapsulate(packet, item.tos) {
                            Ok(()) => {
                                return self.deliveries.push(Delivery {
                                    tunnel: number,
                                    frame: Some(item.frame),
                                    inner,
                                });
                            }
                            Err(verdict) => verdict,
                        }
                    }
                    Opened::Control(range)
                        if self.is_answer(number, &self.umem.chunk(&item.frame)[at + range.start..at + range.end]) =>
                    {
                        Verdict::ControlReceived
                    }
                    Opened::Control(range) => {
                        let message = &self.umem.chunk(&item.frame)[at + range.start..at + range.end];
                        let event = Event::Control {
                            payload: hex::encode(message),
                            from: item.from,
                            under_static: item.slot == Some(Slot::Static),
                        };
                        match self.reports.try_send((number, Report::Event(event))) {
                            Ok(()) => Verdict::ControlReceived,
                            Err(_) => Verdict::ControlFull,
                        }
                    }
                }
            }
            Err(verdict) => {
                if verdict == Verdict::BadCrc
                    && is_dynamic
                    && let Some(reason) = tunnel.undecryptable(self.now)
                {
                    want(&self.reports, tunnel, reason);
                }
                let datagram = || &self.umem.chunk(&item.frame)[item.datagram.clone()];
                let why = (verdict == Verdict::BadInner).then(|| tunnel.explain(datagram())).flatten();
                if let Some(message) = why.map(str::to_owned) {
                    // Without the line, the counter tells.
                    let event = Event::Notice { message, well: false };
                    let _ = self.reports.try_send((number, Report::Event(event)));
                }
                verdict
            }
        };
        if let Some(endpoint) = self.endpoints.get(&number) {
            endpoint.tunnel.counters.count(verdict);
        }
        self.pool.put(item.frame);
    }
}
