//! The key exchange of one tunnel (protocol section 3) as a state machine without sockets or clocks.
//!
//! Two directions that know nothing of each other: [`sender`] makes our send keys and announces them, [`receiver`]
//! takes the peer's. Whatever may be lost is sent again by a timer. Towards an original, data stops to go under the old
//! send key before a new one is announced, since an original forgets its old receive key at the NK_IND; the NK_IND
//! itself goes under the old key. A peer that says with a CT_DUMMY (which originals ignore) that it keeps the old one for
//! a while is sent to under the old key until its NK_ACK.
//!
//! What the two ends know may diverge: one was restarted, or replaced by another gateway and came back. Then only the
//! static key reaches the other end, so a message that answers one under the static key goes under the static key, too.

mod receiver;
mod retry;
mod sender;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::time::Duration;

use rand::CryptoRng;
use zeroize::Zeroizing;

use self::receiver::Receiver;
use self::retry::Timing;
use self::sender::Sender;
use crate::control::protocol::{KeyOctets, Under, Wanted};
use crate::wire::message::Message;

/// The time of an input, on two clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic, since any fixed moment.
    pub at: Duration,
    /// Unix time in seconds, for time stamps.
    pub unix: u32,
}

/// What happened.
pub enum Input<'a> {
    /// The engine wants a new key.
    KeyWanted(Wanted),
    /// A message was opened, parsed and found fresh.
    Message {
        /// The message. Those that are no business of the key exchange are ignored.
        message: Message<'a>,
        /// Whether it was under the static key.
        under_static: bool,
    },
    /// The send key has been of no use for so long that an original has forgotten it.
    SendKeyForgotten,
    /// Several CT_PINGs in a row stayed unanswered: the peer may have other keys than we think.
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
        /// It is the first NK_IND of a key.
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
        /// How long the one before it stays valid, from the first packet under the new one on. Until that packet the
        /// peer has perhaps not begun to use it: two NK_IND of an original may overtake each other.
        keep: Duration,
    },
    /// Tell the operator.
    Log(Note),
}

/// What an operator may want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Note {
    /// Our new send key is in use.
    #[error("new send key, acknowledged after {} ms", after.as_millis())]
    NewSendKey {
        /// From the first NK_IND to the NK_ACK.
        after: Duration,
    },
    /// An idle tunnel.
    #[error("the send key is old and not renewed for want of traffic; dropped, since the peer forgets it, too")]
    Forgotten,
    /// The peer's new key is in use.
    #[error("new receive key")]
    NewReceiveKey,
    /// The peer asked for a key.
    #[error("the peer asks for a new key")]
    Requested,
    /// An NK_IND brought back a key that was used before.
    #[error("refused a receive key that was used before; an NK_IND came late or was replayed")]
    ReusedKey,
    /// An NK_ACK that no NK_IND is waiting for.
    #[error("ignored an NK_ACK for a key that is not waiting for one")]
    StrayAcknowledgement,
    /// Every NK_IND stayed without an answer.
    #[error("no answer to NK_IND for {} s; is the peer up, and has it the same static key?", after.as_secs())]
    NoAcknowledgement {
        /// Since the first one.
        after: Duration,
    },
    /// Every NK_REQ stayed without an answer.
    #[error("no answer to NK_REQ for {} s; is the peer up, and has it the same static key?", after.as_secs())]
    NoIndication {
        /// Since the first one.
        after: Duration,
    },
    /// The peer said that it keeps old receive keys, as we do.
    #[error("the peer keeps old keys at a change, so keys are announced ahead")]
    PeerKeepsKeys,
}

/// Data of the CT_DUMMY that tells our own kind, and behind it whether an answer is asked for (1) or not (0).
const MARKER: &[u8; 8] = b"CIPEkeep";

/// The key exchange of one tunnel. `R` makes the keys and the filler.
pub struct Exchange<R> {
    sender: Sender,
    receiver: Receiver,
    /// The peer keeps the previous receive key at a change.
    peer_keeps_keys: bool,
    rng: R,
}

