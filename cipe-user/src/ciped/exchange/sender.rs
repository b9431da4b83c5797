//! Our send keys: made, announced by NK_IND, used from the NK_ACK on.

use std::time::Duration;

use rand::CryptoRng;

use super::announcements::Announcements;
use super::retry::{Due, FirstWait, Retry, Timing};
use super::{Action, Note, Out};
use crate::control::protocol::{KeyOctets, Under};
use crate::wire::message::{DynamicKey, Message};

pub(super) struct Sender {
    timing: Timing,
    /// The dynamic key that the engine sends under.
    in_use: Option<KeyOctets>,
    /// The key that waits for its NK_ACK.
    pending: Option<Pending>,
    first_wait: FirstWait,
    announcements: Announcements,
}

struct Pending {
    key: DynamicKey,
    /// When it was announced first.
    since: Duration,
    /// The peer may lack the key in use.
    under_static: bool,
    retry: Retry,
}

impl Pending {
    /// The key that a repeated NK_IND goes under.
    fn under(&self) -> Under {
        if self.under_static { Under::Static } else { Under::Live }
    }
}

impl Sender {
    pub(super) fn new(timing: Timing) -> Self {
        Self {
            timing,
            in_use: None,
            pending: None,
            first_wait: FirstWait::new(timing),
            announcements: Announcements::new(timing),
        }
    }

    pub(super) fn start_over(&mut self) {
        (self.in_use, self.pending) = (None, None);
        self.announcements.start_over();
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        match &self.pending {
            Some(pending) => Some(pending.retry.next.min(pending.since + self.timing.tokxc)),
            None => self.announcements.due(),
        }
    }

