//! The keys of sealed packets that the engine has been given, for the next engine if this one dies.

use std::time::Duration;

use crate::control::protocol::{SealedKey, SealedKeys, SealedRequest};

/// An engine that asks for a send key within this time after it was sent one had asked before. None is worn so soon.
const ON_THE_WAY: Duration = Duration::from_secs(5);

/// The keys in use. They are wiped when they are dropped.
#[derive(Default)]
pub(super) struct Held {
    /// The send key, and when another one is wanted.
    send: Option<(SealedKey, Duration)>,
    /// When the engine was given the send key.
    since: Duration,
    /// The newest last.
    receive: Vec<SealedKey>,
}

impl Held {
    /// Notes what a request changes.
    pub(super) fn note(&mut self, request: &SealedRequest, now: Duration) {
        match request {
            SealedRequest::Receive(key) => {
                self.receive.retain(|known| known.epoch != key.epoch);
                self.receive.push(key.clone());
            }
            SealedRequest::Forget { serial } => self.receive.retain(|known| known.serial != *serial),
            SealedRequest::Send { key, renew_ms } => {
                self.send = Some((key.clone(), now + Duration::from_millis(*renew_ms)));
                self.since = now;
            }
            SealedRequest::StopSending => self.send = None,
            SealedRequest::Unsealed(_)
            | SealedRequest::Confirm
            | SealedRequest::Transmit { .. }
            | SealedRequest::Judged { .. } => {}
        }
    }

    /// Whether there is a send key.
    pub(super) fn sends(&self) -> bool {
        self.send.is_some()
    }

    /// Whether there is a send key that is so new that nobody can want another one.
    pub(super) fn is_new(&self, now: Duration) -> bool {
        self.send.as_ref().is_some_and(|(_, renew)| now < (self.since + ON_THE_WAY).min(*renew))
    }

    /// The keys for the next engine; `None`: there are none.
    pub(super) fn for_next_engine(&self, now: Duration) -> Option<SealedKeys> {
        let left = |until: Duration| u64::try_from(until.saturating_sub(now).as_millis()).unwrap_or(u64::MAX);
        let send = self.send.as_ref().map(|(key, renew)| (key.clone(), left(*renew)));
        let receive: Vec<SealedKey> = self.receive.iter().rev().cloned().collect();
        (send.is_some() || !receive.is_empty()).then_some(SealedKeys { send, receive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::protocol::KeyOctets;
    use crate::sealed::cipher::Suite;
    use crate::sealed::packet::Epoch;

    fn key(serial: u64, epoch: u8) -> SealedKey {
        let key = KeyOctets::new(&[serial as u8; 32]);
        SealedKey { serial, epoch: Epoch::new(epoch).unwrap(), suite: Suite::Aes256Gcm, key }
    }

    #[test]
    fn the_keys_of_the_engine_are_held_and_no_others() {
        let (mut held, second) = (Held::default(), Duration::from_secs(1));
        assert!(held.for_next_engine(second).is_none());
        for (serial, epoch) in [(1, 1), (2, 2), (3, 3), (4, 1)] {
            held.note(&SealedRequest::Receive(key(serial, epoch)), second);
        }
        held.note(&SealedRequest::Forget { serial: 2 }, second);
        held.note(&SealedRequest::Send { key: key(4, 2), renew_ms: 10_000 }, second);
        held.note(&SealedRequest::Confirm, second);
        assert!(held.is_new(5 * second) && !held.is_new(6 * second));
        let keys = held.for_next_engine(4 * second).unwrap();
        assert_eq!(keys, SealedKeys { send: Some((key(4, 2), 7_000)), receive: vec![key(4, 1), key(3, 3)] });
        assert_eq!(held.for_next_engine(40 * second).unwrap().send.unwrap().1, 0, "another one is wanted at once");
        held.note(&SealedRequest::StopSending, second);
        assert!(!held.sends() && held.for_next_engine(second).unwrap().send.is_none());
        for serial in [3, 4] {
            held.note(&SealedRequest::Forget { serial }, second);
        }
        assert!(held.for_next_engine(second).is_none());
    }
}
