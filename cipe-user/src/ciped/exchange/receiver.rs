//! The peer's keys: requested by NK_REQ, taken at the NK_IND, acknowledged by NK_ACK.

use std::time::Duration;

use rand::CryptoRng;

use super::retry::{Due, FirstWait, Retry, Timing};
use super::taken::TakenKeys;
use super::{Action, Note, Out};
use crate::control::protocol::{KeyOctets, Under};
use crate::wire::message::{DynamicKey, Message};

pub(super) struct Receiver {
    timing: Timing,
    /// Hash of the receive key.
    current: Option<u64>,
    taken: TakenKeys,
    /// The NK_REQ that waits for its NK_IND.
    asking: Option<Retry>,
    /// When the last NK_REQ was sent, repetitions excluded.
    asked: Option<Duration>,
    /// The key for the next NK_REQ.
    under: Under,
    first_wait: FirstWait,
    /// The sum in the last NK_ACK under a dynamic key, and when it was sent.
    acknowledged: Option<([u8; 4], Duration)>,
}

/// An NK_REQ within this time after an NK_ACK means that the peer could not open the NK_ACK: longer than any round
/// trip.
const UNOPENED_ACK_WINDOW: Duration = Duration::from_secs(2);

impl Receiver {
    pub(super) fn new(timing: Timing, taken: TakenKeys) -> Self {
        Self {
            timing,
            current: None,
            taken,
            asking: None,
            asked: None,
            under: Under::Live,
            first_wait: FirstWait::new(timing),
            acknowledged: None,
        }
    }

    pub(super) fn start_over(&mut self) {
        (self.current, self.asking, self.asked, self.acknowledged) = (None, None, None, None);
    }

    /// The keys that the peer has announced.
    pub(super) fn taken(&self) -> &TakenKeys {
        &self.taken
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.asking.as_ref().map(|retry| retry.next)
    }

    /// A packet came under a key that we do not have, or the key has reached its limit. Sends an NK_REQ at once, but
    /// starts such an exchange at most once per tokxc: forged datagrams must not make us send one for each.
    pub(super) fn key_missing<R: CryptoRng>(&mut self, under: Under, out: &mut Out<'_, R>) {
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

    /// An NK_REQ right after our NK_ACK: the peer lacks our send key, so it could not open the NK_ACK either.
    pub(super) fn requested<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if let Some((sum, at)) = self.acknowledged.take()
            && out.now.at <= at + UNOPENED_ACK_WINDOW
        {
            out.send(&Message::Acknowledgement { sum }, Under::Static);
        }
    }

    /// NK_IND: the peer's next key, or the same key again if our NK_ACK was lost. If it is under the static key, the
    /// peer may have no other key, and could not open an NK_ACK under our send key.
    pub(super) fn indication<R: CryptoRng>(
        &mut self,
        key: DynamicKey,
        sum: [u8; 4],
        under: Under,
        out: &mut Out<'_, R>,
    ) {
        let hash = self.taken.hash(&key);
        if self.current != Some(hash) {
            if !self.taken.insert(&key) {
                out.log(Note::ReusedKey);
                return;
            }
            self.current = Some(hash);
            let keep = self.timing.keep();
            out.actions.push(Action::SetReceiveKey { key: KeyOctets::new(&key.0), keep });
            out.log(Note::NewReceiveKey);
        }
        if let Some(retry) = self.asking.take() {
            self.first_wait.learn(out.now.at.saturating_sub(retry.started), retry.repeated);
        }
        self.acknowledged = (under == Under::Live).then_some((sum, out.now.at));
        out.send(&Message::Acknowledgement { sum }, under);
    }

    pub(super) fn tick<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(retry) = &mut self.asking else { return };
        match retry.due(out.now.at) {
            Due::Wait => {}
            Due::Again => {
                if self.asked.is_none_or(|asked| asked < retry.started) {
                    self.asked = Some(retry.started);
                }
                // The peer may lack the key of the first NK_REQ.
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
