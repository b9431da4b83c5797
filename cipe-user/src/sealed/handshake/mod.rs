//! The handshake of one tunnel (section 6) as a state machine without sockets, clocks or files.
//!
//! Either end may begin an [`attempt`] at any time; the other one answers, and keeps the keys aside until a packet under them
//! has opened. [`sessions`] holds which keys are in use. The engine tells the machine when a key is wanted, and when the first
//! packet under a key has opened; the machine tells the engine which keys to use, and the daemon what to keep on disk.

mod attempt;
mod backoff;
mod note;
mod sessions;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rand::{CryptoRng, RngExt};
use serde::{Deserialize, Serialize};

use self::attempt::{Attempt, Cookies};
use self::backoff::BackOff;
pub use self::note::Note;
pub use self::sessions::PREVIOUS_LIFE;
use self::sessions::{Answered, Sessions};
use super::Refused;
use super::cipher::{KeyOctets, Suite};
use super::gate;
use super::message::{ANSWER, Carries, FIRST, FIRST_PAYLOAD, Kind, RETRY, Retry, Sender, ephemeral};
use super::noise::Noise;
use super::packet::{Epoch, HEADER};
use super::secrets::{MAC, Secrets};

/// Age of a send key at which its engine asks for another one: at the initiator of the session, and at the responder.
pub const RENEW_AGE: [Duration; 2] = [Duration::from_secs(120), Duration::from_secs(135)];
/// How long an attempt lasts.
pub const ATTEMPT_LIFE: Duration = Duration::from_secs(90);
/// The longest interval between two repetitions of a message.
pub const LONGEST_INTERVAL: Duration = Duration::from_millis(6_250);
/// How long a responder waits for its answer to be confirmed before it begins an attempt of its own.
pub const ANSWER_WAIT: Duration = Duration::from_secs(5);
/// The greatest time stamp that a clock alone leads to, in the year 2262: an absurd clock does not use up the stamps.
const CLOCK_END: u64 = (1 << 63) - 1;
/// From here on time stamps are refused. Attempts add one each to what a clock says, so an honest end never comes here.
pub const STAMP_END: u64 = (1 << 63) + (1 << 62);

/// The time of an input, by two clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Since any fixed moment, on a clock that never goes back and goes on while the machine sleeps.
    pub at: Duration,
    /// Nanoseconds since 1970. May jump.
    pub unix_nanos: u64,
}

impl Now {
    /// Seconds since 1970, modulo 2^32, as messages of protocol 3 have them.
    pub const fn unix_seconds(self) -> u32 {
        (self.unix_nanos / 1_000_000_000) as u32
    }
}

/// What an end says of itself in each handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    /// Whether AES-256-GCM is fast here.
    pub fast_aes: bool,
    /// What the tunnel carries.
    pub carries: Carries,
}

/// What has to outlive the process, in a file of the tunnel's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Random, drawn once: tells our own messages when they come back.
    pub id: u64,
    /// The newest time stamp of the peer's that was taken.
    pub newest: u64,
    /// Whether a session with this peer was ever confirmed.
    pub was_sealed: bool,
}

impl Kept {
    /// Of a tunnel without a file. The newest stamp is our own clock, so that recorded first messages are refused without a curve,
    /// if the file was lost; a peer whose clock is behind needs one round trip more.
    pub fn without_file(unix_nanos: u64, rng: &mut impl CryptoRng) -> Self {
        Self { id: rng.random(), newest: unix_nanos.min(CLOCK_END), was_sealed: false }
    }
}

/// Why a handshake is wanted. An engine that knows no address of its peer wants none: what waits is sent in the session that the
/// peer begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Something is to be sent: there is no key for it, the key is old or worn, or the peer does not answer CT_PING.
    Send,
    /// Packets come that cannot be opened, or packets of protocol 3 that are not accepted. Anybody can send such ones.
    Receive,
}

/// Where a handshake message came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The address that [`To::Peer`] goes to.
    Peer,
    /// Another one.
    Other,
}

/// What happened.
pub enum Input<'a> {
    /// The engine wants a handshake.
    Wanted(Wanted),
    /// A handshake message has come through the gate.
    Datagram(&'a [u8], Source),
    /// The first packet under the receive key with this serial has opened.
    Opened(u64),
    /// A control packet without content has opened under the receive key with this serial.
    Probed(u64),
    /// The engine has lost the keys, or the peer says that it ends.
    KeysLost,
    /// [`Handshake::deadline`] has passed.
    Tick,
}

