//! What all workers have of a tunnel in common, beside its keys.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::engine::locked;
use crate::engine::tunnel::path_probe::PathProbe;
use crate::engine::tunnel::replay::SentIvs;
use crate::wire::packet;

/// Indices of the directions that keys are asked for in.
pub(super) const SENDING: usize = 0;
pub(super) const RECEIVING: usize = 1;

/// What all workers have of a tunnel in common, beside its keys.
#[derive(Default)]
pub struct Common {
    /// IVs sent under the static key.
    pub(super) sent_ivs: Mutex<SentIvs>,
    /// While the peer is not known: where a datagram came from under a dynamic key that we have not. It may be the peer's,
    /// whom only a question for a key can reach, and nothing else is sent there.
    asker: Mutex<Option<SocketAddr>>,
    /// When the last key was asked for, sending and receiving.
    asked: Mutex<[Option<Instant>; 2]>,
    /// Packets under the static key since the last send key was announced.
    static_packets: AtomicU64,
    /// Whether `failing` is there: read for each packet that was opened.
    fails: AtomicBool,
    /// That what came last under a dynamic key could not be opened.
    failing: Mutex<Option<Failing>>,
    /// When a control message in clear was passed on last.
    clear: Mutex<Option<Instant>>,
    /// The last key under which the peer has sent what is a frame and no IP packet: its generation and slot.
    pub(super) frames_under: AtomicU64,
    /// It was told that the peer speaks another protocol.
    pub(super) told_of_protocol: AtomicBool,
    /// Asks the peer about ICMP errors that prove nothing.
    pub path_probe: PathProbe,
    /// Something authentic has come from the peer since [`Common::was_heard`] was called last.
    heard: AtomicBool,
}

/// Packets under a dynamic key fail, and none was opened since the first of them.
struct Failing {
    /// When a key is to be asked for.
    ask: Instant,
    /// How long to wait until it is asked for again, if still none was opened.
    wait: Duration,
}

/// How long packets under a dynamic key may fail, and none succeed, before a key is asked for: those in flight at a change
/// of keys may.
const FAILS: Duration = Duration::from_secs(1);
/// Least time between two control messages in clear that are passed on.
const CLEAR: Duration = Duration::from_millis(100);
/// The longest wait between two questions for a key, in retry times: forged datagrams on a tunnel that is idle must not make it
/// exchange keys for ever.
const LONGEST_WAIT: u32 = 64;

impl Common {
    /// Notes an IV that goes out under the static key.
    pub fn note_iv(&self, iv: &[u8; packet::IV]) {
        locked(&self.sent_ivs).insert(iv);
    }

    /// Notes where a datagram came from that could be the unknown peer's.
    pub fn note_asker(&self, from: SocketAddr) {
        *locked(&self.asker) = Some(from);
    }

    /// Where the last such datagram came from.
    pub fn asker(&self) -> Option<SocketAddr> {
        *locked(&self.asker)
    }

    /// Forgets when keys were asked for: the next packet asks again.
    pub fn ask_again(&self) {
        *locked(&self.asked) = [None; 2];
    }

    /// There is no dynamic send key any more: whatever was asked for before it came, the next packet asks again.
    pub fn send_key_dropped(&self) {
        locked(&self.asked)[SENDING] = None;
    }

    /// Notes that an authentic packet has come from the peer.
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

    /// Whether a key may be asked for in a direction, the last time not having been `too_soon`; if so, that is noted.
    pub(super) fn may_ask(&self, direction: usize, too_soon: impl FnOnce(Instant) -> bool, now: Instant) -> bool {
        let asked = &mut locked(&self.asked)[direction];
        let may = !asked.is_some_and(too_soon);
        if may {
            *asked = Some(now);
        }
        may
    }

    /// Counts `more` packets under the static key; returns how many there are since a send key was announced.
    pub(super) fn static_packets(&self, more: u64) -> u64 {
        match more {
            0 => self.static_packets.load(Ordering::Relaxed),
            _ => self.static_packets.fetch_add(more, Ordering::Relaxed) + more,
        }
    }

    /// A packet under a dynamic key could not be opened. Whether a key is to be asked for now; after that, when `retry` has
    /// passed, then twice as long, and so on until one is opened.
    pub(super) fn fails(&self, retry: Duration, now: Instant) -> bool {
        let mut failing = locked(&self.failing);
        let failing = failing.get_or_insert_with(|| {
            self.fails.store(true, Ordering::Relaxed);
            Failing { ask: now + FAILS, wait: retry }
        });
        let ask = now >= failing.ask;
        if ask {
            failing.ask = now + failing.wait;
            failing.wait = (2 * failing.wait).min(LONGEST_WAIT * retry);
        }
        ask
    }

    /// A send key is announced: the peer counts what it gets for this key from here on.
    pub fn count_from_here(&self) {
        self.static_packets.store(0, Ordering::Relaxed);
    }

    /// Whether a control message in clear that comes now is passed on: few are, since anybody can send them.
    pub fn may_pass_on_clear(&self, now: Instant) -> bool {
        let mut last = locked(&self.clear);
        let may = last.is_none_or(|last| now.duration_since(last) >= CLEAR);
        if may {
            *last = Some(now);
        }
        may
    }

    /// A packet under a dynamic key was opened.
    pub fn opened(&self) {
        if self.fails.load(Ordering::Relaxed) {
            *locked(&self.failing) = None;
            self.fails.store(false, Ordering::Relaxed);
        }
    }
}
