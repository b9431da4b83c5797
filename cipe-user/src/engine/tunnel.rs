//! One tunnel in one worker: keys, peer, egress, and the checks of each decrypted packet.

pub(super) mod challenge;
mod common;
pub(super) mod counters;
mod ip_ids;
pub(super) mod keys;
pub(super) mod mtu;
mod opening;
pub(super) mod path_probe;
pub(super) mod replay;
pub(super) mod sealed;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::carrier::{Path, Segmentation};
use crate::control::protocol::{Protocol, Wanted};
use crate::engine::carrier::outer::Hop;
use crate::engine::tunnel::counters::{Counters, Tally};
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::engine::tunnel::sealed::SealedView;
use crate::wire::packet::Type;

pub(super) use common::Common;
pub(super) use ip_ids::IpIds;
pub(super) use opening::{Candidates, Head, Opened};

/// How datagrams are sent to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// By AF_XDP on a carrier device; datagrams that are too large by the UDP socket.
    Carrier(Path),
    /// By the tunnel's UDP socket: no Ethernet, no AF_XDP, or the next hop is not resolved yet.
    Socket,
    /// Not at all: there is no route, or no relay of the SOCKS5 server.
    NoRoute,
    /// Not at all: the route leads back into a tunnel.
    Looped,
}

/// The limits after which a new key is requested.
#[derive(Clone, Copy, Debug)]
pub struct KeyLimits {
    /// Maximum packets under one send key.
    pub send_packets: u64,
    /// Maximum payload octets under one send key.
    pub send_octets: u64,
    /// Maximum age of a send key.
    pub send_age: Duration,
    /// Maximum packets under one receive key, after which it is dropped; 0: no limit.
    pub receive_packets: u64,
    /// Maximum age of a receive key; the peer should have replaced it by then.
    pub receive_age: Duration,
    /// Minimum time between two requests of one direction.
    pub retry: Duration,
}

impl KeyLimits {
    /// Packets that a peer may count for one key before another is requested. An original drops a key after twice
    /// `send_packets`. It also counts packets under the static key since the key was announced; if the round trip is
    /// long, these are all of them. It must get the next NK_IND before its limit; the margin is for packets in flight
    /// through other workers.
    fn counted_packets(self) -> u64 {
        let margin = self.send_packets / 16;
        self.send_packets.saturating_mul(2).saturating_sub(margin)
    }
}

/// A tunnel, as used by one worker.
pub struct Tunnel {
    /// Its number: the index in maps and in the worker's table.
    pub number: u16,
    /// Live keys.
    pub keys: Keys,
    /// Keys for sealed packets; `None`: it has no sealed packets.
    pub sealed: Option<SealedView>,
    /// Whether payloads are sent in clear (`nokey`).
    pub nokey: bool,
    /// Whether it has no daemon: then all its packets are dropped.
    pub is_orphaned: bool,
    /// Its counters of this worker.
    pub counters: Arc<Counters>,
    /// The data that all workers share.
    pub common: Arc<Common>,
    /// Whether datagrams of its UDP socket are sent in groups.
    pub segmentation: Arc<Segmentation>,
    /// Slot of the hub that carries its device, or of its own pair.
    pub hub: usize,
    /// The peer's carrier address, if known.
    pub peer: Option<SocketAddr>,
    /// Whether the peer is reached through the relay of a SOCKS5 server.
    pub socks: bool,
    /// The address of the relay, if there is one.
    pub relay: Option<SocketAddr>,
    /// The egress to the peer, or to the relay.
    pub egress: Egress,
    /// The kind of packets that it carries.
    pub protocol: Protocol,
    /// MTU of its device, in octets.
    pub device_mtu: usize,
    /// Whether to clamp the MSS of TCP in Ethernet frames; for IP packets, a program has done it.
    pub clamp_mss: bool,
    /// Link-layer addresses from the hidden end to the tunnel device; unused in protocol 4.
    pub private_hop: Hop,
    /// Maximum sizes of inner packets.
    pub mtu: TunnelMtu,
    /// Whether the peer has moved, and the control thread does not know yet.
    pub is_move_untold: bool,
    /// Whether the daemon knows that the peer runs this program.
    pub is_ours: bool,
    /// Whether only `peer` may send to us.
    pub pinned: bool,
    /// Whether data may be sent under the static key while there is no dynamic one.
    pub static_data: bool,
    /// Whether outer packets never have DF.
    pub ignore_df: bool,
    /// Outer TTL; 0: the inner packet's.
    pub cttl: u8,
    /// Whether to send UDP checksums over IPv4.
    pub checksum: bool,
    /// Whether datagrams are paced, because the peer may be an original.
    pub paced: bool,
    /// When to request keys.
    pub limits: KeyLimits,
    /// The ids of outer IPv4 headers.
    pub ip_ids: IpIds,
}

