//! Seals the daemon's control messages, and the engine's own pings, for the carrier.

use std::net::SocketAddr;
use std::time::SystemTime;

use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::moves::Question;
use super::packets::{Form, Outgoing};
use super::{Datapath, OWN, want_handshake};
use crate::control::protocol::{MessageOctets, SealedWanted, Under};
use crate::engine::carrier::Ask;
use crate::engine::carrier::outer::{FRESH, Marks};
use crate::engine::tunnel::path_probe;
use crate::inner::headers::IpVersion;
use crate::wire::clear;
use crate::wire::message::Message;
use crate::wire::packet::{self, KeyKind, Type};

/// A control message of the daemon.
pub struct ControlMessage {
    /// The message, without padding.
    pub octets: MessageOctets,
    /// The key to seal it with.
    pub under: Under,
    /// The message announces a key. From here on, packets under the static key count for that key.
    pub announces: bool,
}

/// Datagrams in a group that tests whether groups arrive.
const GROUP_DATAGRAMS: usize = 3;

/// Octets of a ping to a peer that may not be ours. Its own messages can be that large.
const MIN_PING_OCTETS: usize = 160;

impl Datapath {
    /// Seals a message of the daemon and appends it to `outgoing`, or counts a verdict. Under the static key it also goes to the
    /// last candidate for the peer's address, so that a peer that has no other key gets one before the proof. A CT_PONG does
    /// not: it would prove our address to be that of somebody who only passes the peer's CT_PING on.
    pub fn seal_message(&mut self, number: u16, message: &ControlMessage, outgoing: &mut Vec<Outgoing>) {
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return };
        tunnel.refresh(self.now);
        let octets = &message.octets[..];
        let is_pong = matches!(Message::parse(octets), Ok(Message::Pong(_)));
        let slot = match message.under {
            _ if !tunnel.sends_unsealed() => None,
            Under::Live => tunnel.keys.sending(),
            Under::Static | Under::Retired(_) => tunnel.keys.get(Slot::Static).map(|_| Slot::Static),
        };
        let form = if tunnel.sends_sealed() { Some(Form::Sealed) } else { slot.map(Form::Keyed) };
        let fits = |form: Form| form.datagram(FRESH, octets.len()).end <= self.umem.frame_size() as usize;
        let taken = match form {
            _ if is_pong && tunnel.peer.is_none() => Err(Verdict::NoPeer),
            None => Err(Verdict::NoSendKey),
            Some(form) if !fits(form) => Err(Verdict::TooBig),
            Some(form) => self.pool.take().ok_or(Verdict::NoFrame).map(|frame| (form, frame)),
        };
        let (form, mut frame) = match taken {
            Ok(taken) => taken,
            Err(verdict) => {
                tunnel.counters.count(Verdict::ControlUnsent);
                if verdict == Verdict::NoSendKey && !tunnel.sends_unsealed() {
                    want_handshake(&self.reports, tunnel, SealedWanted::Send, self.now);
                }
                return;
            }
        };
        if message.announces {
            tunnel.common.count_from_here();
        }
        let chunk = self.umem.chunk_mut(&mut frame);
        chunk[FRESH..FRESH + octets.len()].copy_from_slice(octets);
        let out = match &message.under {
            _ if form == Form::Sealed => Outgoing::new(number, frame, FRESH, octets.len(), Type::Control, form, OWN),
            // No slot holds a retired key, so the message is sealed here and sent without further encryption.
            Under::Retired(key) => {
                let key = tunnel.keys.expand(key);
                let iv = packet::draw_iv(KeyKind::Dynamic, || self.random.octets());
                let (at, filler) = (FRESH - packet::IV, self.random.octets());
                let packet = &mut chunk[at..];
                let sealed = packet::seal(&mut self.lanes, &key, packet, octets.len(), Type::Control, iv, filler);
                Outgoing::new(number, frame, at, sealed, Type::Control, Form::Whole, OWN)
            }
            Under::Live | Under::Static => Outgoing::new(number, frame, FRESH, octets.len(), Type::Control, form, OWN),
        };
        let is_for_anybody = slot == Some(Slot::Static) && !is_pong;
        let candidate = tunnel.common.challenge.candidate(self.now).filter(|_| is_for_anybody);
        let candidate = tunnel.peer.and_then(|peer| candidate.filter(|candidate| *candidate != peer));
        let first = outgoing.len();
        outgoing.push(out);
        self.seal_from(first, outgoing);
        let copy = candidate.zip(outgoing.get(first)).and_then(|(to, out)| self.copy(out, to));
        outgoing.extend(copy);
    }

    /// Copies a sealed message for another address; `None` if there is no frame.
    fn copy(&mut self, out: &Outgoing, to: SocketAddr) -> Option<Outgoing> {
        let mut frame = self.pool.take()?;
        let place = out.datagram.clone();
        self.umem.chunk_mut(&mut frame)[place.clone()].copy_from_slice(&self.umem.chunk(&out.frame)[place]);
        let (datagram, to) = (out.datagram.clone(), Some(Box::new(to)));
        Some(Outgoing { frame, datagram, headers: None, inside: None, to, ..*out })
    }

    /// Seals the questions to addresses where peers may be now, and appends them to `outgoing`, as well as answers with cookies.
    /// Without a free frame one is not sent; the next packet from there causes another. If packets leave sealed only, one waits for
    /// the send key: the first packet of a session comes before it is in use here.
    pub fn seal_challenges(&mut self, outgoing: &mut Vec<Outgoing>) {
        self.queue_cookies(outgoing);
        for question in std::mem::take(&mut self.moves.questions) {
            let Question { tunnel: number, to, mark, until } = question;
            let Some(tunnel) = self.tunnels.get_mut(&number) else { continue };
            tunnel.refresh(self.now);
            let form = if tunnel.nokey {
                Form::Whole
            } else if tunnel.sends_sealed() {
                Form::Sealed
            } else if tunnel.sends_unsealed() && tunnel.keys.get(Slot::Static).is_some() {
                Form::Keyed(Slot::Static)
            } else {
                if until > self.now && !tunnel.sends_unsealed() {
                    self.moves.questions.push(question);
                }
                continue;
            };
            let Some(mut frame) = self.pool.take() else { continue };
            let (ping, random) = (Message::Ping(&mark), self.random.generator());
            let message = match form {
                Form::Keyed(_) => ping.build(unix_time(), random),
                Form::Whole => clear::datagram(&ping, unix_time(), random).into(),
                Form::Sealed => ping.bare().into(),
            };
            let octets = message.len();
            self.umem.chunk_mut(&mut frame)[FRESH..FRESH + octets].copy_from_slice(&message);
            let out = Outgoing::new(number, frame, FRESH, octets, Type::Control, form, OWN);
            let first = outgoing.len();
            outgoing.push(Outgoing { to: Some(Box::new(to)), ..out });
            self.seal_from(first, outgoing);
        }
    }

    /// Whether there are such questions, or answers with cookies ([`Self::queue_cookies`]).
    pub fn has_challenges(&self) -> bool {
        !self.moves.questions.is_empty() || !self.cookies.is_empty()
    }

    /// Seals pings that test whether groups of datagrams reach the peer, and appends them to `outgoing`. Without a dynamic key it
    /// sends nothing, and the test counts as unanswered.
    pub fn seal_question(&mut self, number: u16, ask: Ask, outgoing: &mut Vec<Outgoing>) {
        let (mark, count) = match ask {
            Ask::Group(mark) => (mark, GROUP_DATAGRAMS),
            Ask::Alone(mark) => (mark, 1),
        };
        // The pings are as large as data packets, since a card or a hypervisor may fail to segment groups of that size.
        let Some(tunnel) = self.tunnels.get(&number) else { return };
        let octets =
            if tunnel.has_our_peer() { tunnel.mtu.of(IpVersion::V4).max(MIN_PING_OCTETS) } else { MIN_PING_OCTETS };
        self.seal_pings(number, &mark, (count, octets), OWN, outgoing);
    }

    /// Seals a CT_PING with DF that is as large as the carrier path of a tunnel allows, and appends it to `outgoing`. Without a
    /// dynamic key it sends nothing, and the probe counts as unanswered.
    pub fn seal_path_probe(&mut self, number: u16, mark: &path_probe::Mark, outgoing: &mut Vec<Outgoing>) {
        let Some(tunnel) = self.tunnels.get(&number) else { return };
        let octets = tunnel.mtu.of(IpVersion::V4).max(MIN_PING_OCTETS);
        self.seal_pings(number, mark, (1, octets), Marks { dont_fragment: true, ..OWN }, outgoing);
    }

    fn seal_pings(
        &mut self,
        number: u16,
        mark: &[u8],
        (count, octets): (usize, usize),
        marks: Marks,
        outgoing: &mut Vec<Outgoing>,
    ) {
        let Some(tunnel) = self.tunnels.get_mut(&number) else { return };
        tunnel.refresh(self.now);
        let form = match tunnel.keys.sending() {
            _ if tunnel.sends_sealed() => Form::Sealed,
            Some(Slot::Send) if tunnel.sends_unsealed() => Form::Keyed(Slot::Send),
            _ => return,
        };
        let first = outgoing.len();
        for _ in 0..count {
            let Some(mut frame) = self.pool.take() else { break };
            let mut message = match form {
                Form::Sealed => Message::Ping(mark).bare().into(),
                _ => Message::Ping(mark).build(unix_time(), self.random.generator()),
            };
            message.resize(octets, 0);
            self.umem.chunk_mut(&mut frame)[FRESH..FRESH + octets].copy_from_slice(&message);
            outgoing.push(Outgoing::new(number, frame, FRESH, octets, Type::Control, form, marks));
        }
        self.seal_from(first, outgoing);
    }
}

/// Returns the time in seconds since 1970.
fn unix_time() -> u32 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs() as u32)
}
