//! One tunnel as its worker sees it: keys, peer, way out, and the judgement on each opened packet.

mod common;
pub(super) mod counters;
mod ip_ids;
pub(super) mod keys;
pub(super) mod mtu;
mod opening;
pub(super) mod path_probe;
pub(super) mod replay;

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
use crate::wire::packet::Type;

pub(super) use common::Common;
pub(super) use ip_ids::IpIds;
pub(super) use opening::{Candidates, Head, Opened};

/// How datagrams leave for the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Egress {
    /// By AF_XDP on a carrier device; too large ones by the UDP socket.
    Carrier(Path),
    /// By the tunnel's UDP socket: no Ethernet, no AF_XDP, or the next hop is not resolved yet.
    Socket,
    /// Nowhere: no route, or no relay of the SOCKS5 server that it leads through.
    NoRoute,
    /// Nowhere: the route leads back into a tunnel.
    Looped,
}

/// When a new key is to be asked for.
#[derive(Clone, Copy, Debug)]
pub struct KeyLimits {
    /// Packets under one send key.
    pub send_packets: u64,
    /// Payload octets under one send key.
    pub send_octets: u64,
    /// Age of a send key.
    pub send_age: Duration,
    /// Packets under one receive key, after which it is forgotten; 0: never.
    pub receive_packets: u64,
    /// Age of a receive key that the peer should have replaced.
    pub receive_age: Duration,
    /// Least time between two requests of one direction.
    pub retry: Duration,
}

impl KeyLimits {
    /// Packets that a peer may count for one key. An original forgets a key after twice `send_packets`, and counts those
    /// under the static key, too, that came since the key was announced to it: all of them if the round trip is long. It
    /// has to get the next NK_IND before that; some packets may be on their way through other workers.
    fn counted_packets(self) -> u64 {
        let margin = self.send_packets / 16;
        self.send_packets.saturating_mul(2).saturating_sub(margin)
    }
}

/// A tunnel as one worker has it.
pub struct Tunnel {
    /// Its number: index of maps and of the worker's table.
    pub number: u16,
    /// Live keys.
    pub keys: Keys,
    /// Payloads travel bare.
    pub nokey: bool,
    /// What became of its packets in this worker.
    pub counters: Arc<Counters>,
    /// What it has in common with the same tunnel of other workers.
    pub common: Arc<Common>,
    /// Whether what leaves by its UDP socket leaves in groups.
    pub segmentation: Arc<Segmentation>,
    /// Slot of the hub that its device hangs on, or of its own pair.
    pub hub: usize,
    /// The peer's carrier address, once known.
    pub peer: Option<SocketAddr>,
    /// The peer is reached through the relay of a SOCKS5 server.
    pub socks: bool,
    /// That relay, while there is one.
    pub relay: Option<SocketAddr>,
    /// Way to the peer, or to the relay.
    pub egress: Egress,
    /// What its payloads are.
    pub protocol: Protocol,
    /// MTU of its device, in octets.
    pub device_mtu: usize,
    /// Clamp the MSS of TCP in frames; packets have been through the program that does it.
    pub clamp_mss: bool,
    /// Link-layer addresses from the hidden end to the tunnel device; of no use in protocol 4.
    pub private_hop: Hop,
    /// Largest inner packets.
    pub mtu: TunnelMtu,
    /// The peer has moved, and the control thread was not told yet.
    pub is_move_untold: bool,
    /// The peer is known to be of our own kind.
    pub is_ours: bool,
    /// Only `peer` may send to us.
    pub pinned: bool,
    /// Data may go under the static key while there is no dynamic one.
    pub static_data: bool,
    /// Outer packets never carry DF.
    pub ignore_df: bool,
    /// Outer TTL; 0: the inner packet's.
    pub cttl: u8,
    /// UDP checksums over IPv4.
    pub checksum: bool,
    /// What leaves is spaced: the peer may be an original.
    pub paced: bool,
    /// When to ask for keys.
    pub limits: KeyLimits,
    /// Identifications of outer IPv4 headers.
    pub ip_ids: IpIds,
}