impl Tunnel {
    /// Creates a tunnel with keys and an MTU of 1442 octets, for tests.
    #[cfg(any(test, feature = "harness"))]
    pub fn with_keys(number: u16, keys: Keys, limits: KeyLimits) -> Self {
        Self {
            number,
            keys,
            sealed: None,
            nokey: false,
            is_orphaned: false,
            counters: Arc::default(),
            common: Arc::default(),
            segmentation: Arc::new(Segmentation::new(0, Instant::now())),
            hub: 0,
            peer: None,
            socks: false,
            relay: None,
            egress: Egress::Socket,
            protocol: Protocol::Ip,
            device_mtu: 1442,
            clamp_mss: false,
            private_hop: Hop { source: [2; 6], destination: [2; 6] },
            mtu: TunnelMtu::of_device(1442),
            is_move_untold: false,
            is_ours: false,
            pinned: false,
            static_data: true,
            ignore_df: false,
            cttl: 0,
            checksum: false,
            paced: false,
            limits,
            ip_ids: IpIds::of_worker(0, 1),
        }
    }

    /// Returns the same tunnel for another worker.
    pub fn for_worker(&self, worker: usize, tally: &Tally) -> Self {
        Self {
            keys: self.keys.for_another_worker(),
            sealed: self.sealed.clone(),
            counters: tally.of_worker(worker).clone(),
            common: self.common.clone(),
            segmentation: self.segmentation.clone(),
            ip_ids: IpIds::of_worker(worker, tally.workers()),
            ..*self
        }
    }

    /// Prefetches the data that the next packet of this tunnel needs; `slot` is that of its key. If this is done for
    /// all packets of a batch first, the cache misses overlap: there is one wait per batch instead of several per
    /// packet.
    pub fn prefetch(&self, slot: Slot) {
        std::hint::black_box(self.nokey);
        std::hint::black_box(self.peer.is_some());
        std::hint::black_box(self.egress == Egress::Socket);
        std::hint::black_box(self.limits.send_packets);
        std::hint::black_box(self.counters.octets());
        std::hint::black_box(self.counters.of(Verdict::Sent));
        std::hint::black_box(self.counters.of(Verdict::Delivered));
        std::hint::black_box(self.keys.get(slot).map(|live| live.packets()));
    }

    /// Returns the destination of datagrams: the peer, or the relay.
    pub fn target(&self) -> Option<SocketAddr> {
        if self.socks { self.relay } else { self.peer }
    }

