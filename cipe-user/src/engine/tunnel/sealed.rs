//! Sealed packets of a tunnel (docs/SEALED.md): the keys in use, and when a handshake is wanted.
//!
//! The control thread changes the keys ([`SealedTunnel`]); each worker has a view of them ([`SealedView`]), which costs one load for
//! each packet and a lock only after a change. Counters and windows are in the ledger, shared by all workers and by the next engine.

mod keys;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::Verdict;

use crate::control::protocol::{AttachSealed, KeyOctets, SealedKey, SealedStatus, SealedWanted, Unsealed};
use crate::engine::bucket::Bucket;
use crate::engine::ledger::{Handed, Ledger, boottime};
use crate::engine::locked;
use crate::sealed::Refused;
use crate::sealed::cipher;
use crate::sealed::gate::Gate;
use crate::sealed::secrets::{STATIC_KEY, Secrets};

pub(crate) use keys::{KeySet, ReceiveKeyInUse, SendKeyInUse};

/// Minimum time between two requests of one kind for a handshake.
const MIN_ASK_INTERVAL: Duration = Duration::from_millis(250);
/// How long packets may fail to open, without one that does, before a handshake is wanted: some that were under way at a change of
/// keys fail.
const MAX_FAILING_TIME: Duration = Duration::from_secs(1);

/// Handshake messages that may be passed on at once, and the time for one more: far more than two ends have for each other, and less
/// than the queue to a daemon holds. Recorded ones pass the gate.
const MAX_MESSAGES: u32 = 64;
const MESSAGE_INTERVAL: Duration = Duration::from_millis(1);

/// A key that cannot be used, because its record is missing or all records are in use. No key of the tunnel is used then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeysLost;

impl From<Refused> for Verdict {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::BadLength => Self::BadLength,
            Refused::NoKey => Self::NoReceiveKey,
            Refused::BadTag => Self::BadTag,
            Refused::TooOld => Self::TooOld,
            Refused::Replayed => Self::Replayed,
            Refused::Reflected => Self::Reflected,
            Refused::BadType => Self::BadType,
            Refused::BadMessage => Self::BadMessage,
            Refused::NoCookie => Self::ControlFull,
        }
    }
}

/// What all workers share of a tunnel's sealed packets.
pub struct SealedTunnel {
    /// What is derived from the static key.
    pub secrets: Secrets,
    /// Judges handshake messages.
    pub gate: Gate,
    ledger: Arc<Ledger>,
    /// The beginning of the gate's clock.
    start: Instant,
    /// Changes with `keys`.
    generation: AtomicU64,
    keys: Mutex<Arc<KeySet>>,
    /// When the first packet failed to open after the last one that did not ([`Self::moment`]); 0: none has.
    failing: AtomicU64,
    /// When a handshake was wanted last, by [`SealedWanted`]; 0: never.
    asked: [AtomicU64; 3],
    /// Handshake messages that may be passed on.
    messages: Mutex<Bucket>,
    /// Whether the last one could not be passed on.
    is_loaded: AtomicBool,
}

impl SealedTunnel {
    /// A tunnel without keys.
    ///
    /// # Errors
    /// The kernel has no random octets.
    pub fn new(
        static_key: &[u8; STATIC_KEY],
        unsealed: Unsealed,
        ledger: Arc<Ledger>,
        now: Instant,
    ) -> anyhow::Result<Arc<Self>> {
        let mut drawn = cipher::KeyOctets::default();
        getrandom::fill(&mut *drawn).context("the system gives no random numbers")?;
        Ok(Arc::new(Self {
            secrets: Secrets::new(static_key),
            gate: Gate::new(&drawn),
            ledger,
            start: now,
            generation: AtomicU64::new(0),
            keys: Mutex::new(Arc::new(KeySet { unsealed, send: None, receive: [const { None }; 3] })),
            failing: AtomicU64::new(0),
            asked: [const { AtomicU64::new(0) }; 3],
            messages: Mutex::new(Bucket::with(MAX_MESSAGES, MESSAGE_INTERVAL, now)),
            is_loaded: AtomicBool::new(false),
        }))
    }

