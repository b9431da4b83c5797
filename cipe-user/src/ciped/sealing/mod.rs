//! Sealed packets of a tunnel, as its daemon sees them (docs/SEALED.md, sections 6 and 9): when a handshake begins, and which kind of
//! packet the tunnel uses.
//!
//! A state machine without sockets, clocks or files around [`Handshake`], which knows nothing of protocol 3. [`Session`](super::session)
//! has it and carries its effects on.

mod held;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::time::Duration;

use rand::CryptoRng;

use self::held::Held;
use super::exchange::Now;
use super::options::{Options, SealedPolicy};
use crate::control::protocol::{
    AttachSealed, KeyOctets, MessageOctets, Protocol, SealedEvent, SealedKey, SealedRequest, SealedWanted, Unsealed,
};
use crate::sealed::handshake::{
    self, Action, DirectionKey, Handshake, Input, Kept, PREVIOUS_LIFE, Profile, Source, To, Wanted,
};
use crate::sealed::message::Carries;
use crate::sealed::secrets::Secrets;
use crate::sealed::{Refused, cipher};

/// How long an end that has been asked whether it seals waits for the first message of the one that has asked.
const ASKED_WAIT: Duration = Duration::from_secs(1);
/// How long no session may be confirmed by a peer that says that it seals, before that is logged.
const MAX_OVERDUE: Duration = Duration::from_secs(60);
/// A peer that answers no handshake for so long, and sends packets of protocol 3, speaks protocol 3 only.
const MIN_UNANSWERED: Duration = Duration::from_secs(10);

/// What to do, in this order. Not `Debug`: requests hold keys.
pub enum Effect {
    /// Send this to the engine.
    Request(SealedRequest),
    /// Keep this on disk, before the next effect.
    Keep(Kept),
    /// If somebody has asked to forget the peer, do.
    Forget,
    /// Log a note for the operator.
    Log(Note),
}

/// An event that may interest an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    /// Of the handshake.
    #[error(transparent)]
    Handshake(handshake::Note),
    /// A session follows another one.
    #[error("{0}")]
    Renewed(handshake::Note),
    /// The first session with this peer is in use.
    #[error("the peer seals: packets of protocol 3 are not accepted any more")]
    OnlySealed,
    /// The engine could not go on under the keys that it was handed.
    #[error("the engine cannot go on under the former keys of sealed packets; a handshake makes others")]
    KeysLost,
    /// Both ends seal, and no session is confirmed.
    #[error(
        "the peer seals, as it says, but no session was confirmed for {} s: somebody may drop sealed packets; protocol 3 is accepted meanwhile",
        MAX_OVERDUE.as_secs()
    )]
    Overdue,
    /// The peer does not seal any more.
    #[error(
        "the peer was sealed, and now speaks protocol 3 only; whoever is on the path can cause this. If the peer really is an original now"
    )]
    Downgraded,
    /// The peer does not seal.
    #[error(
        "the peer speaks protocol 3 only, and `sealed require` does not allow that; set `sealed` alike at both ends"
    )]
    Unsealed,
}

/// The use of sealed packets of one tunnel. `R` makes keys and ids.
pub struct Sealing<R> {
    policy: SealedPolicy,
    handshake: Handshake<R>,
    /// The use of packets of protocol 3.
    unsealed: Unsealed,
    held: Held,
    /// The greatest age of a send key at which another one is wanted, for tests.
    max_renew_age: Option<Duration>,
    /// Whether the peer has an address: without one, no handshake begins.
    knows_address: bool,
    /// Whether the peer says that it seals.
    peer_seals: bool,
    /// Whether a session is in use, so that the next one is no news.
    is_confirmed: bool,
    /// When we begin a handshake, unless the peer has begun one.
    begins: Option<Duration>,
    /// When it is logged that there is no session.
    overdue: Option<Duration>,
    /// When packets of protocol 3 are not accepted any more.
    accepts_until: Option<Duration>,
    /// When the attempt began in which it was logged that the peer speaks protocol 3 only.
    told: Option<Duration>,
    rng: R,
}

impl<R: CryptoRng> Sealing<R> {
    /// A tunnel without keys; `None`: it does not seal. `kept`: what an earlier daemon has kept. `rngs`: for keys, and for an id.
    pub fn new(
        options: &Options,
        kept: Option<Kept>,
        max_renew_age: Option<Duration>,
        (keys, mut rng): (R, R),
        now: Now,
    ) -> Option<Self> {
        let key = options.key.as_ref().filter(|_| options.sealed != SealedPolicy::No)?;
        let kept = kept.unwrap_or_else(|| Kept::without_file(now.unix_nanos, &mut rng));
        let carries = match options.protocol {
            Protocol::Ip => Carries::Ip,
            Protocol::Ethernet => Carries::Ethernet,
        };
        let profile = Profile { fast_aes: cipher::has_fast_aes(), carries };
        let may = options.sealed == SealedPolicy::Auto && !kept.was_sealed;
        Some(Self {
            policy: options.sealed,
            handshake: Handshake::new(Secrets::new(key), profile, kept, keys),
            unsealed: Unsealed { sends: may, accepts: may },
            held: Held::default(),
            max_renew_age,
            knows_address: !options.peer.address.ip().is_unspecified(),
            peer_seals: false,
            is_confirmed: false,
            begins: None,
            overdue: None,
            accepts_until: None,
            told: None,
            rng,
        })
    }

