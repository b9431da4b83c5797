//! Sealed packets and handshake messages (docs/SEALED.md), in and out.
//!
//! A packet is sealed or opened by one call for itself, in its frame: AEADs need no lanes, so nothing is lent to other workers.

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;

use cipe_common::Verdict;

use super::inbound::Outer;
use super::moves::{self, KeyLife};
use super::packets::{Delivery, Form, Outgoing};
use super::{Datapath, OWN, want_handshake};
use crate::control::protocol::{Event, SealedEvent, SealedWanted};
use crate::engine::carrier::outer::FRESH;
use crate::engine::report::WorkerReport;
use crate::inner::ecn;
use crate::inner::payload::PayloadHeaders;
use crate::sealed::Refused;
use crate::sealed::gate::Passage;
use crate::sealed::message::RETRY;
use crate::sealed::packet::{self, Content, Epoch, Header, LowBits};
use crate::wire::message::Message;
use crate::wire::packet::Type;
use crate::xsk::Frame;

/// An answer to a handshake message that came without a cookie.
pub(super) struct Cookie {
    tunnel: u16,
    to: SocketAddr,
    datagram: [u8; RETRY],
}

/// What becomes of a datagram.
enum Fate {
    /// Its payload, at this place in the chunk, is delivered.
    Deliver(Range<usize>, PayloadHeaders),
    /// It ends here, under this verdict.
    Count(Verdict),
    /// The daemon judges it, and then it is counted.
    Judged,
}

impl From<Refused> for Fate {
    fn from(refused: Refused) -> Self {
        Self::Count(refused.into())
    }
}

impl Datapath {
    /// Handles a datagram that begins as a sealed one.
    pub(super) fn open_sealed(&mut self, number: u16, mut frame: Frame, datagram: &Range<usize>, outer: Outer) {
        let fate = match packet::parse(&self.umem.chunk(&frame)[datagram.clone()]) {
            Ok(Header::Packet(epoch, low)) => self.open_packet(number, (epoch, low), &mut frame, datagram, outer),
            Ok(Header::Handshake(_)) if datagram.len() >= packet::OVERHEAD => {
                self.judge_handshake(number, &frame, datagram, outer.from)
            }
            Ok(Header::Handshake(_)) => Fate::Count(Verdict::BadLength),
            Err(refused) => refused.into(),
        };
        if let Some(tunnel) = self.tunnels.get(&number) {
            match fate {
                Fate::Deliver(inner, headers) => {
                    let delivery = Delivery { tunnel: number, frame: Some(frame), inner, headers };
                    return self.deliveries.push(delivery);
                }
                Fate::Count(Verdict::BadLength) => tunnel.counters.bogus(datagram.len()),
                Fate::Count(verdict) => tunnel.counters.count(verdict),
                Fate::Judged => {}
            }
        }
        self.pool.put(frame);
    }