impl<R: CryptoRng> Exchange<R> {
    /// A tunnel without dynamic keys. `tokxc` bounds how often the peer is bothered; less than a second counts as one.
    pub fn new(tokxc: Duration, rng: R) -> Self {
        let timing = Timing::new(tokxc);
        Self { sender: Sender::new(timing), receiver: Receiver::new(timing), peer_keeps_keys: false, rng }
    }

    /// The engine has lost all dynamic keys. Those taken so far stay refused: their replay filters are lost, too.
    pub fn start_over(&mut self) {
        self.sender.start_over();
        self.receiver.start_over();
        self.peer_keeps_keys = false;
    }

    /// Whether the peer is of our own kind, as far as is known now; it may be replaced by an original at any time.
    pub fn peer_keeps_keys(&self) -> bool {
        self.peer_keeps_keys
    }

    /// When [`Input::Tick`] is due, on the clock of [`Now::at`]; `None` while nothing is waited for. Changes with every
    /// input.
    pub fn deadline(&self) -> Option<Duration> {
        [self.sender.deadline(), self.receiver.deadline()].into_iter().flatten().min()
    }

    /// Takes one input. Total: no input, in no order, is an error.
    pub fn handle(&mut self, input: Input<'_>, now: Now) -> Vec<Action> {
        let mut out = Out { actions: Vec::new(), now, introduce: !self.peer_keeps_keys, rng: &mut self.rng };
        match input {
            Input::Tick => {
                self.sender.tick(&mut out);
                self.receiver.tick(&mut out);
            }
            Input::SendKeyForgotten if self.peer_keeps_keys => {}
            Input::SendKeyForgotten => self.sender.key_forgotten(&mut out),
            Input::KeyWanted(Wanted::NoSendKey) => self.sender.key_missing(&mut out),
            Input::KeyWanted(Wanted::Age | Wanted::Packets | Wanted::Octets) => {
                self.sender.key_spent(self.peer_keeps_keys, &mut out);
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
                // Perhaps as another program.
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
                            // One of ours that knows us already says nothing of itself unless it is asked.
                            out.marker(true, Under::Static);
                        }
                    }
                    Message::Acknowledgement { sum } => self.sender.acknowledged(sum, self.peer_keeps_keys, &mut out),
                    Message::Dummy(data) => {
                        if let Some(asked) = data.strip_prefix(MARKER).and_then(|rest| rest.first()) {
                            if !std::mem::replace(&mut self.peer_keeps_keys, true) {
                                out.log(Note::PeerKeepsKeys);
                            }
                            if *asked == 1 {
                                out.marker(false, under);
                            }
                        }
                    }
                    // What an original means by it is another thing.
                    Message::Kill(_) if self.peer_keeps_keys => self.sender.left(&mut out),
                    Message::Debug(_) | Message::Ping(_) | Message::Pong(_) | Message::Kill(_) => {}
                }
            }
        }
        out.actions
    }
}

/// What both directions write their actions to.
struct Out<'a, R> {
    actions: Vec<Action>,
    now: Now,
    /// Whether to send our marker along, since the peer has not sent its own.
    introduce: bool,
    rng: &'a mut R,
}

impl<R: CryptoRng> Out<'_, R> {
    fn send(&mut self, message: &Message<'_>, under: Under) {
        let payload = message.build(self.now.unix, self.rng);
        self.actions.push(Action::SendMessage { payload, under, announces: false });
    }

    /// Sends a message that opens an exchange; `announces`: it is the first NK_IND of a key.
    fn send_opening(&mut self, message: &Message<'_>, under: Under, announces: bool) {
        let payload = message.build(self.now.unix, self.rng);
        self.actions.push(Action::SendMessage { payload, under: under.clone(), announces });
        if self.introduce {
            // An original takes the new key at the NK_IND and opens nothing more under the old one.
            let under = if matches!(under, Under::Retired(_)) { Under::Static } else { under };
            self.marker(true, under);
        }
    }

    fn marker(&mut self, ask: bool, under: Under) {
        let mut data = [0; MARKER.len() + 1];
        data[..MARKER.len()].copy_from_slice(MARKER);
        data[MARKER.len()] = ask.into();
        self.send(&Message::Dummy(&data), under);
    }

    fn log(&mut self, note: Note) {
        self.actions.push(Action::Log(note));
    }
}
