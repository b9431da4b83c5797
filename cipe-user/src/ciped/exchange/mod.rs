//! The key exchange of one tunnel (protocol section 3) as a state machine without sockets or clocks.
//!
//! The two directions are independent: [`sender`] makes our send keys and announces them, [`receiver`] takes the
//! peer's. A timer repeats every message that may be lost. Towards an original, data under the old send key stops
//! before a new key is announced, since an original drops its old receive key at the NK_IND; the NK_IND itself is under
//! the old key. A peer that announces with a CT_DUMMY (which originals ignore) that it keeps the old key for a while
//! still gets data under the old key until its NK_ACK.
//!
//! The two ends may have different keys: after a restart, or after another gateway has replaced one end for a while.
//! Then only messages under the static key reach the other end, so the answer to a message under the static key is
//! under the static key, too.

mod announcements;
mod marker;
mod receiver;
mod retry;
mod sender;
#[cfg(test)]
mod simulation;
mod taken;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rand::CryptoRng;
use zeroize::Zeroizing;

use self::marker::Marker;
use self::receiver::Receiver;
use self::retry::Timing;
use self::sender::Sender;
pub use self::taken::TakenKeys;
use crate::control::protocol::{KeyOctets, Under, Wanted};
pub use crate::sealed::handshake::Now;
use crate::wire::message::Message;

/// What happened.
pub enum Input<'a> {
    /// The engine requests a new key.
    KeyWanted(Wanted),
    /// A message was opened, parsed and found fresh.
    Message {
        /// The message. Messages that do not belong to the key exchange are ignored.
        message: Message<'a>,
        /// Whether it was under the static key.
        under_static: bool,
    },
    /// No data was sent under the send key for so long that an original has dropped the key.
    SendKeyForgotten,
    /// Several CT_PINGs in a row had no answer: the peer may have other keys than we assume.
    Unanswered,
    /// [`Exchange::deadline`] has passed.
    Tick,
}

/// What to do, in this order. Not `Debug`: it holds keys.
pub enum Action {
    /// Send this control payload.
    SendMessage {
        /// The message.
        payload: Zeroizing<Vec<u8>>,
        /// The key to seal it under.
        under: Under,
        /// Whether it is the first NK_IND of a key.
        announces: bool,
    },
    /// Send under this key from now on.
    SetSendKey(KeyOctets),
    /// Send under the static key from now on.
    DropSendKey,
    /// Receive under this key from now on.
    SetReceiveKey {
        /// The new key.
        key: KeyOctets,
        /// How long the previous key stays valid, counted from the first packet under the new key. Until that packet,
        /// the peer may not use the new key yet: two NK_IND of an original may overtake each other.
        keep: Duration,
    },
    /// The peer says that it uses sealed packets; `asks`: and waits for an answer of ours, which comes before this.
    PeerSeals {
        /// Whether it asks.
        asks: bool,
    },
    /// Log a note for the operator.
    Log(Note),
}

/// An event that may interest an operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    /// Our new send key is in use.
    #[error("new send key, acknowledged after {} ms", after.as_millis())]
    NewSendKey {
        /// From the first NK_IND to the NK_ACK.
        after: Duration,
    },
    /// An idle tunnel dropped its send key.
    #[error("the send key is old and was not renewed, as there is no traffic; dropped, because the peer drops it, too")]
    Forgotten,
    /// The peer's new key is in use.
    #[error("new receive key")]
    NewReceiveKey,
    /// The peer asked for a key.
    #[error("the peer asks for a new key")]
    Requested,
    /// An NK_IND had a key that was used before.
    #[error("refused a receive key that was used before; an NK_IND came late or was replayed")]
    ReusedKey,
    /// An NK_ACK for which no NK_IND waits.
    #[error("ignored an NK_ACK for a key that is not waiting for one")]
    StrayAcknowledgement,
    /// No NK_IND had an answer.
    #[error("no answer to NK_IND for {} s; is the peer up, and does it have the same static key?", after.as_secs())]
    NoAcknowledgement {
        /// Since the first one.
        after: Duration,
    },
    /// No NK_REQ had an answer.
    #[error("no answer to NK_REQ for {} s; is the peer up, and does it have the same static key?", after.as_secs())]
    NoIndication {
        /// Since the first one.
        after: Duration,
    },
    /// The peer announced that it keeps old receive keys, as we do.
    #[error("the peer keeps the old key during a change, so new keys are announced before they are used")]
    PeerKeepsKeys,
}

/// The key exchange of one tunnel. `R` makes the keys and the filler.
pub struct Exchange<R> {
    sender: Sender,
    receiver: Receiver,
    /// The peer keeps the previous receive key at a change.
    peer_keeps_keys: bool,
    /// Whether we use sealed packets with a peer that does, too.
    seals: bool,
    rng: R,
}

impl<R: CryptoRng> Exchange<R> {
    /// A tunnel without dynamic keys. `tokxc` is the minimum time between exchanges; less than a second counts as one.
    /// The peer's keys in `taken` are refused.
    pub fn new(tokxc: Duration, taken: TakenKeys, rng: R) -> Self {
        let timing = Timing::new(tokxc);
        let (sender, receiver) = (Sender::new(timing), Receiver::new(timing, taken));
        Self { sender, receiver, peer_keeps_keys: false, seals: false, rng }
    }