/// A key for the engine. The serials of later sessions are greater; both keys of a session have the same. Not `Debug`.
#[derive(Clone)]
pub struct DirectionKey {
    /// Names the session.
    pub serial: u64,
    /// In the packets: of a receive key our number, of a send key the peer's.
    pub epoch: Epoch,
    /// The AEAD.
    pub suite: Suite,
    /// The key.
    pub octets: KeyOctets,
}

/// Where a datagram goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    /// To the peer.
    Peer,
    /// To the source of the datagram that was the input.
    Source,
}

/// What to do, in this order. Not `Debug`: it holds keys.
pub enum Action {
    /// Keep this on disk, before the next action.
    Keep(Kept),
    /// Receive under this key, too, before the next action. It takes the place of a key with the same epoch.
    Receive(DirectionKey),
    /// Wipe the receive key with this serial.
    Forget(u64),
    /// Send under this key from now on, and ask for another one at this age.
    Send(DirectionKey, Duration),
    /// Wipe the send key.
    StopSending,
    /// Send a control packet without content, under the send key.
    Confirm,
    /// Send a handshake message.
    Transmit(Vec<u8>, To),
    /// Count the input under this verdict.
    Refused(Refused),
    /// Log a note for the operator.
    Log(Note),
}

/// The handshake of one tunnel. `R` makes ephemeral keys.
pub struct Handshake<R> {
    secrets: Secrets,
    profile: Profile,
    kept: Kept,
    attempt: Option<Attempt>,
    sessions: Sessions,
    /// The greatest time stamp that was sent, or that the peer is known to have taken.
    last_stamp: u64,
    /// Something waits to be sent, and the attempt that was begun for it has not made a session yet.
    is_wanted: bool,
    /// Limits attempts because of packets that anybody can send.
    forgeable: BackOff,
    rng: R,
}

impl<R: CryptoRng> Handshake<R> {
    /// A tunnel without keys.
    pub fn new(secrets: Secrets, profile: Profile, kept: Kept, rng: R) -> Self {
        Self {
            secrets,
            profile,
            kept,
            attempt: None,
            sessions: Sessions::default(),
            last_stamp: 0,
            is_wanted: false,
            forgeable: BackOff::default(),
            rng,
        }
    }

    /// When [`Input::Tick`] is due, on the clock of [`Now::at`]; `None` while nothing waits. Changes with every input.
    pub fn deadline(&self) -> Option<Duration> {
        let attempt = self.attempt.as_ref().map(Attempt::deadline);
        let own = if self.is_wanted && self.attempt.is_none() { self.sessions.answer_wait() } else { None };
        [attempt, own, self.sessions.deadline()].into_iter().flatten().min()
    }

    /// How long an attempt of ours has had no answer; `None`: there is none.
    pub fn unanswered_for(&self, now: Duration) -> Option<Duration> {
        self.attempt.as_ref().map(|attempt| now.saturating_sub(attempt.began))
    }

    /// Goes on with other knowledge of the peer. An attempt, which has the former id, ends. The keys in use stay.
    pub fn forget(&mut self, kept: Kept) {
        (self.kept, self.attempt, self.is_wanted) = (kept, None, false);
    }

    /// Handles one input. No input, in any order, is an error.
    pub fn handle(&mut self, input: Input<'_>, now: Now) -> Vec<Action> {
        let mut out = Vec::new();
        match input {
            Input::Wanted(wanted) => self.wanted(wanted, now, &mut out),
            Input::Datagram(datagram, source) => {
                if let Err(refused) = self.datagram(datagram, source, now, &mut out) {
                    out.push(Action::Refused(refused));
                }
            }
            Input::Opened(serial) => self.opened(serial, now.at, &mut out),
            Input::Probed(serial) => {
                // If this begins the use of the send key, that has confirmed it.
                let may_answer = self.sessions.may_answer_probe(serial);
                // It proves the same, and the event that said it may be lost.
                self.opened(serial, now.at, &mut out);
                if may_answer {
                    out.push(Action::Confirm);
                }
            }
            Input::KeysLost => {
                self.sessions.clear(&mut out);
                // Without any key, the peer's packets are the only way to learn that it has one.
                self.forgeable = BackOff::default();
            }
            Input::Tick => self.tick(now, &mut out),
        }
        out
    }

