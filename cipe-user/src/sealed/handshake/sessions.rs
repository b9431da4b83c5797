//! Which sessions' keys are in use (sections 6.4 and 8).

use std::time::Duration;

use arrayvec::ArrayVec;
use rand::CryptoRng;

use super::super::cipher::Suite;
use super::super::message::{ANSWER, FIRST};
use super::super::packet::Epoch;
use super::super::secrets::MAC;
use super::attempt::Repeat;
use super::{ANSWER_WAIT, Action, DirectionKey, Note, RENEW_AGE};

/// Age at which a send key is wiped.
const SEND_LIFE: Duration = Duration::from_secs(180);
/// From the first packet under a receive key until it is wiped.
const RECEIVE_LIFE: Duration = Duration::from_secs(240);
/// From the first packet under a newer session until the keys of an older one are wiped.
pub const PREVIOUS_LIFE: Duration = Duration::from_secs(10);
/// From the making of a responder's receive key until it is wiped, if no packet comes under it.
const PENDING_LIFE: Duration = Duration::from_secs(100);
/// How long the initiator of a session waits for a packet under it before it begins another one.
const CONFIRM_WAIT: Duration = Duration::from_secs(10);

/// A receive key that the engine has.
struct Receiving {
    serial: u64,
    epoch: Epoch,
    suite: Suite,
    /// When the handshake began.
    began: Duration,
    is_opened: bool,
    until: Duration,
    /// The send key of a session that we have answered, until it is confirmed.
    aside: Option<DirectionKey>,
}

/// The send key that the engine has.
struct Sending {
    serial: u64,
    /// Whether the peer has begun the session.
    is_answered: bool,
    until: Duration,
}

/// A session that we have begun, until the peer is known to use it.
struct Confirming {
    serial: u64,
    repeat: Repeat,
    /// When another session is begun instead; `None`: that was done.
    gives_up: Option<Duration>,
}

/// The last first message that we have answered, if the session is not confirmed.
pub(super) struct Answered {
    first: [u8; FIRST - MAC],
    answer: [u8; ANSWER],
    serial: u64,
    since: Duration,
}

impl Answered {
    pub(super) fn new(first: &[u8; FIRST], answer: [u8; ANSWER], serial: u64, since: Duration) -> Self {
        Self { first: std::array::from_fn(|i| first[i]), answer, serial, since }
    }
}

#[derive(Default)]
pub(super) struct Sessions {
    /// In the order of their serials.
    receiving: ArrayVec<Receiving, 3>,
    sending: Option<Sending>,
    answered: Option<Answered>,
    confirming: Option<Confirming>,
    last_serial: u64,
}

impl Sessions {
    pub(super) fn next_serial(&mut self) -> u64 {
        self.last_serial += 1;
        self.last_serial
    }

    /// The epoch for the next session: one that is free; else that of a session that was never used; else the oldest one's.
    /// Neither that of the session in use for sending is taken, nor that of an attempt of ours: of three, one is left.
    pub(super) fn epoch_for_next(&self, of_attempt: Option<Epoch>) -> Epoch {
        let in_use = self.sending.as_ref().map(|sending| sending.serial);
        let worth = |epoch: &Epoch| {
            let known = self.receiving.iter().find(|known| known.epoch == *epoch);
            let is_taken = Some(*epoch) == of_attempt;
            (is_taken, known.map(|known| (Some(known.serial) == in_use, known.is_opened, known.serial)))
        };
        Epoch::ALL.into_iter().min_by_key(worth).unwrap_or(Epoch::ALL[0])
    }

    /// The answer to the same first message, if the last one that was answered comes again.
    pub(super) fn answer_again(&self, first: &[u8; FIRST]) -> Option<&[u8; ANSWER]> {
        let answered = self.answered.as_ref().filter(|answered| first.starts_with(&answered.first))?;
        Some(&answered.answer)
    }

    /// Until when an answer may be confirmed before we begin a session ourselves.
    pub(super) fn answer_wait(&self) -> Option<Duration> {
        self.answered.as_ref().map(|answered| answered.since + ANSWER_WAIT)
    }

    /// We answer: the receive key comes into use, the send key waits.
    pub(super) fn answer(
        &mut self,
        receive: DirectionKey,
        send: DirectionKey,
        answered: Answered,
        out: &mut Vec<Action>,
    ) {
        self.receive(receive, Some(send), answered.since, answered.since + PENDING_LIFE, out);
        self.answered = Some(answered);
    }

    /// We have begun, and the peer has answered.
    pub(super) fn establish(
        &mut self,
        receive: DirectionKey,
        send: DirectionKey,
        began: Duration,
        now: Duration,
        out: &mut Vec<Action>,
    ) {
        let serial = send.serial;
        self.receive(receive, None, began, now + RECEIVE_LIFE, out);
        // Packets under a session that we have answered before are still opened.
        self.answered = None;
        self.sending = Some(Sending { serial, is_answered: false, until: now + SEND_LIFE });
        out.push(Action::Send(send, RENEW_AGE[0]));
        self.confirming = Some(Confirming { serial, repeat: Repeat::new(now), gives_up: Some(now + CONFIRM_WAIT) });
    }