impl Tunnel {
    /// A tunnel that has keys, an MTU of 1442 octets, and nothing else.
    #[cfg(any(test, feature = "harness"))]
    pub fn with_keys(number: u16, keys: Keys, limits: KeyLimits) -> Self {
        Self {
            number,
            keys,
            nokey: false,
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

    /// The same tunnel for another worker, before it has carried anything.
    pub fn for_worker(&self, worker: usize, tally: &Tally) -> Self {
        Self {
            keys: self.keys.for_another_worker(),
            counters: tally.of_worker(worker).clone(),
            common: self.common.clone(),
            segmentation: self.segmentation.clone(),
            ip_ids: IpIds::of_worker(worker, tally.workers()),
            ..*self
        }
    }

    /// Prefetches what the next packet of this tunnel needs, `slot` being the key that it is under. Done for all packets of a
    /// batch before any work on them, the cache misses overlap: one wait a batch instead of several a packet.
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

    /// Where datagrams are sent: to the peer, or to the relay.
    pub fn target(&self) -> Option<SocketAddr> {
        if self.socks { self.relay } else { self.peer }
    }

    /// The peer is at another address. Until the way there is known, it is the UDP socket's, which needs no address of a
    /// next hop; that to a relay stays as it is.
    pub fn set_peer(&mut self, peer: SocketAddr) {
        self.peer = Some(peer);
        if !self.socks {
            self.egress = Egress::Socket;
        }
    }

    /// The slot that data is sealed under now.
    ///
    /// # Errors
    /// [`Verdict::NoSendKey`].
    pub fn data_slot(&self) -> Result<Slot, Verdict> {
        let slot = self.keys.sending().ok_or(Verdict::NoSendKey)?;
        if slot == Slot::Static && !self.static_data { Err(Verdict::NoSendKey) } else { Ok(slot) }
    }

    /// Accounts for one sealed packet and says whether a new send key is wanted now.
    ///
    /// Messages are accounted for but ask for nothing: the exchange that sends them has timers of its own.
    pub fn sealed(&self, slot: Slot, octets: usize, kind: Type, now: Instant) -> Option<Wanted> {
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
        self.ask(reason, now)
    }

    /// Says whether a send key is to be asked for now, because data waits for one.
    pub fn want_send_key(&self, now: Instant) -> Option<Wanted> {
        self.ask(Wanted::NoSendKey, now)
    }

    /// Says whether the peer must be asked for a key: after a packet was dropped for want of one, when the key is spent, or
    /// when the peer goes on with one whose time is over. After a pause its first packets are under the old key, while it
    /// makes another of its own accord: so it is given the time of an exchange.
    pub fn receiving(&self, now: Instant) -> Option<Wanted> {
        match self.keys.get(Slot::Receive) {
            Some(_) if self.is_spent(Slot::Receive) => self.ask(Wanted::ReceiveKeySpent, now),
            Some(live) if now.duration_since(live.since) > self.limits.receive_age => {
                let overdue = now.duration_since(live.overdue_since(now));
                if overdue < self.limits.retry { None } else { self.ask(Wanted::ReceiveKeySpent, now) }
            }
            Some(_) => None,
            None => self.ask(Wanted::NoReceiveKey, now),
        }
    }

    /// A packet under a dynamic key could not be opened, though there is a key. Says whether one is to be asked for: when that
    /// has gone on for a while and none was opened.
    pub fn undecryptable(&self, now: Instant) -> Option<Wanted> {
        self.common.fails(self.limits.retry, now).then_some(Wanted::Undecryptable)
    }

    fn ask(&self, reason: Wanted, now: Instant) -> Option<Wanted> {
        let receiving = matches!(reason, Wanted::NoReceiveKey | Wanted::ReceiveKeySpent);
        let direction = if receiving { common::RECEIVING } else { common::SENDING };
        let key = self.keys.get(if receiving { Slot::Receive } else { Slot::Send });
        // A key that came since the last request answered it.
        let answered = |last| key.is_some_and(|key| key.since > last);
        let too_soon = |last| !answered(last) && now.duration_since(last) < self.limits.retry;
        self.common.may_ask(direction, too_soon, now).then_some(reason)
    }
}

#[cfg(test)]
mod tests;