    /// Tells the peer that we use sealed packets, if it does, too.
    pub fn announce_seals(&mut self) {
        self.seals = true;
    }

    /// The engine has lost all dynamic keys. Keys that were used before stay refused, because their replay filters are
    /// lost, too.
    pub fn start_over(&mut self) {
        self.sender.start_over();
        self.receiver.start_over();
        self.peer_keeps_keys = false;
    }

    /// Whether the peer runs this program, as far as is known; an original may replace it at any time.
    pub fn peer_keeps_keys(&self) -> bool {
        self.peer_keeps_keys
    }

    /// The keys that the peer has announced.
    pub fn taken_keys(&self) -> &TakenKeys {
        self.receiver.taken()
    }

    /// When [`Input::Tick`] is due, on the clock of [`Now::at`]; `None` while nothing waits. Changes with every input.
    pub fn deadline(&self) -> Option<Duration> {
        [self.sender.deadline(), self.receiver.deadline()].into_iter().flatten().min()
    }

    /// Handles one input. No input, in any order, is an error.
    pub fn handle(&mut self, input: Input<'_>, now: Now) -> Vec<Action> {
        let (introduce, seals) = (!self.peer_keeps_keys, self.seals);
        let mut out = Out { actions: Vec::new(), now, introduce, seals, rng: &mut self.rng };
        match input {
            Input::Tick => {
                self.sender.tick(&mut out);
                self.receiver.tick(&mut out);
            }
            Input::SendKeyForgotten if self.peer_keeps_keys => {}
            Input::SendKeyForgotten => self.sender.key_forgotten(&mut out),
            Input::KeyWanted(Wanted::NoSendKey) => self.sender.key_missing(&mut out),
            Input::KeyWanted(Wanted::Age | Wanted::Packets | Wanted::Octets) => {
                self.sender.key_expired(self.peer_keeps_keys, &mut out);
            }
            Input::KeyWanted(Wanted::NoReceiveKey | Wanted::ReceiveKeySpent) => {
                self.receiver.key_missing(Under::Live, &mut out);
            }
            Input::KeyWanted(Wanted::Undecryptable) | Input::Unanswered => {
                self.sender.diverged(self.peer_keeps_keys, &mut out);
                self.receiver.key_missing(Under::Static, &mut out);
            }
            Input::Message { message, under_static } => {
                let starts_afresh = under_static && matches!(message, Message::Request | Message::Indication { .. });
                // The peer may now be another program.
                let doubted = starts_afresh && std::mem::take(&mut self.peer_keeps_keys);
                out.introduce |= starts_afresh;
                let under = if under_static { Under::Static } else { Under::Live };
                match message {
                    Message::Request => {
                        self.receiver.requested(&mut out);
                        self.sender.requested(&mut out);
                    }
                    Message::Indication { key, sum } => {
                        self.receiver.indication(key, sum, under, &mut out);
                        if doubted {
                            // If the peer runs this program and knows us already, it does not announce itself unless it
                            // is asked.
                            out.marker(true, Under::Static);
                        }
                    }
                    Message::Acknowledgement { sum } => self.sender.acknowledged(sum, self.peer_keeps_keys, &mut out),
                    Message::Dummy(data) => {
                        let marker = Marker::read(data);
                        if let Some(asks) = marker.asks {
                            if !std::mem::replace(&mut self.peer_keeps_keys, true) {
                                out.log(Note::PeerKeepsKeys);
                            }
                            if asks {
                                out.marker(false, under);
                            }
                        }
                        if marker.seals && self.seals {
                            out.actions.push(Action::PeerSeals { asks: marker.asks == Some(true) });
                        }
                    }
                    // An original uses this message for another purpose.
                    Message::Kill(_) if self.peer_keeps_keys => self.sender.left(&mut out),
                    Message::Debug(_) | Message::Ping(_) | Message::Pong(_) | Message::Kill(_) => {}
                }
            }
        }
        out.actions
    }
}

/// Where both directions write their actions.
struct Out<'a, R> {
    actions: Vec<Action>,
    now: Now,
    /// Whether to send our marker too, since the peer has not sent its own.
    introduce: bool,
    /// Whether our marker says that we use sealed packets.
    seals: bool,
    rng: &'a mut R,
}

impl<R: CryptoRng> Out<'_, R> {
    fn send(&mut self, message: &Message<'_>, under: Under) {
        let payload = message.build(self.now.unix_seconds(), self.rng);
        self.actions.push(Action::SendMessage { payload, under, announces: false });
    }

    /// Sends a message that opens an exchange; `announces`: whether it is the first NK_IND of a key.
    fn send_opening(&mut self, message: &Message<'_>, under: Under, announces: bool) {
        let payload = message.build(self.now.unix_seconds(), self.rng);
        self.actions.push(Action::SendMessage { payload, under: under.clone(), announces });
        if self.introduce {
            // An original takes the new key at the NK_IND and opens nothing under the old one afterwards.
            let under = if matches!(under, Under::Retired(_)) { Under::Static } else { under };
            self.marker(true, under);
        }
    }

    fn marker(&mut self, ask: bool, under: Under) {
        let data = Marker { asks: Some(ask), seals: self.seals }.data();
        self.send(&Message::Dummy(&data), under);
    }

    fn log(&mut self, note: Note) {
        self.actions.push(Action::Log(note));
    }
}
