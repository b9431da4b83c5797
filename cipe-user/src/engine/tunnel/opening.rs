//! Decrypts datagrams from the carrier: selects the key, and checks the result.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::Tunnel;
use crate::control::protocol::Protocol;
use crate::engine::{BATCH, locked};
use crate::inner::ethernet;
use crate::inner::ip;
use crate::inner::payload::PayloadHeaders;
use crate::wire::packet::{self, KeyKind, Type};

/// IV and first cipher block of a datagram, which identify it in the replay filter.
pub(crate) type Head = [u8; 16];

/// The contents of a decrypted packet.
#[derive(Debug, PartialEq, Eq)]
pub enum Opened {
    /// An inner IP packet or Ethernet frame, at this place in the datagram, and what was read of it.
    Data(Range<usize>, PayloadHeaders),
    /// A key-exchange or control message, in this range of the datagram.
    Control(Range<usize>),
}

impl Opened {
    /// The length in octets.
    fn octets(&self) -> usize {
        let (Self::Data(place, _) | Self::Control(place)) = self;
        place.len()
    }
}

const SENDS_FRAMES: &str = "the peer sends Ethernet frames (protocol 4), and this end takes IP packets (protocol 3): nothing is delivered; \
    run ciped-cb or ciped-ci at both ends, or ciped-db or ciped-di at both";
const SENDS_IP: &str = "the peer sends IP packets (protocol 3), and this end takes Ethernet frames (protocol 4): nothing is delivered; \
    run ciped-db or ciped-di at both ends, or ciped-cb or ciped-ci at both";

/// Packets of a batch that have passed all checks except the replay check: their heads, and their results.
pub(crate) type Candidates<'a> = ArrayVec<(&'a Head, &'a mut Result<Opened, Verdict>), BATCH>;

impl Tunnel {
    /// Returns the slot of the key for a datagram, by its length and key flag.
    ///
    /// # Errors
    /// [`Verdict::BadLength`] or [`Verdict::NoReceiveKey`].
    pub fn slot_for(&self, datagram: &[u8]) -> Result<Slot, Verdict> {
        if datagram.len() < packet::MIN || !datagram.len().is_multiple_of(8) {
            return Err(Verdict::BadLength);
        }
        match KeyKind::of(datagram[0]) {
            KeyKind::Static => Ok(Slot::Static),
            KeyKind::Dynamic => self.keys.receiving().filter(|slot| !self.is_spent(*slot)).ok_or(Verdict::NoReceiveKey),
        }
    }

    /// Packets that a receive key may still decrypt. A key over its limit decrypts nothing more, so that the use of the
    /// key and the memory of its replay filter are bounded.
    fn share_left(&self, slot: Slot) -> u64 {
        let limit = self.limits.receive_packets;
        let dynamic = matches!(slot, Slot::Receive | Slot::Previous);
        match self.keys.get(slot) {
            Some(live) if dynamic && limit > 0 => limit.saturating_sub(live.packets()),
            _ => u64::MAX,
        }
    }

    /// Whether a receive key has reached its limit.
    pub(super) fn is_spent(&self, slot: Slot) -> bool {
        self.share_left(slot) == 0
    }

    /// Checks a datagram that was decrypted in place under `slot`; `head` is as received. A good packet must still pass
    /// [`Self::accept`].
    ///
    /// # Errors
    /// The verdict that it is dropped under.
    #[inline]
    pub fn judge(&self, datagram: &[u8], head: &Head, slot: Slot) -> Result<Opened, Verdict> {
        let (kind, n) = packet::unframe(&datagram[packet::IV..])?;
        let payload = packet::IV..packet::IV + n;
        let opened = match kind {
            Type::Data => Opened::Data(payload.clone(), self.check(&datagram[payload], slot)?),
            Type::Control => Opened::Control(payload),
        };
        let iv: [u8; packet::IV] = std::array::from_fn(|i| head[i]);
        if slot == Slot::Static && locked(&self.common.sent_ivs).contains(&iv) {
            return Err(Verdict::Reflected);
        }
        Ok(opened)
    }