    /// Sends the packet that confirms a session that we have begun.
    pub(super) fn confirm(&mut self, now: Duration, rng: &mut impl CryptoRng, out: &mut Vec<Action>) {
        if let Some(confirming) = self.confirming.as_mut().filter(|confirming| confirming.repeat.next <= now) {
            confirming.repeat.sent(now, rng);
            out.push(Action::Confirm);
        }
    }

    /// Whether the peer does not use the session that we have begun, for so long that it must have lost the keys. Once a session.
    pub(super) fn gives_up(&mut self, now: Duration) -> bool {
        let confirming = self.confirming.as_mut();
        confirming.is_some_and(|confirming| confirming.gives_up.take_if(|when| *when <= now).is_some())
    }

    fn receive(
        &mut self,
        key: DirectionKey,
        aside: Option<DirectionKey>,
        began: Duration,
        until: Duration,
        out: &mut Vec<Action>,
    ) {
        self.forget(out, |known| known.epoch == key.epoch);
        let DirectionKey { serial, epoch, suite, .. } = key;
        self.receiving.push(Receiving { serial, epoch, suite, began, is_opened: false, until, aside });
        out.push(Action::Receive(key));
    }

    fn forget(&mut self, out: &mut Vec<Action>, is_over: impl Fn(&Receiving) -> bool) {
        self.receiving.retain(|known| {
            let is_over = is_over(known);
            if is_over {
                out.push(Action::Forget(known.serial));
            }
            !is_over
        });
    }

    /// The first packet under a receive key has opened. Returns whether the key is known, and was not used before.
    pub(super) fn opened(&mut self, serial: u64, now: Duration, out: &mut Vec<Action>) -> bool {
        let Some(at) = self.receiving.iter().position(|known| known.serial == serial && !known.is_opened) else {
            return false;
        };
        let known = &mut self.receiving[at];
        (known.is_opened, known.until) = (true, now + RECEIVE_LIFE);
        out.push(Action::Log(Note::Sealed { suite: known.suite, after: now.saturating_sub(known.began) }));
        for older in &mut self.receiving[..at] {
            older.until = older.until.min(now + PREVIOUS_LIFE);
        }
        self.confirming.take_if(|confirming| confirming.serial <= serial);
        true
    }

    /// If we have answered the session, its send key comes into use now, unless a later session's is.
    pub(super) fn take_over(&mut self, serial: u64, now: Duration, out: &mut Vec<Action>) -> bool {
        let known = self.receiving.iter_mut().find(|known| known.serial == serial);
        let Some(key) = known.and_then(|known| known.aside.take()) else { return false };
        if self.sending.as_ref().is_some_and(|sending| sending.serial > serial) {
            return false;
        }
        self.answered.take_if(|answered| answered.serial <= serial);
        self.sending = Some(Sending { serial, is_answered: true, until: now + SEND_LIFE });
        self.confirming = None;
        out.push(Action::Send(key, RENEW_AGE[1]));
        out.push(Action::Confirm);
        true
    }

    /// Whether the peer, which has begun the session in use, asks whether we use it.
    pub(super) fn may_answer_probe(&self, serial: u64) -> bool {
        self.sending.as_ref().is_some_and(|sending| sending.is_answered && sending.serial == serial)
    }

    pub(super) fn clear(&mut self, out: &mut Vec<Action>) {
        self.forget(out, |_| true);
        self.stop_sending(out);
        (self.answered, self.confirming) = (None, None);
    }

    fn stop_sending(&mut self, out: &mut Vec<Action>) {
        if self.sending.take().is_some() {
            out.push(Action::StopSending);
        }
        self.confirming = None;
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        let receiving = self.receiving.iter().map(|known| known.until).min();
        let sending = self.sending.as_ref().map(|sending| sending.until);
        let confirming = self.confirming.as_ref().map(|confirming| confirming.repeat.next);
        let gives_up = self.confirming.as_ref().and_then(|confirming| confirming.gives_up);
        [receiving, sending, confirming, gives_up].into_iter().flatten().min()
    }

    pub(super) fn tick(&mut self, now: Duration, rng: &mut impl CryptoRng, out: &mut Vec<Action>) {
        self.forget(out, |known| known.until <= now);
        if self.sending.as_ref().is_some_and(|sending| sending.until <= now) {
            self.stop_sending(out);
        }
        let receiving = &self.receiving;
        self.answered.take_if(|answered| receiving.iter().all(|known| known.serial != answered.serial));
        self.confirm(now, rng, out);
    }
}
