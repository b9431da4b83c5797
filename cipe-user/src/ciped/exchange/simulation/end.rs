//! One end of the tunnel, as an engine and a daemon make it: ours, or the original's.

use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::{Action, Exchange, Input, Now};
use super::TOKXC;
use crate::control::protocol::Wanted;
use crate::wire::message::{DynamicKey, Message};

type Octets = [u8; 16];

/// A datagram: the key it is under (`None`: static), and a message, or `None` for data.
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

/// An end as an engine and a daemon make it, ours or the original's.
pub(super) struct End {
    pub(super) kind: Kind,
    pub(super) send: Option<Octets>,
    pub(super) receive: Option<Octets>,
    pub(super) previous: Option<Octets>,
    /// How long the previous key is kept once the new one is in use.
    pub(super) keep: Duration,
    /// When the previous key goes.
    pub(super) previous_ends: Option<Duration>,
    /// Packets under one send key before another one is wanted.
    pub(super) send_limit: u32,
    /// Packets under one receive key before it is forgotten.
    pub(super) receive_limit: u32,
    pub(super) sent: u32,
    pub(super) received: u32,
    pub(super) send_wanted: Option<Duration>,
    pub(super) receive_wanted: Option<Duration>,
    pub(super) counters: Counters,
    pub(super) out: Vec<Datagram>,
    pub(super) rng: StdRng,
}

pub(super) enum Kind {
    Ours(Box<Exchange<StdRng>>),
    /// Never resends; stops using its send key before it announces another; takes a key at the NK_IND.
    Original {
        pending: Option<DynamicKey>,
    },
}

pub(super) fn at(now: Duration) -> Now {
    Now { at: now, unix: now.as_secs() as u32 }
}

/// Whether an event that is told at most once per tokxc is told now.
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
            keep: Duration::ZERO,
            previous_ends: None,
            send_limit: u32::MAX,
            receive_limit: u32::MAX,
            sent: 0,
            received: 0,
            send_wanted: None,
            receive_wanted: None,
            counters: Counters::default(),
            out: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    pub(super) fn ours(seed: u64) -> Self {
        Self::new(Kind::Ours(Box::new(Exchange::new(TOKXC, StdRng::seed_from_u64(!seed)))), seed)
    }

    pub(super) fn original(seed: u64) -> Self {
        Self::new(Kind::Original { pending: None }, seed)
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
                Action::SendMessage(payload) => self.put(Some(payload.to_vec())),
                Action::SetSendKey(key) => {
                    (self.send, self.sent, self.send_wanted) = (Some(key.0), 0, None);
                    self.counters.changes += 1;
                }
                Action::DropSendKey => self.send = None,
                Action::SetReceiveKey { key, keep } => {
                    (self.previous, self.keep, self.previous_ends) = (self.receive, keep, None);
                    (self.receive, self.received, self.receive_wanted) = (Some(key.0), 0, None);
                }
                Action::Log(_) => {}
            }
        }
    }

    /// The original announces another key.
    pub(super) fn announce(&mut self, now: Duration) {
        let key = DynamicKey::random(&mut self.rng);
        let payload = Message::indication(&key).build(0, &mut self.rng);
        self.send = None;
        self.put(Some(payload.to_vec()));
        (self.kind, self.send_wanted) = (Kind::Original { pending: Some(key) }, Some(now));
    }

    pub(super) fn send_data(&mut self, now: Duration) {
        let ours = matches!(self.kind, Kind::Ours(_));
        if self.send.is_none() {
            if allowed(&mut self.send_wanted, now) {
                if ours { self.input(Input::KeyWanted(Wanted::NoSendKey), now) } else { self.announce(now) }
            }
        } else if self.sent >= self.send_limit && (!ours || allowed(&mut self.send_wanted, now)) {
            if ours { self.input(Input::KeyWanted(Wanted::Packets), now) } else { self.announce(now) }
        }
        self.sent += 1;
        self.counters.sent_static += u32::from(self.send.is_none());
        self.put(None);
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

    pub(super) fn arrive(&mut self, datagram: &Datagram, now: Duration) {
        self.previous = self.previous.filter(|_| self.previous_ends.is_none_or(|ends| now < ends));
        if let Some(key) = datagram.under {
            if self.receive.is_some_and(|_| self.received >= self.receive_limit) {
                (self.receive, self.receive_wanted) = (None, None);
                self.want_receive_key(Wanted::ReceiveKeySpent, now);
            }
            let previous = self.previous == Some(key);
            if self.receive != Some(key) && !previous {
                self.counters.lost += u32::from(datagram.message.is_none());
                if self.receive.is_none() {
                    self.want_receive_key(Wanted::NoReceiveKey, now);
                }
                return;
            }
            if !previous {
                self.received += 1;
                self.previous_ends.get_or_insert(now + self.keep);
            }
        }
        match &datagram.message {
            None => self.counters.delivered += 1,
            Some(payload) => {
                let message = Message::parse(payload).expect("ends send messages only");
                match &mut self.kind {
                    Kind::Ours(_) => {
                        self.input(Input::Message { message, under_static: datagram.under.is_none() }, now)
                    }
                    Kind::Original { pending } => match message {
                        Message::Request => self.announce(now),
                        Message::Indication { key, sum } => {
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
