//! The dynamic keys that the engine has been given, for the next engine if this one dies.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::control::protocol::{KeyOctets, Request, SealedRequest, SessionKeys, Unsealed};

/// Maximum receive keys: the newest one, and those before it that the peer may still use. One of ours announces a new key at most each
/// tokxc, a second at the least, and may use any of them: so none is forgotten before [`MIN_HOLD`].
const MAX_RECEIVE_KEYS: usize = 64;
/// How long a receive key is held after its successor has come, at least: the peer begins with the successor at once, unless many
/// messages are lost.
const MIN_HOLD: Duration = Duration::from_secs(60);

/// A receive key that has a successor.
struct Former {
    key: KeyOctets,
    until: Instant,
}

/// The keys in use. They are erased when they are dropped.
#[derive(Default)]
pub(super) struct KeysInUse {
    send: Option<KeyOctets>,
    receive: Option<KeyOctets>,
    /// The newest first.
    former: VecDeque<Former>,
    keep: Duration,
}

impl KeysInUse {
    /// Notes what a request changes.
    pub(super) fn note(&mut self, request: &Request, now: Instant) {
        match request {
            Request::SetSendKey { key } => self.send = Some(key.clone()),
            Request::DropSendKey => self.send = None,
            Request::SetReceiveKey { key, keep_ms } if self.receive.as_ref() != Some(key) => {
                self.keep = Duration::from_millis(*keep_ms);
                let until = now + MIN_HOLD.max(self.keep);
                if let Some(key) = self.receive.replace(key.clone()) {
                    self.former.push_front(Former { key, until });
                    self.former.truncate(MAX_RECEIVE_KEYS - 1);
                }
            }
            // Nothing under them is accepted any more.
            Request::Sealed(SealedRequest::Unsealed(Unsealed { accepts: false, .. })) => self.clear(),
            _ => {}
        }
    }

    /// Forgets all keys.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Forgets the former keys whose time is over.
    pub(super) fn forget_former(&mut self, now: Instant) {
        self.former.retain(|former| former.until > now);
    }

    /// When [`KeysInUse::forget_former`] is due.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.former.iter().map(|former| former.until).min()
    }

    /// The keys for the next engine; `None`: there are none.
    pub(super) fn for_next_engine(&self) -> Option<SessionKeys> {
        let former = self.former.iter().map(|former| &former.key);
        let keys = SessionKeys {
            send: self.send.clone(),
            receive: self.receive.iter().chain(former).cloned().collect(),
            keep_ms: u64::try_from(self.keep.as_millis()).unwrap_or(u64::MAX),
        };
        (keys.send.is_some() || !keys.receive.is_empty()).then_some(keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receive(key: u8) -> Request {
        Request::SetReceiveKey { key: KeyOctets::new(&[key; 16]), keep_ms: 20_000 }
    }

    fn held(keys: &KeysInUse) -> (Option<u8>, Vec<u8>) {
        let keys = keys.for_next_engine().unwrap_or_default();
        (keys.send.as_ref().map(|key| key[0]), keys.receive.iter().map(|key| key[0]).collect())
    }

    #[test]
    fn the_keys_in_use_are_held_and_former_ones_for_a_time() {
        let start = Instant::now();
        let mut keys = KeysInUse::default();
        assert!(keys.for_next_engine().is_none());
        keys.note(&Request::SetSendKey { key: KeyOctets::new(&[9; 16]) }, start);
        for key in [1, 2, 2, 3] {
            keys.note(&receive(key), start);
        }
        assert_eq!(held(&keys), (Some(9), vec![3, 2, 1]));
        let later = start + MIN_HOLD / 2;
        keys.note(&Request::DropSendKey, later);
        (4..7).for_each(|key| keys.note(&receive(key), later));
        assert_eq!(held(&keys), (None, vec![6, 5, 4, 3, 2, 1]));
        assert_eq!(keys.deadline(), Some(start + MIN_HOLD));
        keys.forget_former(start + MIN_HOLD);
        assert_eq!(held(&keys), (None, vec![6, 5, 4, 3]), "the hold of 3 began when 4 came");
        keys.forget_former(later + MIN_HOLD);
        assert_eq!(held(&keys), (None, vec![6]));
        keys.clear();
        assert!(keys.for_next_engine().is_none());
    }

    #[test]
    fn keys_of_protocol_3_are_wiped_when_only_sealed_packets_are_accepted() {
        let start = Instant::now();
        let mut keys = KeysInUse::default();
        keys.note(&Request::SetSendKey { key: KeyOctets::new(&[9; 16]) }, start);
        keys.note(&receive(1), start);
        let unsealed = |accepts| Request::Sealed(SealedRequest::Unsealed(Unsealed { sends: false, accepts }));
        keys.note(&unsealed(true), start);
        assert_eq!(held(&keys), (Some(9), vec![1]));
        keys.note(&unsealed(false), start);
        assert!(keys.for_next_engine().is_none());
    }

    #[test]
    fn the_key_in_use_is_held_however_many_are_announced() {
        let start = Instant::now();
        let mut keys = KeysInUse::default();
        (0..60).for_each(|second| keys.note(&receive(second), start + Duration::from_secs(second.into())));
        assert_eq!(held(&keys).1.last(), Some(&0));
        (0..=255).for_each(|key| keys.note(&receive(key), start));
        assert_eq!(held(&keys).1.len(), MAX_RECEIVE_KEYS);
    }
}
