//! The keys for sealed packets of one tunnel.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::control::protocol::{SealedKey, Unsealed};
use crate::engine::ledger::{NextCounter, WindowWords};
use crate::sealed::cipher::{Key, Suite};
use crate::sealed::direction::{ReceiveKey, SendKey};
use crate::sealed::packet::Epoch;
use crate::sealed::window::Window;

/// The keys in use at one moment.
#[derive(Clone)]
pub struct KeySet {
    /// The use of other packets.
    pub unsealed: Unsealed,
    /// The send key.
    pub send: Option<Arc<SendKeyInUse>>,
    /// The receive keys, by epoch.
    pub receive: [Option<Arc<ReceiveKeyInUse>>; 3],
}

impl KeySet {
    /// Whether there is a receive key.
    pub fn can_receive(&self) -> bool {
        self.receive.iter().any(Option::is_some)
    }

    /// The receive key of an epoch.
    #[inline]
    pub fn receive_key(&self, epoch: Epoch) -> Option<&Arc<ReceiveKeyInUse>> {
        self.receive[epoch.index()].as_ref()
    }
}

/// A send key.
pub struct SendKeyInUse {
    /// The key, with its counter in the ledger.
    pub key: SendKey<NextCounter>,
    /// Its AEAD.
    pub suite: Suite,
    /// When it came into use, on the clock of [`boottime`](crate::engine::ledger::boottime).
    pub since: Duration,
    renew: Duration,
    is_old: AtomicBool,
}

impl SendKeyInUse {
    pub(super) fn new(key: &SealedKey, next: NextCounter, renew: Duration) -> Self {
        let since = next.since();
        let expanded = Key::new(key.suite, &key.key);
        let (suite, is_old) = (key.suite, AtomicBool::new(false));
        Self { key: SendKey::new(expanded, key.epoch, next), suite, since, renew, is_old }
    }

    pub(super) fn poll(&self, now: Duration) {
        if now >= self.renew {
            self.is_old.store(true, Ordering::Relaxed);
        }
    }

    /// Whether another key is wanted, by age or by the number of packets.
    #[inline]
    pub fn is_due(&self) -> bool {
        self.is_old.load(Ordering::Relaxed) || self.key.is_worn()
    }
}

/// A receive key.
pub struct ReceiveKeyInUse {
    /// The key, with its window in the ledger.
    pub key: ReceiveKey<WindowWords>,
    /// Names the session.
    pub serial: u64,
    /// When it came into use, on the clock of [`boottime`](crate::engine::ledger::boottime).
    pub since: Duration,
    /// Whether the daemon was told that a packet has opened under it.
    was_told: AtomicBool,
}

impl ReceiveKeyInUse {
    pub(super) fn new(key: &SealedKey, words: WindowWords) -> Self {
        let since = words.since();
        let expanded = Key::new(key.suite, &key.key);
        let was_told = AtomicBool::new(false);
        Self { key: ReceiveKey::new(expanded, Window::over(words)), serial: key.serial, since, was_told }
    }

    /// The daemon did not hear it.
    pub(super) fn tell_again(&self) {
        self.was_told.store(false, Ordering::Relaxed);
    }

    /// Call this if a packet has opened: `tell` tells the daemon of the first one, and returns whether it could.
    #[inline]
    pub fn opened(&self, tell: impl FnOnce() -> bool) {
        if !self.was_told.load(Ordering::Relaxed) && !self.was_told.swap(true, Ordering::Relaxed) && !tell() {
            self.was_told.store(false, Ordering::Relaxed);
        }
    }
}
