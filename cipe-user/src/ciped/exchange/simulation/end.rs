//! One end of the tunnel, with the parts of engine and daemon: this program's, or an original's.

use std::collections::HashSet;
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::{Action, Exchange, Input, Now, TakenKeys};
use super::TOKXC;
use crate::control::protocol::{Under, Wanted};
use crate::wire::message::{DynamicKey, Message};

type Octets = [u8; 16];

/// A datagram: its key (`None`: static), and a message, or `None` for data.
#[derive(Clone)]
pub(super) struct Datagram {
    pub(super) under: Option<Octets>,
    pub(super) message: Option<Vec<u8>>,
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) delivered: u32,
    pub(super) sent_static: u32,
    pub(super) lost: u32,
    pub(super) changes: u32,
}

/// An end with the parts of engine and daemon, ours or the original's.
pub(super) struct End {
    pub(super) kind: Kind,
    pub(super) send: Option<Octets>,
    pub(super) receive: Option<Octets>,
    pub(super) previous: Option<Octets>,
    /// Whether the other end has ever used the previous key.
    pub(super) previous_used: bool,
    /// How long the previous key is kept after the first use of the new one.
    pub(super) keep: Duration,
    /// When the previous key is dropped.
    pub(super) previous_ends: Option<Duration>,
    /// Packets under one send key before a new one is requested.
    pub(super) send_limit: u32,
    /// Packets under one receive key before it is dropped.
    pub(super) receive_limit: u32,
    pub(super) sent: u32,
    /// Packets under the static key since the last send key was announced.
    pub(super) sent_static: u32,
    pub(super) received: u32,
    /// Packets fail under a live receive key: when to request another one, and how long to wait after that.
    pub(super) failing: Option<(Duration, Duration)>,
    pub(super) send_wanted: Option<Duration>,
    pub(super) receive_wanted: Option<Duration>,
    pub(super) counters: Counters,
    pub(super) out: Vec<Datagram>,
    pub(super) rng: StdRng,
}

pub(super) enum Kind {
    Ours(Box<Exchange<StdRng>>),
    /// Never retransmits; takes a key at the NK_IND.
    Original {
        pending: Option<DynamicKey>,
        habit: Habit,
        /// All receive keys so far, if it refuses keys that it has had.
        taken: Option<HashSet<Octets>>,
    },
}

/// How an original uses its old send key when it announces a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Habit {
    /// Stops using it.
    Forgets,
    /// Announces under it unless the peer requested a key; then stops using it.
    Chains,
    /// Announces under it even if the peer requested a key; then stops using it.
    Stubborn,
    /// Uses it until the NK_ACK.
    Keeps,
}

pub(super) fn at(now: Duration) -> Now {
    Now { at: now, unix_nanos: now.as_nanos() as u64 }
}

/// Whether an event that is reported at most once per tokxc is reported now.
pub(super) fn allowed(last: &mut Option<Duration>, now: Duration) -> bool {
    let yes = last.is_none_or(|last| now >= last + TOKXC);
    if yes {
        *last = Some(now);
    }
    yes
}