    /// Sets the peer's address. Until the next hop is known, the egress is the UDP socket, which does not need it. The
    /// egress to a relay does not change.
    pub fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = Some(peer);
        if !self.socks {
            self.egress = Egress::Socket;
        }
    }

    /// Looks at the present keys. Call it before a packet is classified or admitted.
    pub fn refresh(&mut self, now: Instant) {
        self.keys.refresh(now);
        if let Some(sealed) = &mut self.sealed {
            sealed.refresh();
        }
    }

    /// Whether its packets leave sealed now.
    pub fn sends_sealed(&self) -> bool {
        self.sealed.as_ref().is_some_and(|sealed| sealed.keys().send.is_some())
    }

    /// Whether packets of protocol 3 or 4 may leave now.
    pub fn sends_unsealed(&self) -> bool {
        self.sealed.as_ref().is_none_or(|sealed| sealed.keys().send.is_none() && sealed.keys().unsealed.sends)
    }

    /// Whether the peer is known to run this program.
    pub fn has_our_peer(&self) -> bool {
        self.is_ours || self.sends_sealed()
    }

    /// Returns the slot of the key for data.
    ///
    /// # Errors
    /// [`Verdict::NoSendKey`].
    pub fn data_slot(&self) -> Result<Slot, Verdict> {
        let slot = self.keys.sending().ok_or(Verdict::NoSendKey)?;
        if slot == Slot::Static && !self.static_data { Err(Verdict::NoSendKey) } else { Ok(slot) }
    }

    /// Counts one sealed packet. Returns the reason if a new send key must be requested now.
    ///
    /// Messages are counted, but never cause a request: the key exchange that sends them has its own timers.
    pub fn account(&self, slot: Slot, octets: usize, kind: Type, now: Instant) -> Option<Wanted> {
        let limits = self.limits;
        let live = self.keys.get(slot)?;
        let (packets, octets) = live.account(1, octets as u64);
        let under_static = self.common.static_packets(u64::from(slot == Slot::Static));
        let reason = if kind == Type::Control {
            return None;
        } else if slot == Slot::Static {
            Wanted::NoSendKey
        } else if packets >= limits.send_packets || packets + under_static >= limits.counted_packets() {
            Wanted::Packets
        } else if octets >= limits.send_octets {
            Wanted::Octets
        } else if now.duration_since(live.since) >= limits.send_age {
            Wanted::Age
        } else {
            return None;
        };
        self.request(reason, now)
    }

    /// Returns a reason if a send key must be requested now, because data needs one.
    pub fn want_send_key(&self, now: Instant) -> Option<Wanted> {
        self.request(Wanted::NoSendKey, now)
    }

    /// Returns a reason if the peer must be asked for a key now: because a packet was dropped without one, the key has
    /// reached its limit, or the peer uses a key that is too old. After a pause, the peer's first packets are still
    /// under the old key, while it makes a new one by itself; so it gets the time of one exchange.
    pub fn receiving(&self, now: Instant) -> Option<Wanted> {
        match self.keys.get(Slot::Receive) {
            Some(_) if self.is_spent(Slot::Receive) => self.request(Wanted::ReceiveKeySpent, now),
            Some(live) if now.duration_since(live.since) > self.limits.receive_age => {
                let overdue = now.duration_since(live.overdue_since(now));
                if overdue < self.limits.retry { None } else { self.request(Wanted::ReceiveKeySpent, now) }
            }
            Some(_) => None,
            None => self.request(Wanted::NoReceiveKey, now),
        }
    }

    /// Call this if a packet under a dynamic key could not be decrypted although there is a key. Returns a reason if a
    /// key must be requested now: if this goes on for a while, and no packet could be decrypted.
    pub fn undecryptable(&self, now: Instant) -> Option<Wanted> {
        self.common.fails(self.limits.retry, now).then_some(Wanted::Undecryptable)
    }

    fn request(&self, reason: Wanted, now: Instant) -> Option<Wanted> {
        let receiving = matches!(reason, Wanted::NoReceiveKey | Wanted::ReceiveKeySpent);
        let direction = if receiving { common::RECEIVING } else { common::SENDING };
        let key = self.keys.get(if receiving { Slot::Receive } else { Slot::Send });
        // The last request was answered if a key came after it.
        let answered = |last| key.is_some_and(|key| key.since > last);
        let too_soon = |last| !answered(last) && now.duration_since(last) < self.limits.retry;
        self.common.may_ask(direction, too_soon, now).then_some(reason)
    }
}

#[cfg(test)]
mod tests;