    /// A packet was sent under the static key. While an exchange is under way, its timer does what is to be done; and
    /// an event that crossed our last SetSendKey is out of date.
    pub(super) fn key_missing<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.pending.is_none() && self.in_use.is_none() {
            self.begin(Under::Live, out);
        }
    }

    /// The send key has served its time. A peer that keeps its old key is sent to under it until the NK_ACK. An original
    /// is not, but it can still open the NK_IND under it: so each key is announced under the one before it.
    pub(super) fn key_spent<R: CryptoRng>(&mut self, peer_keeps_keys: bool, out: &mut Out<'_, R>) {
        if self.pending.as_ref().is_some_and(|pending| !self.is_in_use(&pending.key)) {
            return;
        }
        let retired = if peer_keeps_keys { None } else { self.drop_key(out) };
        self.begin(retired.map_or(Under::Live, Under::Retired), out);
    }

    /// Nothing was sent for so long that the peer has forgotten the key: the next packet goes under the static one and asks
    /// for another.
    pub(super) fn key_forgotten<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.drop_key(out).is_some() {
            out.log(Note::Forgotten);
        }
    }

    /// The peer may lack the key in use, as far as can be told from this side: another one is announced under the static
    /// key, at most once per tokxc.
    pub(super) fn diverged<R: CryptoRng>(&mut self, peer_keeps_keys: bool, out: &mut Out<'_, R>) {
        if let Some(pending) = &mut self.pending {
            pending.under_static = true;
            return;
        }
        if self.in_use.is_none() || !self.announcements.may_diverge(out.now.at) {
            return;
        }
        if !peer_keeps_keys {
            self.drop_key(out);
        }
        self.begin(Under::Static, out);
    }

    /// The peer goes away, and its keys go with it: when it is back, it opens what is under the static key alone.
    pub(super) fn left<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        self.drop_key(out);
    }

    /// NK_REQ: the peer cannot open what we send, and could not open an NK_IND under the same key either.
    pub(super) fn requested<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        out.log(Note::Requested);
        let dropped = self.drop_key(out).is_some();
        match &mut self.pending {
            Some(pending) if dropped || pending.retry.is_old(out.now.at) => {
                pending.retry.again(out.now.at);
                self.announcements.again(out.now.at);
                announce(&pending.key, Under::Static, false, out);
            }
            // It crossed the NK_IND that answers it.
            Some(_) => {}
            None => self.begin(Under::Static, out),
        }
    }

    /// NK_ACK: the peer has taken the key with this sum.
    pub(super) fn acknowledged<R: CryptoRng>(&mut self, sum: [u8; 4], peer_keeps_keys: bool, out: &mut Out<'_, R>) {
        let now = out.now.at;
        match self.pending.take_if(|pending| pending.key.has_sum(sum)) {
            Some(Pending { key, retry, .. }) => {
                let after = now.saturating_sub(retry.started);
                self.first_wait.learn(after, retry.repeated);
                if self.is_in_use(&key) {
                    self.announcements.taken_again(now);
                    return;
                }
                self.announcements.taken(now, peer_keeps_keys);
                self.in_use = Some(KeyOctets(key.0));
                out.actions.push(Action::SetSendKey(KeyOctets(key.0)));
                out.log(Note::NewSendKey { after });
            }
            None => {
                // Of another key than the one in use: the peer may have taken that one last.
                let of_another = self.in_use.as_ref().is_some_and(|key| !DynamicKey(key.0).has_sum(sum));
                if of_another && !peer_keeps_keys {
                    self.announcements.doubt(now);
                }
                out.log(Note::StrayAcknowledgement);
            }
        }
    }

    pub(super) fn tick<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let now = out.now.at;
        let Some(pending) = &mut self.pending else {
            if self.announcements.take_due(now) {
                self.announce_again(out);
            }
            return;
        };
        let after = now.saturating_sub(pending.retry.started);
        // There are originals that refuse a key which they have taken before: to them, a lost NK_ACK is lost for good.
        let another = now >= pending.since + self.timing.tokxc;
        match pending.retry.due(now) {
            Due::Wait if !another => {}
            due @ (Due::Wait | Due::Again) => {
                if due == Due::Wait {
                    pending.retry.again(now);
                }
                if after >= self.timing.tokxc && self.in_use.take().is_some() {
                    // The peer may have lost the old key, and will in any case not keep it for ever.
                    out.actions.push(Action::DropSendKey);
                }
                if another {
                    (pending.key, pending.since) = (DynamicKey::random(out.rng), now);
                    self.announcements.another(now);
                } else {
                    self.announcements.again(now);
                }
                announce(&pending.key, pending.under(), another, out);
            }
            Due::GiveUp => {
                // The next packet starts again.
                self.pending = None;
                self.announcements.give_up();
                out.log(Note::NoAcknowledgement { after });
            }
        }
    }

    fn begin<R: CryptoRng>(&mut self, under: Under, out: &mut Out<'_, R>) {
        let (key, now) = (DynamicKey::random(out.rng), out.now.at);
        let under_static = under == Under::Static;
        announce(&key, under, true, out);
        let retry = Retry::new(self.timing, now, self.first_wait.get());
        self.pending = Some(Pending { key, since: now, under_static, retry });
        self.announcements.begin(now);
    }

    /// Announces the key in use once more, so that it is the one that the peer takes last. Packets go on under it, and count on:
    /// the peer counts from here on.
    fn announce_again<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(key) = self.in_use.as_ref().map(|key| DynamicKey(key.0)) else { return };
        let now = out.now.at;
        self.announcements.once_more(now);
        announce(&key, Under::Static, false, out);
        let retry = Retry::new(self.timing, now, self.first_wait.get());
        self.pending = Some(Pending { key, since: now, under_static: true, retry });
    }

    fn is_in_use(&self, key: &DynamicKey) -> bool {
        self.in_use.as_ref().is_some_and(|in_use| in_use.0 == key.0)
    }

    /// The key that was dropped, if there was one.
    fn drop_key<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) -> Option<KeyOctets> {
        let dropped = self.in_use.take();
        if dropped.is_some() {
            out.actions.push(Action::DropSendKey);
        }
        dropped
    }
}

fn announce<R: CryptoRng>(key: &DynamicKey, under: Under, first: bool, out: &mut Out<'_, R>) {
    out.send_opening(&Message::indication(key), under, first);
}