    fn wanted(&mut self, wanted: Wanted, now: Now, out: &mut Vec<Action>) {
        self.is_wanted |= wanted == Wanted::Send;
        if self.may_begin(now.at) && (wanted == Wanted::Send || self.forgeable.begin(now.at)) {
            self.begin(Cookies::new(), now, out);
        }
    }

    fn may_begin(&self, now: Duration) -> bool {
        self.attempt.is_none() && self.sessions.answer_wait().is_none_or(|end| end <= now)
    }

    /// Begins an attempt, with the cookies that there are.
    fn begin(&mut self, cookies: Cookies, now: Now, out: &mut Vec<Action>) {
        self.is_wanted = false;
        let stamp = (self.last_stamp + 1).max(now.unix_nanos.min(CLOCK_END));
        self.last_stamp = stamp;
        let sender = self.sender(self.sessions.epoch_for_next(None));
        let ephemeral = self.draw();
        self.attempt = Some(Attempt::begin(&self.secrets, sender, stamp, ephemeral, cookies, now.at));
        self.repeat(now.at, out);
    }

    fn repeat(&mut self, now: Duration, out: &mut Vec<Action>) {
        if let Some(attempt) = &mut self.attempt {
            out.push(Action::Transmit(attempt.repeat(now, &mut self.rng), To::Peer));
        }
    }

    fn sender(&self, epoch: Epoch) -> Sender {
        let Profile { fast_aes, carries } = self.profile;
        Sender { id: self.kept.id, epoch, fast_aes, carries }
    }

    fn draw(&mut self) -> KeyOctets {
        let mut octets = KeyOctets::default();
        self.rng.fill_bytes(&mut *octets);
        octets
    }

    fn datagram(&mut self, datagram: &[u8], source: Source, now: Now, out: &mut Vec<Action>) -> Result<(), Refused> {
        match gate::check_mac(&self.secrets, datagram)? {
            Kind::First => self.first(datagram.try_into().map_err(|_| Refused::BadLength)?, source, now.at, out),
            Kind::Answer => self.answer(datagram.try_into().map_err(|_| Refused::BadLength)?, now.at, out),
            Kind::Retry => self.retry(datagram.try_into().map_err(|_| Refused::BadLength)?, now, out),
        }
    }

    /// The peer begins (section 6.6).
    fn first(
        &mut self,
        message: &[u8; FIRST],
        source: Source,
        now: Duration,
        out: &mut Vec<Action>,
    ) -> Result<(), Refused> {
        if let Some(answer) = self.sessions.answer_again(message) {
            out.push(Action::Transmit(answer.to_vec(), To::Source));
            return Ok(());
        }
        let drawn = self.draw();
        let mut noise = Noise::responder(&self.secrets, drawn);
        let mut payload = [0; FIRST_PAYLOAD];
        noise.read(&message[HEADER..Kind::First.mac_at()], &mut payload).ok_or(Refused::BadTag)?;
        let (stamp, peer) = Sender::of_first(&payload);
        let peer = self.check(peer?, out)?;
        if stamp >= STAMP_END {
            return Err(Refused::BadMessage);
        }
        if stamp <= self.kept.newest {
            let retry = Retry { newest: self.kept.newest, ..Retry::default() };
            let retry = retry.build(&self.secrets, message, &mut self.rng);
            out.push(Action::Transmit(retry.to_vec(), To::Source));
            return Err(Refused::Replayed);
        }
        // Crossing: ours goes on, and the peer will answer it, if it gets it. From another address than ours goes to, it may not.
        let goes_on = self.attempt.is_some() && self.kept.id > peer.id;
        if goes_on && source == Source::Peer {
            return Ok(());
        }
        let of_attempt = self.attempt.as_ref().filter(|_| goes_on).map(|attempt| attempt.epoch);
        let epoch = self.sessions.epoch_for_next(of_attempt);
        let mut answer = [0; ANSWER];
        answer[..HEADER].copy_from_slice(&Kind::Answer.header());
        let sender = self.sender(epoch);
        noise.write(&sender.octets(), &mut answer[HEADER..72]).ok_or(Refused::BadMessage)?;
        answer[72..80].copy_from_slice(&message[80..88]);
        let mac = self.secrets.mac.mac(&answer[..ANSWER - MAC]);
        answer[ANSWER - MAC..].copy_from_slice(&mac);

        self.kept.newest = stamp;
        out.push(Action::Keep(self.kept));
        if !goes_on {
            // What waits is sent in the session that the peer begins.
            self.is_wanted |= self.attempt.take().is_some();
        }
        let keys = noise.finish(Suite::of([self.profile.fast_aes, peer.fast_aes]));
        let serial = self.sessions.next_serial();
        let key = |epoch, octets| DirectionKey { serial, epoch, suite: keys.suite, octets };
        let (receive, send) = (key(epoch, keys.of_initiator), key(peer.epoch, keys.of_responder));
        self.sessions.answer(receive, send, Answered::new(message, answer, serial, now), out);
        out.push(Action::Transmit(answer.to_vec(), To::Source));
        Ok(())
    }

