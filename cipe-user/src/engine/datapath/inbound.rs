//! Carrier to private: classifies datagrams, decrypts and checks them in their frames.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::time::Duration;

use cipe_common::Verdict;
use cipe_common::maps::Slot;
use zeroize::Zeroize;

use super::crew::{Chunk, Packets};
use super::moves;
use super::opener::Opener;
use super::packets::{Delivery, Incoming};
use super::{Datapath, want, want_handshake};
use crate::control::protocol::{Event, SealedWanted};
use crate::engine::BATCH;
use crate::engine::carrier::{Arrival, Via, socks};
use crate::engine::report::WorkerReport;
use crate::engine::tunnel::Opened;
use crate::engine::tunnel::sealed::SealedView;
use crate::inner::ecn;
use crate::sealed::packet;
use crate::wire::clear;
use crate::wire::message::Message;
use crate::xsk::Frame;

/// Minimum time between two reports of a flood by one worker.
const MIN_FLOOD_REPORT_INTERVAL: Duration = Duration::from_millis(20);

impl Datapath {
    /// Opens the datagrams that have arrived, and queues their packets for [`Datapath::deliver`]. A datagram without a destination
    /// address belongs to the tunnel `of_socket`. Returns the number of datagrams that were decrypted, valid or not.
    pub fn open(&mut self, arrivals: &mut Vec<Arrival>, of_socket: Option<u16>) -> usize {
        let mut owners = std::mem::take(&mut self.owners);
        owners.extend(arrivals.iter().map(|arrival| arrival.to.map_or(of_socket, |to| self.owner(to))));
        for of_one in owners.chunk_by(|a, b| a == b) {
            if let Some(tunnel) = of_one[0].and_then(|number| self.tunnels.get(&number)) {
                tunnel.prefetch(Slot::Receive);
            }
        }
        for (Arrival { from, tos, was_joined, via, datagram, .. }, owner) in arrivals.drain(..).zip(owners.drain(..)) {
            let tunnel = owner.and_then(|number| self.tunnels.get(&number));
            if let Some(tunnel) = tunnel.filter(|_| was_joined) {
                tunnel.counters.count(Verdict::Fragmented);
            }
            match (tunnel, datagram) {
                (Some(tunnel), Ok((frame, place))) if tunnel.socks => {
                    let number = tunnel.number;
                    self.unwrap_relayed(number, frame, place, Outer { from, tos, via });
                }
                (Some(tunnel), Ok((frame, place))) => {
                    let number = tunnel.number;
                    self.classify(number, frame, place, Outer { from, tos, via });
                }
                (Some(tunnel), Err(verdict)) => tunnel.counters.count(verdict),
                // The tunnel was removed, and its counters with it.
                (None, Ok((frame, _))) => self.pool.put(frame),
                (None, Err(_)) => {}
            }
        }
        self.owners = owners;
        self.open_incoming() + std::mem::take(&mut self.tried)
    }

