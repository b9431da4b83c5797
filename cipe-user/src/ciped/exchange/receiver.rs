//! The peer's keys: asked for by NK_REQ, taken at the NK_IND, acknowledged by NK_ACK.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rand::CryptoRng;

use super::retry::{Due, Retry, Timing};
use super::{Action, Note, Out};
use crate::control::protocol::KeyOctets;
use crate::wire::message::{DynamicKey, Message};

pub(super) struct Receiver {
    timing: Timing,
    /// Hash of the receive key.
    current: Option<u64>,
    taken: Taken,
    /// The NK_REQ that waits for its NK_IND.
    asking: Option<Retry>,
    /// When the last NK_REQ was sent that was no repetition.
    asked: Option<Duration>,
}

impl Receiver {
    pub fn new(timing: Timing) -> Self {
        Self { timing, current: None, taken: Taken::default(), asking: None, asked: None }
    }

    pub fn start_over(&mut self) {
        (self.current, self.asking, self.asked) = (None, None, None);
    }

    pub fn deadline(&self) -> Option<Duration> {
        self.asking.as_ref().map(|retry| retry.next)
    }

    /// A packet came under a key that we do not have, or the key is used up. Asks at once, but begins to ask at most
    /// once per tokxc: whoever can make datagrams must not make us send as many.
    pub fn key_missing<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.asking.is_some() {
            return;
        }
        let earliest = self.asked.map_or(Duration::ZERO, |asked| asked + self.timing.tokxc);
        if out.now.at < earliest {
            self.asking = Some(Retry::later(self.timing, earliest));
            return;
        }
        self.asked = Some(out.now.at);
        self.asking = Some(Retry::new(self.timing, out.now.at, None));
        out.send_opening(&Message::Request);
    }

    /// NK_IND: the peer's next key, or the same one again if our NK_ACK was lost.
    pub fn indication<R: CryptoRng>(&mut self, key: DynamicKey, sum: [u8; 4], out: &mut Out<'_, R>) {
        let hash = self.taken.hash(&key);
        if self.current != Some(hash) {
            if !self.taken.insert(hash) {
                out.log(Note::ReusedKey);
                return;
            }
            self.current = Some(hash);
            let keep = self.timing.keep();
            out.actions.push(Action::SetReceiveKey { key: KeyOctets(key.0), keep });
            out.log(Note::NewReceiveKey);
        }
        self.asking = None;
        out.send(&Message::Acknowledgement { sum });
    }

    pub fn tick<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(retry) = &mut self.asking else { return };
        match retry.due(out.now.at) {
            Due::Wait => {}
            Due::Again => {
                if self.asked.is_none_or(|asked| asked < retry.started) {
                    self.asked = Some(retry.started);
                }
                out.send_opening(&Message::Request);
            }
            Due::GiveUp => {
                let after = out.now.at.saturating_sub(retry.started);
                self.asking = None;
                out.log(Note::NoIndication { after });
            }
        }
    }
}

/// The keys taken since the start, as keyed hashes, so that a replayed NK_IND brings none of them back. The oldest of
/// more than [`Taken::CAPACITY`] are forgotten: 20 years of keys at the default tokey, and at most 32 MiB.
#[derive(Default)]
struct Taken {
    hasher: RandomState,
    hashes: HashSet<u64>,
    order: VecDeque<u64>,
}

impl Taken {
    const CAPACITY: usize = 1 << 20;

    fn hash(&self, key: &DynamicKey) -> u64 {
        self.hasher.hash_one(key.0)
    }

    /// `false` if it was there already.
    fn insert(&mut self, hash: u64) -> bool {
        if !self.hashes.insert(hash) {
            return false;
        }
        if self.order.len() == Self::CAPACITY
            && let Some(oldest) = self.order.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        self.order.push_back(hash);
        true
    }
}
