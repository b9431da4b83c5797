//! Our send keys: made, announced by NK_IND, used from the NK_ACK on.

use std::time::Duration;

use rand::CryptoRng;

use super::retry::{Due, Retry, Timing};
use super::{Action, Note, Out};
use crate::control::protocol::KeyOctets;
use crate::wire::message::{DynamicKey, Message};

pub(super) struct Sender {
    timing: Timing,
    /// The engine sends under a dynamic key.
    key_in_use: bool,
    /// The key that waits for its NK_ACK.
    pending: Option<Pending>,
    /// Of the last exchange that needed no repetition.
    round_trip: Option<Duration>,
}

struct Pending {
    key: DynamicKey,
    retry: Retry,
}

impl Sender {
    pub fn new(timing: Timing) -> Self {
        Self { timing, key_in_use: false, pending: None, round_trip: None }
    }

    pub fn start_over(&mut self) {
        (self.key_in_use, self.pending) = (false, None);
    }

    pub fn deadline(&self) -> Option<Duration> {
        self.pending.as_ref().map(|pending| pending.retry.next)
    }

    /// A packet was sent under the static key. While an exchange is under way, its timer does what is to be done; and
    /// an event that crossed our last SetSendKey is out of date.
    pub fn key_missing<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.pending.is_none() && !self.key_in_use {
            self.begin(out);
        }
    }

    /// The send key has served its time. A peer that keeps its old key is sent to under it until the NK_ACK.
    pub fn key_spent<R: CryptoRng>(&mut self, peer_keeps_keys: bool, out: &mut Out<'_, R>) {
        if self.pending.is_some() {
            return;
        }
        if !peer_keeps_keys {
            self.drop_key(out);
        }
        self.begin(out);
    }

    /// Nothing was sent for so long that the peer has forgotten the key: the next packet goes under the static one and asks
    /// for another.
    pub fn key_forgotten<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.drop_key(out) {
            out.log(Note::Forgotten);
        }
    }

    /// NK_REQ: the peer cannot open what we send, and could not open an NK_IND under the same key either.
    pub fn requested<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        out.log(Note::Requested);
        let dropped = self.drop_key(out);
        match &mut self.pending {
            Some(pending) if dropped || pending.retry.is_old(out.now.at) => {
                pending.retry.again(out.now.at);
                announce(&pending.key, out);
            }
            // It crossed the NK_IND that answers it.
            Some(_) => {}
            None => self.begin(out),
        }
    }

    /// NK_ACK: the peer has taken the key with this sum.
    pub fn acknowledged<R: CryptoRng>(&mut self, sum: [u8; 4], out: &mut Out<'_, R>) {
        match self.pending.take_if(|pending| pending.key.has_sum(sum)) {
            Some(Pending { key, retry }) => {
                let after = out.now.at.saturating_sub(retry.started);
                if !retry.repeated {
                    self.round_trip = Some(after);
                }
                self.key_in_use = true;
                out.actions.push(Action::SetSendKey(KeyOctets(key.0)));
                out.log(Note::NewSendKey { after });
            }
            None => out.log(Note::StrayAcknowledgement),
        }
    }

    pub fn tick<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(Pending { key, retry }) = &mut self.pending else { return };
        let after = out.now.at.saturating_sub(retry.started);
        match retry.due(out.now.at) {
            Due::Wait => {}
            Due::Again => {
                if after >= self.timing.tokxc && std::mem::take(&mut self.key_in_use) {
                    // The peer may have lost the old key, and will in any case not keep it for ever.
                    out.actions.push(Action::DropSendKey);
                }
                announce(key, out);
            }
            Due::GiveUp => {
                // The next packet starts again, with another key: the peer may have taken and forgotten this one.
                self.pending = None;
                out.log(Note::NoAcknowledgement { after });
            }
        }
    }

    fn begin<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let key = DynamicKey::random(out.rng);
        announce(&key, out);
        self.pending = Some(Pending { key, retry: Retry::new(self.timing, out.now.at, self.round_trip) });
    }

    /// Whether there was one to drop.
    fn drop_key<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) -> bool {
        let dropped = std::mem::take(&mut self.key_in_use);
        if dropped {
            out.actions.push(Action::DropSendKey);
        }
        dropped
    }
}

fn announce<R: CryptoRng>(key: &DynamicKey, out: &mut Out<'_, R>) {
    out.send_opening(&Message::indication(key));
}
