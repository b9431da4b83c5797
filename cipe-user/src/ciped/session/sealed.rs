//! Sealed packets in place of protocol 3 (docs/SEALED.md, section 9): from the first session on, keys of protocol 3 are not exchanged, and
//! its messages change nothing.

#[cfg(test)]
mod tests;

use rand::CryptoRng;

use super::topic::of_sealing;
use super::{Level, Session, Step, Topic};
use crate::ciped::exchange::Now;
use crate::ciped::sealing::{Effect, Note, Sealing};
use crate::control::protocol::{AttachSealed, Request};
use crate::repeats::counted;
use crate::sealed::handshake;
use crate::wire::message::Message;

impl<R: CryptoRng> Session<R> {
    /// Seals packets, if the peer does, too.
    pub fn seal_by(mut self, sealing: Sealing<R>) -> Self {
        self.exchange.announce_seals();
        self.sealing = Some(sealing);
        self.is_sealed = self.seals();
        self.peer_keeps_keys = self.is_sealed;
        self
    }

    /// What the next engine is told of sealed packets.
    pub fn attach_sealed(&self, now: Now) -> Option<AttachSealed> {
        self.sealing.as_ref().map(|sealing| sealing.attach(now))
    }

    /// Checks the deadlines of keys for sealed packets: also while there is no engine.
    pub fn tick_sealing(&mut self, now: Now) -> Vec<Step> {
        self.with_sealing(now, |sealing| sealing.tick(now))
    }

    /// Whether protocol 3 is not used for sending.
    pub(super) fn seals(&self) -> bool {
        self.sealing.as_ref().is_some_and(|sealing| !sealing.unsealed().sends || sealing.has_send_key())
    }

    pub(super) fn has_sealed_key(&self) -> bool {
        self.sealing.as_ref().is_some_and(Sealing::has_send_key)
    }

    /// Has `act` done, if the tunnel seals, and carries its effects on.
    pub(super) fn with_sealing(&mut self, now: Now, act: impl FnOnce(&mut Sealing<R>) -> Vec<Effect>) -> Vec<Step> {
        let mut steps = self.effects(now, act);
        steps.extend(self.limits());
        steps
    }

    /// The same, in the midst of something that may change the limits, too.
    pub(super) fn effects(&mut self, now: Now, act: impl FnOnce(&mut Sealing<R>) -> Vec<Effect>) -> Vec<Step> {
        let Some(sealing) = &mut self.sealing else { return Vec::new() };
        let mut steps = Vec::new();
        for effect in act(sealing) {
            match effect {
                Effect::Request(request) => steps.push(Step::Send(Request::Sealed(request))),
                Effect::Keep(kept) => steps.push(Step::Keep(kept)),
                Effect::Forget => steps.push(Step::Forget),
                Effect::Log(note) => {
                    let (topic, level) = of_sealing(note);
                    let text = match note {
                        Note::Downgraded => format!("{note}, say `cipe forget {}`", self.device),
                        _ => note.to_string(),
                    };
                    match note {
                        Note::Handshake(handshake::Note::NoAnswer { .. }) => {
                            steps.extend(self.tell_of_attempt(topic, level, &text));
                            steps.extend([Step::FallBack, Step::LookUpPeer]);
                        }
                        Note::Downgraded | Note::Unsealed => steps.extend(self.tell_of_attempt(topic, level, &text)),
                        Note::Handshake(handshake::Note::Sealed { .. }) => {
                            self.attempts.clear();
                            steps.extend(self.tell(topic, level, &text, now));
                        }
                        _ => steps.extend(self.tell(topic, level, &text, now)),
                    }
                }
            }
        }
        let is_sealed = self.seals();
        if is_sealed != std::mem::replace(&mut self.is_sealed, is_sealed) {
            // Keys of protocol 3 are exchanged anew if it is ever used again.
            self.exchange.start_over();
            (self.key_ends, self.unidentified_keys) = (None, 0);
            if is_sealed {
                steps.push(Step::Send(Request::DropSendKey));
            }
        }
        self.is_ours |= self.has_sealed_key();
        steps
    }

    /// Logs the 1st, 2nd, 4th, 8th ... attempt without an answer since a session was made: an attempt takes longer than the time after which a
    /// line is not a repetition any more.
    fn tell_of_attempt(&mut self, topic: Topic, level: Level, line: &str) -> Option<Step> {
        let total = self.attempts.entry(topic).or_default();
        *total += 1;
        total.is_power_of_two().then(|| Step::Log(level, counted(line, *total)))
    }

    /// Handles a message in a sealed packet.
    pub(super) fn sealed_message(&mut self, payload: &[u8], now: Now) -> Vec<Step> {
        let Ok(message) = Message::parse(payload) else { return self.unknown(payload, now) };
        if message.is_stamped() {
            let text =
                format!("dropped {} in a sealed packet: nothing but a handshake makes keys there", message.name());
            return self.tell(Topic::SealedKey, Level::Warning, &text, now);
        }
        let mut steps = self.hear(&message, now);
        if matches!(message, Message::Kill(_)) {
            steps.extend(self.with_sealing(now, |sealing| sealing.peer_leaves(now)));
        }
        steps
    }

    /// Handles a message of protocol 3 that is late, or recorded: what is sent is sealed by now.
    pub(super) fn unsealed_message(&mut self, message: &Message<'_>, now: Now) -> Vec<Step> {
        match message {
            Message::Ping(_) | Message::Pong(_) | Message::Debug(_) => self.hear(message, now),
            Message::Request
            | Message::Indication { .. }
            | Message::Acknowledgement { .. }
            | Message::Dummy(_)
            | Message::Kill(_) => Vec::new(),
        }
    }
}