    /// Reads the headers of a payload, which only here happens on a packet's way in. It must be what the tunnel carries: exactly
    /// one IP packet, or a frame.
    ///
    /// A peer that speaks protocol 3 sends IP packets only, which would be frames of nonsense. Of the few frames that read as IP
    /// packets, all are taken once another one has come under the same key.
    #[inline(always)]
    fn check(&self, payload: &[u8], slot: Slot) -> Result<PayloadHeaders, Verdict> {
        match self.protocol {
            Protocol::Ip => ip::check(payload).map(PayloadHeaders::of_packet),
            Protocol::Ethernet => {
                let known = &self.common.frames_under;
                let key = self.keys.generation(slot) << 2 | slot as u64;
                let headers = ethernet::read(payload).ok_or(Verdict::BadInner)?;
                if ethernet::is_bare_ip(payload, Some(&headers)) {
                    return if known.load(Relaxed) == key { Ok(headers) } else { Err(Verdict::BadInner) };
                }
                if known.load(Relaxed) != key {
                    known.store(key, Relaxed);
                }
                Ok(headers)
            }
        }
    }

    /// Reads the headers of a sealed packet's payload. The handshake has made sure that both ends carry the same kind.
    ///
    /// # Errors
    /// [`Verdict::BadInner`].
    #[inline]
    pub fn check_sealed(&self, payload: &[u8]) -> Result<PayloadHeaders, Verdict> {
        match self.protocol {
            Protocol::Ip => ip::check(payload).map(PayloadHeaders::of_packet),
            Protocol::Ethernet => ethernet::read(payload).ok_or(Verdict::BadInner),
        }
    }

    /// Explains, once, why a decrypted datagram was dropped as [`Verdict::BadInner`]: the peer uses the other protocol.
    /// Returns the text for the operator.
    pub fn explain(&self, datagram: &[u8]) -> Option<&'static str> {
        let payload = match self.nokey {
            true => datagram,
            false => {
                let (_, n) = packet::unframe(datagram.get(packet::IV..)?).ok()?;
                datagram.get(packet::IV..packet::IV + n)?
            }
        };
        let frame = ethernet::read(payload);
        let (other, text) = match self.protocol {
            Protocol::Ip => (ethernet::is_surely_frame(payload, frame.as_ref()), SENDS_FRAMES),
            Protocol::Ethernet => (ethernet::is_bare_ip(payload, frame.as_ref()), SENDS_IP),
        };
        (other && !self.common.told_of_protocol.swap(true, Relaxed)).then_some(text)
    }

    /// Accepts each good packet under `slot` once, and not more than the key's limit. The others get a verdict, and
    /// nothing about them is recorded.
    pub fn accept(&self, slot: Slot, packets: &mut Candidates<'_>) {
        let Some(live) = self.keys.get(slot) else {
            return packets.iter_mut().for_each(|(_, opened)| **opened = Err(Verdict::NoReceiveKey));
        };
        // Held while they are counted, so that workers together do not exceed the key's limit.
        let mut replay = live.accepted();
        let mut known_by = ArrayVec::<_, BATCH>::new();
        known_by.extend(packets.iter().map(|(head, _)| replay.fingerprint(head)));
        known_by.iter().for_each(|packet| replay.prefetch(*packet));
        let left = self.share_left(slot);
        let (mut accepted, mut octets) = (0, 0);
        for ((_, opened), packet) in packets.iter_mut().zip(&known_by) {
            match opened {
                Ok(_) if accepted == left => **opened = Err(Verdict::NoReceiveKey),
                Ok(_) if !replay.insert(*packet) => **opened = Err(Verdict::Replayed),
                Ok(fresh) => {
                    accepted += 1;
                    octets += fresh.octets() as u64;
                }
                Err(_) => {}
            }
        }
        if slot == Slot::Static {
            self.common.keep_accepted(packets.iter().filter(|(_, opened)| opened.is_ok()).map(|(head, _)| *head));
        }
        let (so_far, _) = live.account(accepted, octets);
        if slot == Slot::Receive && accepted > 0 && so_far == accepted {
            self.counters.use_receive_key(self.keys.generation(slot));
        }
    }

    /// Checks a payload in clear (`nokey`).
    ///
    /// # Errors
    /// [`Verdict::BadInner`].
    #[inline]
    pub fn judge_bare(&self, datagram: &[u8]) -> Result<Opened, Verdict> {
        Ok(Opened::Data(0..datagram.len(), self.check(datagram, Slot::Static)?))
    }
}
