//! Our send keys: generated, announced by NK_IND, and used after the NK_ACK.

use std::time::Duration;

use rand::CryptoRng;

use super::announcements::Announcements;
use super::retry::{Due, FirstWait, Retry, Timing};
use super::{Action, Note, Out};
use crate::control::protocol::{KeyOctets, Under};
use crate::wire::message::{DynamicKey, Message};

pub(super) struct Sender {
    timing: Timing,
    /// The dynamic key in use by the engine.
    in_use: Option<KeyOctets>,
    /// The key that has no NK_ACK yet.
    pending: Option<Pending>,
    first_wait: FirstWait,
    announcements: Announcements,
}

struct Pending {
    key: DynamicKey,
    /// When its first NK_IND was sent.
    since: Duration,
    /// Whether the peer may lack the key in use.
    under_static: bool,
    retry: Retry,
}

impl Pending {
    /// Returns the key under which a repeated NK_IND is sent.
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

    /// A packet was sent under the static key. Ignored during an exchange, whose timer handles it, and while a key is
    /// in use: then the event was sent before our last SetSendKey arrived.
    pub(super) fn key_missing<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.pending.is_none() && self.in_use.is_none() {
            self.begin(Under::Live, out);
        }
    }

    /// The send key has reached its limit. If the peer keeps old receive keys, data is sent under the old key until the
    /// NK_ACK. If it is an original, only the NK_IND is: the original can still open it. So each NK_IND is sent under
    /// the previous key.
    pub(super) fn key_expired<R: CryptoRng>(&mut self, peer_keeps_keys: bool, out: &mut Out<'_, R>) {
        if self.pending.as_ref().is_some_and(|pending| !self.is_in_use(&pending.key)) {
            return;
        }
        let retired = if peer_keeps_keys { None } else { self.drop_key(out) };
        self.begin(retired.map_or(Under::Live, Under::Retired), out);
    }

    /// Nothing was sent for so long that the peer has dropped the key. The next packet is sent under the static key and
    /// requests another key.
    pub(super) fn key_forgotten<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        if self.drop_key(out).is_some() {
            out.log(Note::Forgotten);
        }
    }

    /// The peer may lack the key in use. Announces another key under the static key, at most once per tokxc.
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

    /// The peer goes away and loses its keys. When it is back, it can only open packets under the static key.
    pub(super) fn left<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        self.drop_key(out);
    }

    /// NK_REQ: the peer cannot open our packets, so it could not open an NK_IND under the same key either.
    pub(super) fn requested<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        out.log(Note::Requested);
        let dropped = self.drop_key(out).is_some();
        match &mut self.pending {
            Some(pending) if dropped || pending.retry.is_old(out.now.at) => {
                pending.retry.again(out.now.at);
                self.announcements.retransmitted(out.now.at);
                announce(&pending.key, Under::Static, false, out);
            }
            // The request and the NK_IND crossed.
            Some(_) => {}
            None => self.begin(Under::Static, out),
        }
    }

    /// NK_ACK: the peer has taken the key with this checksum.
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
                self.announcements.taken_by_peer(now, peer_keeps_keys);
                self.in_use = Some(KeyOctets::new(&key.0));
                out.actions.push(Action::SetSendKey(KeyOctets::new(&key.0)));
                out.log(Note::NewSendKey { after });
            }
            None => {
                // The sum is that of another key than the one in use. The peer may have taken that key last.
                let of_another = self.in_use.as_ref().is_some_and(|key| !DynamicKey(**key).has_sum(sum));
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
        // Some originals refuse a key that they have taken before. If their NK_ACK is lost, they never repeat it.
        let another = now >= pending.since + self.timing.tokxc;
        match pending.retry.due(now) {
            Due::Wait if !another => {}
            due @ (Due::Wait | Due::Again) => {
                if due == Due::Wait {
                    pending.retry.again(now);
                }
                if after >= self.timing.tokxc && self.in_use.take().is_some() {
                    // The peer may have lost the old key, and does not keep it for ever.
                    out.actions.push(Action::DropSendKey);
                }
                if another {
                    (pending.key, pending.since) = (DynamicKey::random(out.rng), now);
                    self.announcements.replacement_sent(now);
                } else {
                    self.announcements.retransmitted(now);
                }
                announce(&pending.key, pending.under(), another, out);
            }
            Due::GiveUp => {
                // The next packet under the static key starts a new exchange.
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
        self.announcements.first_sent(now);
    }

    /// Announces the key in use once more, so that it is the last one that the peer takes. Data stays under this key;
    /// its packet count continues, while the peer starts to count again.
    fn announce_again<R: CryptoRng>(&mut self, out: &mut Out<'_, R>) {
        let Some(key) = self.in_use.as_ref().map(|key| DynamicKey(**key)) else { return };
        let now = out.now.at;
        self.announcements.in_use_sent_again(now);
        announce(&key, Under::Static, false, out);
        let retry = Retry::new(self.timing, now, self.first_wait.get());
        self.pending = Some(Pending { key, since: now, under_static: true, retry });
    }

    fn is_in_use(&self, key: &DynamicKey) -> bool {
        self.in_use.as_ref().is_some_and(|in_use| **in_use == key.0)
    }

    /// Drops the key in use. Returns it if there was one.
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