impl End {
    pub(super) fn new(kind: Kind, seed: u64) -> Self {
        Self {
            kind,
            send: None,
            receive: None,
            previous: None,
            previous_used: false,
            keep: Duration::ZERO,
            previous_ends: None,
            send_limit: u32::MAX,
            receive_limit: u32::MAX,
            sent: 0,
            sent_static: 0,
            failing: None,
            received: 0,
            send_wanted: None,
            receive_wanted: None,
            counters: Counters::default(),
            out: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    pub(super) fn ours(seed: u64) -> Self {
        Self::new(
            Kind::Ours(Box::new(Exchange::new(TOKXC, TakenKeys::new([0; 16]), StdRng::seed_from_u64(!seed)))),
            seed,
        )
    }

    pub(super) fn original(seed: u64, habit: Habit) -> Self {
        Self::new(Kind::Original { pending: None, habit, taken: None }, seed)
    }

    /// An original that refuses a key that it has taken before.
    pub(super) fn particular(seed: u64) -> Self {
        Self::new(Kind::Original { pending: None, habit: Habit::Chains, taken: Some(HashSet::new()) }, seed)
    }

    pub(super) fn with_limits(mut self, send: u32, receive: u32) -> Self {
        (self.send_limit, self.receive_limit) = (send, receive);
        self
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        match &self.kind {
            Kind::Ours(exchange) => exchange.deadline(),
            Kind::Original { .. } => None,
        }
    }

    pub(super) fn put(&mut self, message: Option<Vec<u8>>) {
        self.out.push(Datagram { under: self.send, message });
    }

    pub(super) fn input(&mut self, input: Input<'_>, now: Duration) {
        let Kind::Ours(exchange) = &mut self.kind else { panic!("the original has no inputs") };
        for action in exchange.handle(input, at(now)) {
            match action {
                Action::SendMessage { payload, under, announces } => {
                    if announces {
                        self.sent_static = 0;
                    }
                    let under = match under {
                        Under::Live => self.send,
                        Under::Static => None,
                        Under::Retired(key) => Some(*key),
                    };
                    self.out.push(Datagram { under, message: Some(payload.to_vec()) });
                }
                Action::SetSendKey(key) => {
                    (self.send, self.sent, self.send_wanted) = (Some(*key), 0, None);
                    self.counters.changes += 1;
                }
                Action::DropSendKey => (self.send, self.send_wanted) = (None, None),
                Action::SetReceiveKey { key, keep } => {
                    let used = self.received > 0;
                    let stays = !used && self.previous.is_some() && self.previous_used;
                    if !stays {
                        self.previous = self.receive;
                    }
                    (self.previous_used, self.keep, self.previous_ends) = (used || stays, keep, None);
                    (self.receive, self.received, self.receive_wanted) = (Some(*key), 0, None);
                }
                Action::PeerSeals { .. } | Action::Log(_) => {}
            }
        }
    }

    /// The original announces a new key, on its own or because the peer `asked` for it.
    pub(super) fn announce(&mut self, asked: bool, now: Duration) {
        let key = DynamicKey::random(&mut self.rng);
        let payload = Message::indication(&key).build(0, &mut self.rng);
        let Kind::Original { pending, habit, .. } = &mut self.kind else { panic!("ours has an exchange") };
        *pending = Some(key);
        let habit = *habit;
        if habit == Habit::Forgets || asked && habit != Habit::Stubborn {
            self.send = None;
        }
        self.put(Some(payload.to_vec()));
        if habit != Habit::Keeps {
            self.send = None;
        }
        self.send_wanted = Some(now);
    }

    pub(super) fn send_data(&mut self, now: Duration) {
        let ours = matches!(self.kind, Kind::Ours(_));
        if self.send.is_none() {
            if allowed(&mut self.send_wanted, now) {
                if ours { self.input(Input::KeyWanted(Wanted::NoSendKey), now) } else { self.announce(false, now) }
            }
        } else if (self.sent >= self.send_limit || ours && self.sent + self.sent_static >= self.counted_limit())
            && (!self.is_announcing() || allowed(&mut self.send_wanted, now))
        {
            if ours { self.input(Input::KeyWanted(Wanted::Packets), now) } else { self.announce(false, now) }
        }
        match self.send {
            Some(_) => self.sent += 1,
            None => {
                (self.sent_static, self.counters.sent_static) = (self.sent_static + 1, self.counters.sent_static + 1);
            }
        }
        self.put(None);
    }

    /// Whether a key was requested or announced, and the answer may be in flight.
    fn is_announcing(&self) -> bool {
        match &self.kind {
            Kind::Ours(_) => true,
            Kind::Original { pending, .. } => pending.is_some(),
        }
    }

    /// The limit as the engine counts it.
    fn counted_limit(&self) -> u32 {
        self.send_limit.saturating_mul(2).saturating_sub(self.send_limit / 16)
    }

    pub(super) fn want_receive_key(&mut self, reason: Wanted, now: Duration) {
        if !allowed(&mut self.receive_wanted, now) {
            return;
        }
        if let Kind::Ours(_) = self.kind {
            self.input(Input::KeyWanted(reason), now);
        } else {
            let payload = Message::Request.build(0, &mut self.rng);
            self.put(Some(payload.to_vec()));
        }
    }

    /// Packets under a live receive key that is the wrong one.
    fn undecryptable(&mut self, now: Duration) {
        if !matches!(self.kind, Kind::Ours(_)) {
            return;
        }
        let (ask, wait) = *self.failing.get_or_insert((now + Duration::from_secs(1), TOKXC));
        if now >= ask {
            self.failing = Some((now + wait, 2 * wait));
            self.input(Input::KeyWanted(Wanted::Undecryptable), now);
        }
    }

    pub(super) fn arrive(&mut self, datagram: &Datagram, now: Duration) {
        let ours = matches!(self.kind, Kind::Ours(_));
        self.previous = self.previous.filter(|_| self.previous_ends.is_none_or(|ends| now < ends));
        if let Some(key) = datagram.under {
            if self.receive.is_some_and(|_| self.received >= self.receive_limit) {
                (self.receive, self.receive_wanted) = (None, None);
                self.want_receive_key(Wanted::ReceiveKeySpent, now);
            }
            let previous = self.previous == Some(key);
            if self.receive != Some(key) && !previous {
                self.counters.lost += u32::from(datagram.message.is_none());
                match self.receive {
                    None => self.want_receive_key(Wanted::NoReceiveKey, now),
                    Some(_) => self.undecryptable(now),
                }
                return;
            }
            self.failing = None;
            if !previous {
                self.received += 1;
                self.previous_ends.get_or_insert(now + self.keep);
            }
        } else if !ours && self.receive.is_some() {
            // An original counts every valid packet.
            self.received += 1;
        }
        match &datagram.message {
            None => self.counters.delivered += 1,
            Some(payload) => {
                let message = Message::parse(payload).expect("ends send messages only");
                match &mut self.kind {
                    Kind::Ours(_) => {
                        self.input(Input::Message { message, under_static: datagram.under.is_none() }, now);
                    }
                    Kind::Original { pending, taken, .. } => match message {
                        Message::Request => self.announce(true, now),
                        Message::Indication { key, sum } => {
                            if taken.as_mut().is_some_and(|taken| !taken.insert(key.0)) {
                                return;
                            }
                            (self.receive, self.received) = (Some(key.0), 0);
                            let payload = Message::Acknowledgement { sum }.build(0, &mut self.rng);
                            self.put(Some(payload.to_vec()));
                        }
                        Message::Acknowledgement { sum } => {
                            if let Some(key) = pending.take_if(|key| key.has_sum(sum)) {
                                (self.send, self.sent) = (Some(key.0), 0);
                                self.counters.changes += 1;
                            }
                        }
                        _ => {}
                    },
                }
            }
        }
    }
}