    /// Opens a packet. No state changes before its tag is verified.
    fn open_packet(
        &mut self,
        number: u16,
        (epoch, low): (Epoch, LowBits),
        frame: &mut Frame,
        datagram: &Range<usize>,
        outer: Outer,
    ) -> Fate {
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return Fate::Count(Verdict::TunnelDead) };
        let Some(sealed) = &tunnel.sealed else { return Fate::Count(Verdict::NoReceiveKey) };
        let opened = match sealed.keys().receive_key(epoch) {
            Some(key) => {
                self.tried += 1;
                key.key.open(low, &mut self.umem.chunk_mut(frame)[datagram.clone()]).map(|opened| (key, opened))
            }
            None => Err(Refused::NoKey),
        };
        let (key, (content, place)) = match opened {
            Ok(opened) => opened,
            Err(refused) => {
                if matches!(refused, Refused::NoKey | Refused::BadTag)
                    && sealed.shared.failed(sealed.keys().can_receive(), self.now)
                {
                    want_handshake(&self.reports, tunnel, SealedWanted::Receive, self.now);
                }
                return refused.into();
            }
        };
        let serial = key.serial;
        let report = |event| self.reports.try_send((number, WorkerReport::Event(Event::Sealed(event)))).is_ok();
        sealed.shared.opened();
        key.opened(|| report(SealedEvent::Opened { serial }));
        tunnel.common.note_heard();
        self.authentic.count(outer.via, datagram.len());
        let place = datagram.start + place.start..datagram.start + place.end;
        let payload = &mut self.umem.chunk_mut(frame)[place.clone()];
        let is_control = content == Content::Control;
        if is_control && moves::is_proof(tunnel, payload, outer.from, self.now) {
            self.moves.move_to(tunnel, outer.from, &mut self.targets);
            return Fate::Count(Verdict::ControlReceived);
        }
        if tunnel.peer != Some(outer.from) || tunnel.is_move_untold {
            self.moves.came_from(tunnel, outer.from, KeyLife::Session, &mut self.targets, self.now);
        }
        if !is_control {
            return match tunnel.check_sealed(payload) {
                Ok(mut headers) => {
                    // A frame without an IP packet has no ECN field.
                    let packet = headers.packet_mut(payload);
                    match packet.map_or(Ok(()), |(packet, headers)| ecn::decapsulate(packet, headers, outer.tos)) {
                        Ok(()) => Fate::Deliver(place, headers),
                        Err(verdict) => Fate::Count(verdict),
                    }
                }
                Err(verdict) => Fate::Count(verdict),
            };
        }
        if payload.is_empty() {
            let is_told = report(SealedEvent::Probed { serial });
            return Fate::Count(if is_told { Verdict::ControlReceived } else { Verdict::ControlFull });
        }
        match Message::parse(payload) {
            // Nothing but the handshake makes keys.
            Ok(message) if !message.is_stamped() => {
                let (payload, from) = ((&*payload).into(), outer.from);
                let event = Event::Control { payload, from, under_static: false, sealed: true };
                Fate::Count(self.control(number, &self.umem.chunk(frame)[place], event))
            }
            Ok(_) | Err(_) => Fate::Count(Verdict::BadMessage),
        }
    }

    /// Passes a handshake message with a right MAC on to the daemon. While many wait there or come, the sender of a first message
    /// must prove its address before.
    fn judge_handshake(&mut self, number: u16, frame: &Frame, datagram: &Range<usize>, from: SocketAddr) -> Fate {
        let Some(tunnel) = self.tunnels.get(&number) else { return Fate::Count(Verdict::TunnelDead) };
        let Some(sealed) = &tunnel.sealed else { return Fate::Count(Verdict::NoReceiveKey) };
        let (shared, octets) = (&sealed.shared, &self.umem.chunk(frame)[datagram.clone()]);
        let is_loaded = shared.is_loaded() || 2 * self.reports.capacity() < self.reports.max_capacity();
        let (source, now) = (octets_of(from), shared.gate_time(self.now));
        match shared.gate.judge(&shared.secrets, octets, &source, is_loaded, now, self.random.generator()) {
            Passage::Pass if !shared.may_pass_on(self.now) => Fate::Count(Verdict::ControlFull),
            Passage::Pass => {
                let from_peer = tunnel.peer == Some(from);
                let event = SealedEvent::Handshake { datagram: octets.into(), from, from_peer };
                match self.reports.try_send((number, WorkerReport::Event(Event::Sealed(event)))) {
                    Ok(()) => Fate::Judged,
                    Err(_) => Fate::Count(Verdict::ControlFull),
                }
            }
            Passage::Drop(refused) => refused.into(),
            Passage::Challenge(datagram) => {
                self.cookies.push(Cookie { tunnel: number, to: from, datagram });
                Refused::NoCookie.into()
            }
        }
    }

    /// Appends the answers with cookies to `outgoing`. Without a free frame one is not sent; the peer repeats its message.
    pub(super) fn queue_cookies(&mut self, outgoing: &mut Vec<Outgoing>) {
        for Cookie { tunnel, to, datagram } in std::mem::take(&mut self.cookies) {
            self.queue_handshake(tunnel, &datagram, Some(to), outgoing);
        }
    }

    /// Appends a handshake message to `outgoing`, for `to` or the peer, or counts a verdict.
    pub fn queue_handshake(
        &mut self,
        number: u16,
        datagram: &[u8],
        to: Option<SocketAddr>,
        outgoing: &mut Vec<Outgoing>,
    ) {
        let Some(tunnel) = self.tunnels.get(&number) else { return };
        let place = FRESH..FRESH + datagram.len();
        if place.end > self.umem.frame_size() as usize {
            return tunnel.counters.count(Verdict::ControlUnsent);
        }
        let Some(mut frame) = self.pool.take() else { return tunnel.counters.count(Verdict::ControlUnsent) };
        self.umem.chunk_mut(&mut frame)[place].copy_from_slice(datagram);
        let to = to.filter(|to| tunnel.peer != Some(*to)).map(Box::new);
        let out = Outgoing::new(number, frame, FRESH, datagram.len(), Type::Control, Form::Whole, OWN);
        self.append(Outgoing { to, ..out }, outgoing);
    }

    /// Seals a control packet without content, which confirms a session, and appends it to `outgoing`, or counts a verdict.
    pub fn seal_confirmation(&mut self, number: u16, outgoing: &mut Vec<Outgoing>) {
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return };
        tunnel.refresh(self.now);
        if !tunnel.sends_sealed() {
            return tunnel.counters.count(Verdict::ControlUnsent);
        }
        let Some(frame) = self.pool.take() else { return tunnel.counters.count(Verdict::ControlUnsent) };
        self.append(Outgoing::new(number, frame, FRESH, 0, Type::Control, Form::Sealed, OWN), outgoing);
    }

    fn append(&mut self, out: Outgoing, outgoing: &mut Vec<Outgoing>) {
        let first = outgoing.len();
        outgoing.push(out);
        self.seal_from(first, outgoing);
    }

    /// Seals those of `outgoing` that leave sealed. Each run of one tunnel takes its counters at once. If the key was removed after
    /// admission, or has no more counters, a packet is not ready to be sent.
    pub(super) fn seal_packets(&mut self, outgoing: &mut [Outgoing]) {
        for run in outgoing.chunk_by_mut(|a, b| (a.tunnel, a.form) == (b.tunnel, b.form)) {
            let Some(tunnel) = self.tunnels.get(&run[0].tunnel).filter(|_| run[0].form == Form::Sealed) else {
                continue;
            };
            let Some(send) = tunnel.sealed.as_ref().and_then(|sealed| sealed.keys().send.as_ref()) else { continue };
            let mut batch = send.key.batch(run.len() as u64);
            let mut has_content = false;
            for out in run {
                let content = match out.kind {
                    Type::Data => Content::Data,
                    Type::Control => Content::Control,
                };
                let datagram = &mut self.umem.chunk_mut(&mut out.frame)[out.datagram.clone()];
                out.ready = batch.seal(content, datagram, out.octets).is_some();
                has_content |= out.octets > 0;
                if out.ready {
                    self.remember(out);
                }
            }
            // The age alone asks for nothing: an idle tunnel makes no new keys.
            if has_content && send.is_due() {
                want_handshake(&self.reports, tunnel, SealedWanted::Send, self.now);
            }
        }
    }
}

/// The octets of an address and port, for a cookie.
fn octets_of(source: SocketAddr) -> [u8; 18] {
    let ip = match source.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    };
    let mut octets = [0; 18];
    octets[..16].copy_from_slice(&ip.octets());
    octets[16..].copy_from_slice(&source.port().to_be_bytes());
    octets
}