    /// Removes the SOCKS5 relay's header from a datagram. Drops a datagram that is not from the relay.
    fn unwrap_relayed(&mut self, number: u16, frame: Frame, datagram: Range<usize>, outer: Outer) {
        let Some(tunnel) = self.tunnels.get(&number) else { return self.pool.put(frame) };
        let origin = socks::parse(&self.umem.chunk(&frame)[datagram.clone()]);
        match origin.filter(|_| tunnel.relay == Some(outer.from)) {
            Some(from) => {
                let datagram = datagram.start + socks::HEADER..datagram.end;
                self.classify(number, frame, datagram, Outer { from, ..outer });
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

    /// Chooses the key for a datagram, or drops it.
    fn classify(&mut self, number: u16, frame: Frame, datagram: Range<usize>, outer: Outer) {
        let Outer { from, tos, via } = outer;
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return self.pool.put(frame) };
        tunnel.refresh(self.now);
        let octets = &self.umem.chunk(&frame)[datagram.clone()];
        let keys = tunnel.sealed.as_ref().map(SealedView::keys);
        let slot = if tunnel.is_orphaned {
            Err(Verdict::TunnelDead)
        } else if tunnel.pinned && tunnel.peer != Some(from) {
            Err(Verdict::WrongPeer)
        } else if keys.is_some() && packet::is_sealed(octets) {
            return self.open_sealed(number, frame, &datagram, outer);
        } else if keys.is_some_and(|keys| !keys.unsealed.accepts) {
            Err(Verdict::Unsealed)
        } else if clear::is_clear(octets) {
            if moves::is_clear_proof(tunnel, octets, from, self.now) {
                self.moves.move_to(tunnel, from, &mut self.targets);
            } else if tunnel.common.may_pass_on_clear(self.now) {
                let event = Event::Clear { datagram: octets.into(), from };
                // If the queue is full, the event is lost; the peer repeats its message.
                let _ = self.reports.try_send((number, WorkerReport::Event(event)));
            } else if !tunnel.nokey {
                let before = self.refused_in_clear.map_or(0, |(count, _)| count);
                self.refused_in_clear = Some((before + 1, number));
            }
            Err(Verdict::ClearControl)
        } else if tunnel.nokey {
            Ok(None)
        } else {
            tunnel.slot_for(octets).map(Some)
        };
        match slot {
            Ok(slot) => {
                let head = std::array::from_fn(|i| octets.get(i).copied().unwrap_or(0));
                self.incoming.push(Incoming { tunnel: number, frame, datagram, from, tos, head, slot, via });
            }
            Err(verdict) => {
                match verdict {
                    Verdict::BadLength => tunnel.counters.bogus(octets.len()),
                    _ => tunnel.counters.count(verdict),
                }
                self.pool.put(frame);
                if verdict == Verdict::Unsealed {
                    want_handshake(&self.reports, tunnel, SealedWanted::Unsealed, self.now);
                }
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

    fn open_incoming(&mut self) -> usize {
        let mut incoming = std::mem::take(&mut self.incoming);
        let mut opened = std::mem::take(&mut self.opened);
        let count = incoming.len();
        let mut opener = Opener { tunnels: &self.tunnels, umem: &self.umem, lanes: &mut self.lanes };
        let refused = if self.suspicion.is_on() { opener.sieve(&mut incoming) } else { Vec::new() };
        if incoming.len() > BATCH && self.crew.has_help(self.number) {
            let chunks = Chunk::cut(incoming.drain(..), Packets::Incoming, |item| opener.key_of(item));
            for chunk in self.crew.work(self.number, chunks, opener.umem, opener.lanes) {
                if let Packets::Incoming(packets) = chunk.packets {
                    incoming.extend(packets);
                }
            }
        } else {
            opener.decrypt(&mut incoming);
        }
        opener.judge_all(&mut incoming, &mut opened);
        let failed = opened.iter().filter(|opened| **opened == Err(Verdict::BadCrc)).count();
        let in_clear = self.refused_in_clear.take();
        let failed_early = refused.len() + in_clear.map_or(0, |(count, _)| count);
        self.suspicion.count(failed_early + failed, incoming.len() - failed, self.now);
        let of_flood = refused.first().map(|item| item.tunnel).or(in_clear.map(|(_, tunnel)| tunnel));
        if let Some(tunnel) = of_flood.filter(|_| self.suspicion.is_on()) {
            self.report_flood(tunnel);
        }
        refused.into_iter().for_each(|item| self.conclude(item, Err(Verdict::BadCrc)));
        for (item, opened) in incoming.drain(..).zip(opened.drain(..)) {
            self.conclude(item, opened);
        }
        self.incoming = incoming;
        self.opened = opened;
        count
    }

    /// Reports, at a limited rate, that many datagrams come that no key opens; `number`: the tunnel of one of them. If the queue is
    /// full, the next batch reports it.
    fn report_flood(&mut self, number: u16) {
        if self.flood_reported.is_none_or(|last| self.now.duration_since(last) >= MIN_FLOOD_REPORT_INTERVAL)
            && self.reports.try_send((number, WorkerReport::Flooded)).is_ok()
        {
            self.flood_reported = Some(self.now);
        }
    }

    /// Queues the packet of one opened datagram, passes on its message, or counts a verdict.
    fn conclude(&mut self, mut item: Incoming, opened: Result<Opened, Verdict>) {
        let number = item.tunnel;
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return self.pool.put(item.frame) };
        let is_dynamic = matches!(item.slot, Some(Slot::Receive | Slot::Previous));
        let at = item.datagram.start;
        let verdict = match opened {
            Ok(opened) => {
                if is_dynamic {
                    tunnel.common.opened();
                }
                tunnel.common.note_heard();
                self.authentic.count(item.via, item.datagram.len());
                let datagram = &self.umem.chunk(&item.frame)[item.datagram.clone()];
                if let Opened::Control(message) = &opened
                    && moves::is_proof(tunnel, &datagram[message.clone()], item.from, self.now)
                {
                    self.moves.move_to(tunnel, item.from, &mut self.targets);
                    tunnel.counters.count(Verdict::ControlReceived);
                    return self.pool.put(item.frame);
                }
                if tunnel.peer != Some(item.from) || tunnel.is_move_untold {
                    self.moves.came_from(tunnel, item.from, item.slot.into(), &mut self.targets, self.now);
                }
                if item.slot == Some(Slot::Receive)
                    && let Some(reason) = tunnel.receiving(self.now)
                {
                    want(&self.reports, tunnel, reason);
                }
                match opened {
                    Opened::Data(range, mut headers) => {
                        let inner = at + range.start..at + range.end;
                        let octets = &mut self.umem.chunk_mut(&mut item.frame)[inner.clone()];
                        // A frame without an IP packet has no ECN field.
                        let packet = headers.packet_mut(octets);
                        match packet.map_or(Ok(()), |(packet, headers)| ecn::decapsulate(packet, headers, item.tos)) {
                            Ok(()) => {
                                let delivery = Delivery { tunnel: number, frame: Some(item.frame), inner, headers };
                                return self.deliveries.push(delivery);
                            }
                            Err(verdict) => verdict,
                        }
                    }
                    Opened::Control(range) => {
                        let octets = at + range.start..at + range.end;
                        let message = &self.umem.chunk(&item.frame)[octets.clone()];
                        let (payload, under_static) = (message.into(), item.slot == Some(Slot::Static));
                        let event = Event::Control { payload, from: item.from, under_static, sealed: false };
                        let verdict = self.control(number, message, event);
                        // It may hold a key, and the frame may wait for long until it is used again.
                        self.umem.chunk_mut(&mut item.frame)[octets].zeroize();
                        verdict
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
                    self.note(number, message, false);
                }
                // A copy of a message with a key opens, too.
                if matches!(verdict, Verdict::Replayed | Verdict::Reflected | Verdict::NoReceiveKey) {
                    self.umem.chunk_mut(&mut item.frame)[item.datagram.clone()].zeroize();
                }
                verdict
            }
        };
        if let Some(tunnel) = self.tunnels.get(&number) {
            tunnel.counters.count(verdict);
        }
        self.pool.put(item.frame);
    }

    /// Handles the answer to one of the engine's own pings, or passes a message on to the daemon by `event`. Returns the verdict.
    pub(super) fn control(&self, number: u16, message: &[u8], event: Event) -> Verdict {
        if let Some(tunnel) = self.tunnels.get(&number)
            && let Ok(Message::Pong(mark)) = Message::parse(message)
        {
            if tunnel.common.path_probe.answered(mark, self.now) {
                return Verdict::ControlReceived;
            }
            if let Some(change) = tunnel.segmentation.answered(mark, self.now) {
                if let Some(change) = change {
                    self.note_change(number, change);
                }
                return Verdict::ControlReceived;
            }
        }
        match self.reports.try_send((number, WorkerReport::Event(event))) {
            Ok(()) => Verdict::ControlReceived,
            Err(_) => Verdict::ControlFull,
        }
    }
}

/// The outer header of a datagram, and how it came.
#[derive(Clone, Copy)]
pub(super) struct Outer {
    pub(super) from: SocketAddr,
    pub(super) tos: u8,
    pub(super) via: Via,
}
