//! The data of a tunnel that all workers share, except its keys.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::engine::ledger::Ledger;
use crate::engine::locked;
use crate::engine::tunnel::challenge::Challenge;
use crate::engine::tunnel::opening::Head;
use crate::engine::tunnel::path_probe::PathProbe;
use crate::engine::tunnel::replay::{Journal, SentIvs};
use crate::wire::packet;

/// Index of the sending direction in requests for keys; below, of the receiving direction.
pub(super) const SENDING: usize = 0;
pub(super) const RECEIVING: usize = 1;

/// The data of a tunnel that all workers share, except its keys.
#[derive(Default)]
pub struct Common {
    /// IVs sent under the static key.
    pub(super) sent_ivs: Mutex<SentIvs>,
    /// Keeps those IVs, and the packets accepted under the static key, for the next engine.
    journal: Mutex<Option<Journal>>,
    /// While the peer is not known: the source of the last datagram that may be the peer's, as it was authentic, or under
    /// a dynamic key that we do not have. Only messages of the key exchange are sent there.
    asker: Mutex<Option<SocketAddr>>,
    /// When the last key was requested, for sending and receiving.
    asked: Mutex<[Option<Instant>; 2]>,
    /// Packets under the static key since the last send key was announced.
    static_packets: AtomicU64,
    /// Whether `failing` is set; it is read for each decrypted packet.
    fails: AtomicBool,
    /// Set if the last packets under a dynamic key could not be decrypted.
    failing: Mutex<Option<Failing>>,
    /// When a control message in clear was last passed on.
    clear: Mutex<Option<Instant>>,
    /// The last key under which the peer has sent a frame that is not an IP packet: its generation and slot.
    pub(super) frames_under: AtomicU64,
    /// Whether the operator was told that the peer uses the other protocol.
    pub(super) told_of_protocol: AtomicBool,
    /// Asks the peer about ICMP errors that prove nothing.
    pub path_probe: PathProbe,
    /// Asks whether the peer is at another address.
    pub challenge: Challenge,
    /// Something authentic has come from the peer since [`Common::was_heard`] was called last.
    heard: AtomicBool,
}

/// Packets under a dynamic key fail, and none has been decrypted since the first failure.
struct Failing {
    /// When to request a key.
    ask: Instant,
    /// How long to wait before the next request, if there is still no success.
    wait: Duration,
}

/// How long packets under a dynamic key may fail, without a success, before a key is requested: packets in flight at a
/// key change may fail.
const MAX_FAILING_TIME: Duration = Duration::from_secs(1);
/// Minimum time between two control messages in clear that are passed on.
const MIN_CLEAR_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum wait between two requests for a key, in retry times: forged datagrams on an idle tunnel must not cause key
/// exchanges for ever.
const MAX_WAIT_FACTOR: u32 = 64;

impl Common {
    /// The data of a new tunnel with this ledger. It knows the IVs that were `sent` under the static key, and continues their journal.
    pub(crate) fn with(ledger: Arc<Ledger>, journal: Option<(Journal, Vec<[u8; packet::IV]>)>) -> Self {
        let mut ivs = SentIvs::of(ledger);
        let (journal, sent) = journal.unzip();
        sent.iter().flatten().for_each(|iv| ivs.restore(iv));
        Self { sent_ivs: Mutex::new(ivs), journal: Mutex::new(journal), ..Self::default() }
    }

    /// Records an IV that is sent under the static key. Call [`Self::save`] before the packet is sent.
    pub fn note_iv(&self, iv: &[u8; packet::IV]) {
        locked(&self.sent_ivs).insert(iv);
        if let Some(journal) = locked(&self.journal).as_mut() {
            journal.sent(iv);
        }
    }

    /// Keeps the heads of packets that were accepted under the static key.
    pub(super) fn keep_accepted<'a>(&self, heads: impl Iterator<Item = &'a Head>) {
        if let Some(journal) = locked(&self.journal).as_mut() {
            heads.for_each(|head| journal.accepted(head));
            journal.write();
        }
    }

    /// Keeps the IVs that were recorded.
    pub fn save(&self) {
        if let Some(journal) = locked(&self.journal).as_mut() {
            journal.write();
        }
    }

    /// Records the source of a datagram that may be the unknown peer's.
    pub fn note_asker(&self, from: SocketAddr) {
        *locked(&self.asker) = Some(from);
    }

    /// Returns the source of the last such datagram.
    pub fn asker(&self) -> Option<SocketAddr> {
        *locked(&self.asker)
    }

    /// Forgets the times of requests: the next packet requests a key again.
    pub fn ask_again(&self) {
        *locked(&self.asked) = [None; 2];
    }

    /// There is no dynamic send key any more: the next packet requests one, even if one was requested recently.
    pub fn send_key_dropped(&self) {
        locked(&self.asked)[SENDING] = None;
    }

    /// Records that an authentic packet has come from the peer.
    pub fn note_heard(&self) {
        // A store for each packet would move the cache line between the workers.
        if !self.heard.load(Ordering::Relaxed) {
            self.heard.store(true, Ordering::Relaxed);
        }
    }

    /// Whether an authentic packet has come from the peer since the last call.
    pub fn was_heard(&self) -> bool {
        self.heard.swap(false, Ordering::Relaxed)
    }

    /// Whether a key may be requested in a direction, because the last time was not `too_soon`. If so, the time is
    /// recorded.
    pub(super) fn may_ask(&self, direction: usize, too_soon: impl FnOnce(Instant) -> bool, now: Instant) -> bool {
        let asked = &mut locked(&self.asked)[direction];
        let may = !asked.is_some_and(too_soon);
        if may {
            *asked = Some(now);
        }
        may
    }

    /// Counts `more` packets under the static key; returns their number since a send key was announced.
    pub(super) fn static_packets(&self, more: u64) -> u64 {
        match more {
            0 => self.static_packets.load(Ordering::Relaxed),
            _ => self.static_packets.fetch_add(more, Ordering::Relaxed) + more,
        }
    }

    /// Call this if a packet under a dynamic key could not be decrypted. Returns whether to request a key now; the next
    /// times are after `retry`, then twice as long, and so on, until a packet is decrypted.
    pub(super) fn fails(&self, retry: Duration, now: Instant) -> bool {
        let mut failing = locked(&self.failing);
        let failing = failing.get_or_insert_with(|| {
            self.fails.store(true, Ordering::Relaxed);
            Failing { ask: now + MAX_FAILING_TIME, wait: retry }
        });
        let ask = now >= failing.ask;
        if ask {
            failing.ask = now + failing.wait;
            failing.wait = (2 * failing.wait).min(MAX_WAIT_FACTOR * retry);
        }
        ask
    }

    /// A send key is announced: the peer counts packets for this key from now on.
    pub fn count_from_here(&self) {
        self.static_packets.store(0, Ordering::Relaxed);
    }

    /// Whether to pass on a control message in clear that has come now. Only a few are, since anybody can send them.
    pub fn may_pass_on_clear(&self, now: Instant) -> bool {
        let mut last = locked(&self.clear);
        let may = last.is_none_or(|last| now.duration_since(last) >= MIN_CLEAR_INTERVAL);
        if may {
            *last = Some(now);
        }
        may
    }

    /// Call this if a packet under a dynamic key was decrypted.
    pub fn opened(&self) {
        if self.fails.load(Ordering::Relaxed) {
            *locked(&self.failing) = None;
            self.fails.store(false, Ordering::Relaxed);
        }
    }
}
