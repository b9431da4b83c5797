//! The peer's keys: asked for by NK_REQ, taken at the NK_IND, acknowledged by NK_ACK.

use std::collections::{HashSet, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use rand::CryptoRng;

use super::retry::{Due, FirstWait, Retry, Timing};
use super::{Action, Note, Out};
use crate::control::protocol::{KeyOctets, Under};
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
    /// The key that the next NK_REQ goes under.
    under: Under,
    first_wait: FirstWait,
    /// The sum in the last NK_ACK that went under a dynamic key, and when.
    acknowledged: Option<([u8; 4], Duration)>,
}

/// How long after an NK_ACK an NK_REQ is taken for a sign that it could not be opened: more than any round trip.
const OVERLAP: Duration = Duration::from_secs(2);

impl Receiver {
    pub fn new(timing: Timing) -> Self {
        Self {
            timing,
            current: None,
            taken: Taken::default(),
            asking: None,
            asked: None,
            under: Under::Live,
            first_wait: FirstWait::new(timing),
            acknowledged: None,
        }
    }

    pub fn start_over(&mut self) {
        (self.current, self.asking, self.asked, self.acknowledged) = (None, None, None, None);
    }

    pub fn deadline(&self) -> Option<Duration> {
        self.asking.as_ref().map(|retry| retry.next)
    }

    /// A packet came under a key that we do not have, or the key is used up. Asks at once, but begins to ask at most
    /// once per tokxc: whoever can make datagrams must not make us send as many.
    pub fn key_missing<R: CryptoRng>(&mut self, under: Under, out: &mut Out<'_, R>) {
        if self.asking.is_some() {
            return;
        }
        self.under = under;
        let earliest = self.asked.map_or(Duration::ZERO, |asked| asked + self.timing.tokxc);
        if out.now.at < earliest {
            self.asking = Some(Retry::later(self.timing, earliest, self.first_wait.get()));
            return;
        }
        self.asked = Some(out.now.at);
        self.asking = Some(Retry::new(self.timing, out.now.at, self.first_wait.get()));
        out.send_opening(&Message::Request, std::mem::replace(&mut self.under, Under::Static), false);
    }

    /// NK_REQ right after our NK_ACK: the peer lacks our send key, so it has not opened that either.
    pub fn requested<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if let Some((sum, at)) = self.acknowledged.take()
            && out.now.at <= at + OVERLAP
        {
            out.send(&Message::Acknowledgement { sum }, Under::Static);
        }
    }

    /// NK_IND: the peer's next key, or the same one again if our NK_ACK was lost. Under the static key, the peer has
    /// perhaps no other yet, and could not open the NK_ACK under ours.
    pub fn indication<R: CryptoRng>(&mut self, key: DynamicKey, sum: [u8; 4], under: Under, out: &mut Out<'_, R>) {
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
        if let Some(retry) = self.asking.take() {
            self.first_wait.learn(out.now.at.saturating_sub(retry.started), retry.repeated);
        }
        self.acknowledged = (under == Under::Live).then_some((sum, out.now.at));
        out.send(&Message::Acknowledgement { sum }, under);
    }

    pub fn tick<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(retry) = &mut self.asking else { return };
        match retry.due(out.now.at) {
            Due::Wait => {}
            Due::Again => {
                if self.asked.is_none_or(|asked| asked < retry.started) {
                    self.asked = Some(retry.started);
                }
                // The peer may lack the key that the first one went under.
                let under = std::mem::replace(&mut self.under, Under::Static);
                out.send_opening(&Message::Request, under, false);
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