    /// A tunnel as a daemon attaches it; also whether the keys that it is to go on under are lost.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn attach(
        static_key: &KeyOctets,
        attach: &AttachSealed,
        ledger: Arc<Ledger>,
    ) -> anyhow::Result<(Arc<Self>, Result<(), KeysLost>)> {
        let tunnel = Self::new(static_key, attach.unsealed, ledger, Instant::now())?;
        let Some(keys) = &attach.resume else { return Ok((tunnel, Ok(()))) };
        let receive = keys.receive.iter().try_for_each(|key| tunnel.receive(key, Handed::Used));
        let resumed = receive.and_then(|()| match &keys.send {
            Some((key, renew_ms)) => tunnel.send(key, Duration::from_millis(*renew_ms), Handed::Used),
            None => Ok(()),
        });
        Ok((tunnel, resumed))
    }

    /// The keys in use.
    pub fn keys(&self) -> Arc<KeySet> {
        locked(&self.keys).clone()
    }

    /// Replaces the keys. Workers see that at their next packets.
    fn change(&self, change: impl FnOnce(&mut KeySet)) {
        let mut keys = locked(&self.keys);
        let mut next = KeySet::clone(&keys);
        change(&mut next);
        *keys = Arc::new(next);
        self.generation.fetch_add(1, Ordering::Release);
    }

    /// Wipes all keys, as soon as no worker has a view of them.
    pub fn clear(&self) {
        self.change(|keys| (keys.send, keys.receive) = (None, [const { None }; 3]));
    }

    /// Uses a receive key, in place of one with the same epoch.
    ///
    /// # Errors
    /// It has no record. All keys are wiped.
    pub fn receive(&self, key: &SealedKey, handed: Handed) -> Result<(), KeysLost> {
        let place = key.epoch.index();
        // Its record is to be free, where no worker holds it.
        self.change(|keys| keys.receive[place] = None);
        match self.ledger.sealed_receive(&key.key, handed) {
            Some(words) => {
                let made = Arc::new(ReceiveKeyInUse::new(key, words));
                self.change(|keys| keys.receive[place] = Some(made));
                Ok(())
            }
            None => self.lose(),
        }
    }

    /// Uses a send key, after which another one is wanted in the time `renew`.
    ///
    /// # Errors
    /// As [`Self::receive`].
    pub fn send(&self, key: &SealedKey, renew: Duration, handed: Handed) -> Result<(), KeysLost> {
        match self.ledger.sealed_send(&key.key, handed) {
            Some(next) => {
                let made = Arc::new(SendKeyInUse::new(key, next, boottime() + renew));
                self.change(|keys| keys.send = Some(made));
                Ok(())
            }
            None => self.lose(),
        }
    }

    fn lose(&self) -> Result<(), KeysLost> {
        self.clear();
        Err(KeysLost)
    }

    /// Wipes the receive key with this serial, if there is one.
    pub fn forget(&self, serial: u64) {
        self.change(|keys| {
            for place in &mut keys.receive {
                place.take_if(|key| key.serial == serial);
            }
        });
    }

    /// Wipes the send key.
    pub fn stop_sending(&self) {
        self.change(|keys| keys.send = None);
    }

    /// Sets the use of other packets.
    pub fn set_unsealed(&self, unsealed: Unsealed) {
        self.change(|keys| keys.unsealed = unsealed);
    }

    /// Notes that the send key is old, if it is at `now`, on the clock of [`boottime`].
    pub fn poll(&self, now: Duration) {
        if let Some(send) = &locked(&self.keys).send {
            send.poll(now);
        }
    }

    /// The time on the gate's clock.
    pub fn gate_time(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.start)
    }

    /// A moment as a number above 0: nanoseconds.
    fn moment(&self, now: Instant) -> u64 {
        self.gate_time(now).as_nanos() as u64 + 1
    }

    /// Whether a handshake message may be passed on to the daemon now.
    pub fn may_pass_on(&self, now: Instant) -> bool {
        let may = locked(&self.messages).take(now);
        self.is_loaded.store(!may, Ordering::Relaxed);
        may
    }

    /// Whether so many came that the last one could not be passed on.
    pub fn is_loaded(&self) -> bool {
        self.is_loaded.load(Ordering::Relaxed)
    }

    /// The daemon did not hear that the first packet under a receive key has opened: the next packet tells it.
    pub fn tell_again(&self, serial: u64) {
        let keys = self.keys();
        if let Some(key) = keys.receive.iter().flatten().find(|key| key.serial == serial) {
            key.tell_again();
        }
    }

    /// Records that a packet has opened and was new.
    #[inline]
    pub fn opened(&self) {
        // A store for each packet would move the cache line between the workers.
        if self.failing.load(Ordering::Relaxed) != 0 {
            self.failing.store(0, Ordering::Relaxed);
        }
    }

    /// Records that a packet did not open. Returns whether a handshake is wanted: at once if there is no receive key, else if this
    /// goes on for a while and no packet has opened.
    pub fn failed(&self, has_key: bool, now: Instant) -> bool {
        let now = self.moment(now);
        let first = self.failing.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        let since = first.err().unwrap_or(now);
        !has_key || Duration::from_nanos(now.saturating_sub(since)) >= MAX_FAILING_TIME
    }

    /// Whether a handshake may be asked for now, because this reason was not given a moment ago. If so, the time is recorded.
    pub fn may_ask(&self, reason: SealedWanted, now: Instant) -> bool {
        let (asked, now) = (&self.asked[reason as usize], self.moment(now));
        let last = asked.load(Ordering::Relaxed);
        let is_due = last == 0 || Duration::from_nanos(now.saturating_sub(last)) >= MIN_ASK_INTERVAL;
        // Of several workers one asks.
        is_due && asked.compare_exchange(last, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Forgets when a handshake was asked for: the request is lost.
    pub fn ask_again(&self, reason: SealedWanted) {
        self.asked[reason as usize].store(0, Ordering::Relaxed);
    }

    /// Its status.
    pub fn status(&self) -> SealedStatus {
        let keys = self.keys();
        let now = boottime();
        let mut receive: Vec<&Arc<ReceiveKeyInUse>> = keys.receive.iter().flatten().collect();
        receive.sort_unstable_by_key(|key| std::cmp::Reverse(key.serial));
        let seconds = |since: Duration| now.saturating_sub(since).as_secs();
        SealedStatus {
            unsealed: keys.unsealed,
            suite: keys.send.as_ref().map(|send| send.suite),
            send_seconds: keys.send.as_ref().map(|send| seconds(send.since)),
            send_counter: keys.send.as_ref().map(|send| send.key.next_counter()),
            receive_seconds: receive.iter().map(|key| seconds(key.since)).collect(),
        }
    }
}

/// A worker's view of a tunnel's keys.
#[derive(Clone)]
pub struct SealedView {
    /// What all workers share.
    pub shared: Arc<SealedTunnel>,
    generation: u64,
    keys: Arc<KeySet>,
}

impl SealedView {
    /// A view of the present keys.
    pub fn new(shared: Arc<SealedTunnel>) -> Self {
        // Read before the keys: a later change is then seen at the next refresh.
        let generation = shared.generation.load(Ordering::Acquire);
        let keys = shared.keys();
        Self { shared, generation, keys }
    }

    /// Looks at the present keys. Without a change, this costs one load.
    #[inline]
    pub fn refresh(&mut self) {
        let generation = self.shared.generation.load(Ordering::Acquire);
        if generation != self.generation {
            self.keys = self.shared.keys();
            self.generation = generation;
        }
    }

    /// The keys at the last refresh.
    #[inline]
    pub fn keys(&self) -> &KeySet {
        &self.keys
    }
}
