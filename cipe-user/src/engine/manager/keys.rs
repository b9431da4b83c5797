//! Keys as the control thread keeps them: a receive key stays for a while beside its successor.

use std::time::{Duration, Instant};

use cipe_common::maps::{Slot, key_index};

use super::Manager;
use crate::kernel::keys::KEY;

/// A previous receive key, as the control thread keeps it. Its time begins with the first packet under its successor:
/// until then the peer may still use it, and perhaps for good, since two NK_IND of an original may overtake each other.
#[derive(Debug)]
pub(super) struct Previous {
    /// Generation of the receive slot that holds the successor.
    pub(super) successor: u64,
    /// How long it is kept then.
    pub(super) keep: Duration,
    /// When that is over, once it has begun.
    pub(super) until: Option<Instant>,
}

impl Previous {
    /// Whether its time is over at `now`; `used`: generation of the receive key that the peer began with last.
    pub(super) fn is_over(&mut self, used: u64, now: Instant) -> bool {
        if used == self.successor {
            self.until.get_or_insert(now + self.keep);
        }
        self.until.is_some_and(|until| until <= now)
    }
}

impl Manager {
    /// Makes `key` the receive key; the one before it becomes the previous one.
    pub(super) fn set_receive_key(&mut self, number: u16, key: &[u8; KEY], keep: Duration) {
        let (tunnel, reader) = (u32::from(number), self.keys.reader());
        let index = key_index(tunnel, Slot::Receive);
        let old = reader.read(index).map(|(_, old)| old);
        if old.as_deref() == Some(key) {
            return;
        }
        // In this order: the worker takes the old key's replay filter along to the previous slot.
        if let Some(old) = &old {
            self.keys.set(tunnel, Slot::Previous, old);
        }
        self.keys.set(tunnel, Slot::Receive, key);
        if let Some(tenant) = self.tenants.get_mut(&number).filter(|_| old.is_some()) {
            tenant.previous = Some(Previous { successor: reader.generation(index), keep, until: None });
            self.aging.insert(number);
        }
    }

    /// Empties the slots of previous keys whose time is over at `now`.
    pub(super) fn forget_previous_keys(&mut self, now: Instant) {
        self.aging.retain(|number| {
            let Some(tenant) = self.tenants.get_mut(number) else { return false };
            let used = tenant.counters.receive_key_used();
            let over = tenant.previous.as_mut().is_none_or(|previous| previous.is_over(used, now));
            if over {
                tenant.previous = None;
                self.keys.clear((*number).into(), Slot::Previous);
            }
            !over
        });
    }
}