    /// What the next engine is told.
    pub fn attach(&self, now: Now) -> AttachSealed {
        AttachSealed { unsealed: self.unsealed, resume: self.held.for_next_engine(now.at) }
    }

    /// The use of packets of protocol 3. When it has ended, only [`Self::forget`] begins it again.
    pub fn unsealed(&self) -> Unsealed {
        self.unsealed
    }

    /// Whether what is sent is sealed now.
    pub fn has_send_key(&self) -> bool {
        self.held.sends()
    }

    /// The peer's address is known.
    pub fn learn_address(&mut self) {
        self.knows_address = true;
    }

    /// When [`Self::tick`] is due, on the clock of [`Now::at`].
    pub fn deadline(&self) -> Option<Duration> {
        [self.handshake.deadline(), self.begins, self.overdue, self.accepts_until].into_iter().flatten().min()
    }

    /// Checks the deadlines at `now`.
    pub fn tick(&mut self, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        self.tick_handshake(now, &mut out);
        if self.begins.take_if(|at| *at <= now.at).is_some() {
            self.handle(Input::Wanted(Wanted::Send), now, &mut out);
        }
        if self.overdue.take_if(|at| *at <= now.at).is_some() {
            out.push(Effect::Log(Note::Overdue));
        }
        if self.accepts_until.take_if(|at| *at <= now.at).is_some() {
            self.set_unsealed(Unsealed { accepts: false, ..self.unsealed }, now, &mut out);
            out.push(Effect::Log(Note::OnlySealed));
        }
        out
    }