    /// The peer has answered.
    fn answer(&mut self, message: &[u8; ANSWER], now: Duration, out: &mut Vec<Action>) -> Result<(), Refused> {
        let attempt =
            self.attempt.as_mut().filter(|attempt| attempt.is_answered_by(message)).ok_or(Refused::Replayed)?;
        let payload = attempt.read(message).ok_or(Refused::BadTag)?;
        let Some(attempt) = self.attempt.take() else { return Ok(()) };
        let peer = self.check(Sender::of_answer(&payload)?, out)?;
        let (began, epoch) = (attempt.began, attempt.epoch);
        let keys = attempt.finish(Suite::of([self.profile.fast_aes, peer.fast_aes]));
        let serial = self.sessions.next_serial();
        let key = |epoch, octets| DirectionKey { serial, epoch, suite: keys.suite, octets };
        self.is_wanted = false;
        self.sessions.establish(key(epoch, keys.of_responder), key(peer.epoch, keys.of_initiator), began, now, out);
        self.sessions.confirm(now, &mut self.rng, out);
        Ok(())
    }

    /// The peer asks for a cookie, or for a newer time stamp.
    fn retry(&mut self, message: &[u8; RETRY], now: Now, out: &mut Vec<Action>) -> Result<(), Refused> {
        let attempt = self.attempt.as_mut().ok_or(Refused::Replayed)?;
        let retry = Retry::open(&self.secrets, message, ephemeral(&attempt.message)).ok_or(Refused::BadTag)?;
        if retry.newest >= STAMP_END {
            return Err(Refused::BadMessage);
        }
        attempt.learn_cookie(&retry.cookie, now.at);
        if retry.newest < attempt.stamp {
            return Ok(());
        }
        out.push(Action::Log(Note::ClockBehind));
        self.last_stamp = self.last_stamp.max(retry.newest);
        let (cookies, is_wanted) = (std::mem::take(&mut attempt.cookies), self.is_wanted);
        self.attempt = None;
        self.begin(cookies, now, out);
        self.is_wanted = is_wanted;
        Ok(())
    }

    fn check(&self, peer: Sender, out: &mut Vec<Action>) -> Result<Sender, Refused> {
        let (note, refused) = if peer.id == self.kept.id {
            (Note::Reflected, Refused::Reflected)
        } else if peer.carries != self.profile.carries {
            (Note::OtherKind, Refused::BadMessage)
        } else {
            return Ok(peer);
        };
        out.push(Action::Log(note));
        Err(refused)
    }

    fn opened(&mut self, serial: u64, now: Duration, out: &mut Vec<Action>) {
        if !self.sessions.opened(serial, now, out) {
            return;
        }
        if self.sessions.take_over(serial, now, out) {
            // Its keys are as new as those of an attempt of ours would be.
            (self.attempt, self.is_wanted) = (None, false);
        }
        if !self.kept.was_sealed {
            self.kept.was_sealed = true;
            out.push(Action::Keep(self.kept));
        }
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Action>) {
        self.sessions.tick(now.at, &mut self.rng, out);
        if let Some(attempt) = self.attempt.take_if(|attempt| attempt.is_over(now.at)) {
            out.push(Action::Log(Note::NoAnswer { after: now.at.saturating_sub(attempt.began) }));
        } else if self.attempt.as_ref().is_some_and(|attempt| attempt.deadline() <= now.at) {
            self.repeat(now.at, out);
        }
        self.is_wanted |= self.sessions.gives_up(now.at);
        if self.is_wanted && self.may_begin(now.at) {
            self.begin(Cookies::new(), now, out);
        }
    }
}
