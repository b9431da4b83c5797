//! Our attempt to begin a session: one first message, repeated as it is.

use std::time::Duration;

use arrayvec::ArrayVec;
use rand::{CryptoRng, RngExt};

use super::super::cipher::{KeyOctets, Suite};
use super::super::gate::{COOKIE_LIFE, use_cookie};
use super::super::message::{ANSWER, ANSWER_PAYLOAD, COOKIE, ECHO, FIRST, Kind, Sender};
use super::super::noise::{Noise, SessionKeys};
use super::super::packet::{Epoch, HEADER};
use super::super::secrets::{MAC, Secrets};
use super::ATTEMPT_LIFE;

/// The first interval between two repetitions, and the least one.
const FIRST_INTERVAL: Duration = Duration::from_millis(250);
/// The longest one, before its random part.
const LONGEST: Duration = Duration::from_secs(5);

/// When something is due again.
pub(super) struct Repeat {
    interval: Duration,
    sent: Duration,
    pub(super) next: Duration,
}

impl Repeat {
    /// Due at once.
    pub(super) fn new(now: Duration) -> Self {
        Self { interval: FIRST_INTERVAL, sent: now, next: now }
    }

    /// It was sent. A random part keeps a thousand tunnels apart that have begun together.
    pub(super) fn sent(&mut self, now: Duration, rng: &mut impl CryptoRng) {
        let spread = self.interval.mul_f64(rng.random::<f64>() / 4.0);
        (self.sent, self.next) = (now, now + self.interval + spread);
        self.interval = (2 * self.interval).min(LONGEST);
    }

    /// It is due again as soon as it may be sent again.
    fn hurry(&mut self, now: Duration) {
        self.next = self.next.min(now.max(self.sent + FIRST_INTERVAL));
    }
}

/// The last two different cookies, the newest last, and when they came. They are used in turn: somebody on the side can have a
/// wrong one sent to us, but not take away the right one with it.
pub(super) type Cookies = ArrayVec<([u8; COOKIE], Duration), 2>;

pub(super) struct Attempt {
    noise: Noise,
    pub(super) message: [u8; FIRST],
    /// For packets to us.
    pub(super) epoch: Epoch,
    pub(super) stamp: u64,
    pub(super) began: Duration,
    pub(super) cookies: Cookies,
    /// Which cookie is used next: 0, the newest.
    turn: usize,
    repeat: Repeat,
}

impl Attempt {
    pub(super) fn begin(
        secrets: &Secrets,
        sender: Sender,
        stamp: u64,
        ephemeral: KeyOctets,
        cookies: Cookies,
        now: Duration,
    ) -> Self {
        let mut noise = Noise::initiator(secrets, ephemeral);
        let mut message = [0; FIRST];
        let mac_at = Kind::First.mac_at();
        message[..HEADER].copy_from_slice(&Kind::First.header());
        let written = noise.write(&sender.first_octets(stamp), &mut message[HEADER..mac_at]);
        written.expect("a first message needs nothing of the peer");
        let mac = secrets.mac.mac(&message[..mac_at]);
        message[mac_at..mac_at + MAC].copy_from_slice(&mac);
        Self { noise, message, epoch: sender.epoch, stamp, began: now, cookies, turn: 0, repeat: Repeat::new(now) }
    }

    pub(super) fn deadline(&self) -> Duration {
        self.repeat.next.min(self.began + ATTEMPT_LIFE)
    }

    pub(super) fn is_over(&self, now: Duration) -> bool {
        now >= self.began + ATTEMPT_LIFE
    }

    /// The message, which is sent now.
    pub(super) fn repeat(&mut self, now: Duration, rng: &mut impl CryptoRng) -> Vec<u8> {
        self.repeat.sent(now, rng);
        self.cookies.retain(|(_, came)| now.saturating_sub(*came) < COOKIE_LIFE);
        let count = self.cookies.len().max(1);
        match self.cookies.iter().rev().nth(self.turn % count) {
            Some((cookie, _)) => use_cookie(&mut self.message, cookie),
            None => self.message[FIRST - MAC..].fill(0),
        }
        self.turn = (self.turn + 1) % count;
        self.message.to_vec()
    }

    /// Takes a cookie; zeros are none.
    pub(super) fn learn_cookie(&mut self, cookie: &[u8; COOKIE], now: Duration) {
        let is_known = self.cookies.iter().any(|(known, _)| known == cookie);
        if *cookie != [0; COOKIE] && !is_known {
            if self.cookies.is_full() {
                self.cookies.remove(0);
            }
            self.cookies.push((*cookie, now));
            self.turn = 0;
            self.repeat.hurry(now);
        }
    }

    pub(super) fn is_answered_by(&self, answer: &[u8; ANSWER]) -> bool {
        let mac_at = Kind::First.mac_at();
        answer[72..72 + ECHO] == self.message[mac_at..mac_at + ECHO]
    }

    /// Reads the payload of an answer. `None`: it does not verify, and nothing has changed.
    pub(super) fn read(&mut self, answer: &[u8; ANSWER]) -> Option<[u8; ANSWER_PAYLOAD]> {
        let mut payload = [0; ANSWER_PAYLOAD];
        self.noise.read(&answer[HEADER..72], &mut payload)?;
        Some(payload)
    }

    /// The keys, after [`Self::read`].
    pub(super) fn finish(self, suite: Suite) -> SessionKeys {
        self.noise.finish(suite)
    }
}