    /// Handles an event of the engine.
    pub fn event(&mut self, event: &SealedEvent, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            SealedEvent::Wanted { reason } => self.wanted(*reason, now, &mut out),
            SealedEvent::Handshake { datagram, from, from_peer } => {
                self.tick_handshake(now, &mut out);
                let source = if *from_peer { Source::Peer } else { Source::Other };
                let refused = self.run(Input::Datagram(datagram, source), Some(*from), now, &mut out);
                out.push(Effect::Request(SealedRequest::Judged { refused }));
            }
            SealedEvent::Opened { serial } => self.handle(Input::Opened(*serial), now, &mut out),
            SealedEvent::Probed { serial } => self.handle(Input::Probed(*serial), now, &mut out),
            SealedEvent::KeysLost => {
                out.push(Effect::Log(Note::KeysLost));
                self.lose_keys(now, &mut out);
            }
        }
        out
    }

    fn wanted(&mut self, reason: SealedWanted, now: Now, out: &mut Vec<Effect>) {
        if !self.held.sends() {
            out.push(Effect::Forget);
        }
        let reason = match reason {
            // The engine has asked before it got the key: a packet that opened was answered at once.
            SealedWanted::Send if self.held.is_new(now.at) => return,
            SealedWanted::Send => Wanted::Send,
            SealedWanted::Receive => Wanted::Receive,
            SealedWanted::Unsealed => {
                let unanswered = self.handshake.unanswered_for(now.at).filter(|time| *time >= MIN_UNANSWERED);
                if let Some(began) = unanswered.map(|time| now.at - time)
                    && self.told.replace(began) != Some(began)
                {
                    let is_auto = self.policy == SealedPolicy::Auto;
                    out.push(Effect::Log(if is_auto { Note::Downgraded } else { Note::Unsealed }));
                }
                Wanted::Receive
            }
        };
        self.handle(Input::Wanted(reason), now, out);
    }

    /// The peer says in protocol 3 that it seals; `asks`: it waits for the answer that we have just sent.
    pub fn peer_seals(&mut self, asks: bool, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        self.peer_seals = true;
        if self.unsealed.sends && self.knows_address {
            self.overdue.get_or_insert(now.at + MAX_OVERDUE);
            if asks {
                self.begins.get_or_insert(now.at + ASKED_WAIT);
            } else {
                self.begins = None;
                self.handle(Input::Wanted(Wanted::Send), now, &mut out);
            }
        }
        out
    }

    /// Data goes on in protocol 3, and a key of that is wanted: a handshake may succeed now.
    pub fn data_goes_on(&mut self, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        if self.peer_seals && self.unsealed.sends && self.begins.is_none() {
            self.handle(Input::Wanted(Wanted::Send), now, &mut out);
        }
        out
    }

    /// The peer does not answer CT_PING.
    pub fn unanswered(&mut self, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        if self.knows_address {
            self.handle(Input::Wanted(Wanted::Send), now, &mut out);
        }
        out
    }

    /// The peer says in a sealed packet that it ends.
    pub fn peer_leaves(&mut self, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        self.lose_keys(now, &mut out);
        out
    }

    /// The operator wants the peer to be as new. The keys in use stay in use; protocol 3 is accepted when none is used for sending any more.
    pub fn forget(&mut self, now: Now) -> Vec<Effect> {
        let mut out = Vec::new();
        self.handshake.forget(Kept::without_file(now.unix_nanos, &mut self.rng));
        self.peer_seals = false;
        (self.begins, self.overdue, self.accepts_until) = (None, None, None);
        let may = self.policy == SealedPolicy::Auto;
        let accepts = may && (self.unsealed.accepts || !self.held.sends());
        self.set_unsealed(Unsealed { sends: may, accepts }, now, &mut out);
        out
    }

    fn lose_keys(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.is_confirmed = false;
        self.handle(Input::KeysLost, now, out);
    }

    fn tick_handshake(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.handshake.deadline().is_some_and(|at| at <= now.at) {
            self.run(Input::Tick, None, now, out);
        }
    }

    fn handle(&mut self, input: Input<'_>, now: Now, out: &mut Vec<Effect>) {
        // Keys that are too old are wiped before anything is done with them: the machine may have slept.
        self.tick_handshake(now, out);
        self.run(input, None, now, out);
    }

    /// Hands an input on to the handshake. Returns why it was refused. `from`: where a datagram came from.
    fn run(&mut self, input: Input<'_>, from: Option<SocketAddr>, now: Now, out: &mut Vec<Effect>) -> Option<Refused> {
        let mut verdict = None;
        for action in self.handshake.handle(input, now) {
            match action {
                Action::Keep(kept) => out.push(Effect::Keep(kept)),
                Action::Receive(key) => {
                    // The peer has begun, or has answered.
                    (self.peer_seals, self.begins) = (true, None);
                    self.request(SealedRequest::Receive(sealed_key(&key)), now, out);
                }
                Action::Forget(serial) => self.request(SealedRequest::Forget { serial }, now, out),
                Action::Send(key, age) => {
                    let age = self.max_renew_age.map_or(age, |most| age.min(most));
                    let renew_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
                    self.request(SealedRequest::Send { key: sealed_key(&key), renew_ms }, now, out);
                    self.set_unsealed(Unsealed { sends: false, ..self.unsealed }, now, out);
                }
                Action::StopSending => {
                    self.is_confirmed = false;
                    self.request(SealedRequest::StopSending, now, out);
                    if self.unsealed.sends {
                        // The operator has said that the peer is to be as new while the key was in use.
                        self.set_unsealed(Unsealed { accepts: true, ..self.unsealed }, now, out);
                    }
                }
                Action::Confirm => self.request(SealedRequest::Confirm, now, out),
                Action::Transmit(datagram, to) => {
                    let to = from.filter(|_| to == To::Source);
                    self.request(SealedRequest::Transmit { datagram: MessageOctets(datagram.into()), to }, now, out);
                }
                Action::Refused(refused) => verdict = Some(refused),
                // A session is in use.
                Action::Log(note @ handshake::Note::Sealed { .. }) => {
                    self.overdue = None;
                    if self.unsealed.accepts {
                        self.accepts_until.get_or_insert(now.at + PREVIOUS_LIFE);
                    }
                    let is_renewed = std::mem::replace(&mut self.is_confirmed, true);
                    out.push(Effect::Log(if is_renewed { Note::Renewed(note) } else { Note::Handshake(note) }));
                }
                Action::Log(note) => {
                    if matches!(note, handshake::Note::Reflected | handshake::Note::NoAnswer { .. }) {
                        out.push(Effect::Forget);
                    }
                    out.push(Effect::Log(Note::Handshake(note)));
                }
            }
        }
        verdict
    }

    fn set_unsealed(&mut self, unsealed: Unsealed, now: Now, out: &mut Vec<Effect>) {
        if std::mem::replace(&mut self.unsealed, unsealed) != unsealed {
            self.request(SealedRequest::Unsealed(unsealed), now, out);
        }
    }

    fn request(&mut self, request: SealedRequest, now: Now, out: &mut Vec<Effect>) {
        self.held.note(&request, now.at);
        out.push(Effect::Request(request));
    }
}

fn sealed_key(key: &DirectionKey) -> SealedKey {
    let DirectionKey { serial, epoch, suite, ref octets } = *key;
    SealedKey { serial, epoch, suite, key: KeyOctets::new(octets) }
}
