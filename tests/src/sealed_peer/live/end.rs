//! Sessions, timers and counters of a live peer, without its socket: sections 4 and 6 of docs/SEALED.md.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Config, Counters, Event};
use crate::peer::{CT_PING, CT_PONG, echo};
use crate::sealed_peer::primitives::mac;
use crate::sealed_peer::{Begun, Direction};

/// First and longest interval between two repetitions of a message (section 6.1, without the random part).
const INTERVALS: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(5)];
/// Packets that wait for a session.
const WAITING: usize = 64;
const DATA: u8 = 0;
const CONTROL: u8 = 1;

/// A repeated message.
struct Repeated {
    interval: Duration,
    next: Instant,
}

impl Repeated {
    fn new(now: Instant) -> Self {
        Self { interval: INTERVALS[0], next: now + INTERVALS[0] }
    }

    /// Whether it is due; the interval doubles then.
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.next <= now;
        if due {
            self.interval = (self.interval * 2).min(INTERVALS[1]);
            self.next = now + self.interval;
        }
        due
    }
}

struct Attempt {
    begun: Begun,
    first: Vec<u8>,
    stamp: u64,
    epoch: u8,
    repeated: Repeated,
}

struct Receiving {
    session: u64,
    key: Direction,
    top: u64,
    accepted: HashSet<u64>,
}

struct Sending {
    session: u64,
    key: Direction,
    next: u64,
    /// The empty control packet of an initiator, until a packet of the other end has opened.
    confirm: Option<Repeated>,
    answers_probes: bool,
}

/// A session that was answered and is not confirmed.
struct Answered {
    session: u64,
    first: Vec<u8>,
    answer: Vec<u8>,
    send: Direction,
}

pub(super) struct End {
    config: Config,
    started: Instant,
    /// Events to send.
    pub events: Vec<Event>,
    pub counters: Counters,
    /// Datagrams to send.
    pub out: Vec<(SocketAddr, Vec<u8>)>,
    waiting: VecDeque<Vec<u8>>,
    peer: Option<SocketAddr>,
    attempt: Option<Attempt>,
    /// The oldest first.
    receiving: Vec<Receiving>,
    sending: Option<Sending>,
    answered: Option<Answered>,
    sessions: u64,
    last_stamp: u64,
    newest: u64,
    secret: [u8; 32],
}

impl End {
    pub(super) fn new(config: Config, now: Instant) -> Self {
        Self {
            started: now,
            events: Vec::new(),
            counters: Counters::default(),
            out: Vec::new(),
            waiting: VecDeque::new(),
            peer: config.peer,
            attempt: None,
            receiving: Vec::new(),
            sending: None,
            answered: None,
            sessions: 0,
            last_stamp: 0,
            newest: config.newest,
            secret: rand::random(),
            config,
        }
    }

    /// When [`Self::tick`] must be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let attempt = self.attempt.as_ref().map(|attempt| attempt.repeated.next);
        let confirm = self.sending.as_ref().and_then(|sending| Some(sending.confirm.as_ref()?.next));
        [attempt, confirm].into_iter().flatten().min()
    }

    /// Repeats what was not answered.
    pub(super) fn tick(&mut self, now: Instant) {
        if let Some(attempt) = &mut self.attempt
            && attempt.repeated.is_due(now)
            && let Some(to) = self.peer
        {
            self.out.push((to, attempt.first.clone()));
        }
        let confirm = self.sending.as_mut().and_then(|sending| sending.confirm.as_mut());
        if confirm.is_some_and(|confirm| confirm.is_due(now)) {
            self.send_control(&[]);
        }
    }

    /// Sends an inner packet, or keeps it until there is a session.
    pub(super) fn send(&mut self, packet: Vec<u8>, now: Instant) {
        if self.sending.is_some() {
            self.counters.sent += 1;
            self.seal(DATA, &packet);
        } else {
            self.waiting.push_back(packet);
            self.waiting.truncate(WAITING);
            if self.attempt.is_none() {
                self.begin(now);
            }
        }
    }

    pub(super) fn send_control(&mut self, message: &[u8]) {
        self.seal(CONTROL, message);
    }

    fn seal(&mut self, kind: u8, payload: &[u8]) {
        let (Some(to), Some(sending)) = (self.peer, &mut self.sending) else { return };
        self.out.push((to, sending.key.seal(sending.next, kind, payload)));
        sending.next += 1;
    }

    /// Begins a handshake, in the place of one that runs.
    pub(super) fn begin(&mut self, now: Instant) {
        let Some(to) = self.peer else { return };
        let clock = self.config.clock + now.saturating_duration_since(self.started).as_nanos() as u64;
        let stamp = clock.max(self.last_stamp + 1);
        self.last_stamp = stamp;
        let epoch = self.epoch_for_next();
        let (first, begun) = self.config.identity.begin(rand::random(), stamp, epoch);
        self.counters.begun += 1;
        self.out.push((to, first.clone()));
        self.attempt = Some(Attempt { begun, first, stamp, epoch, repeated: Repeated::new(now) });
    }

    /// An epoch without a key, or that of the oldest session that is not in use.
    fn epoch_for_next(&self) -> u8 {
        let of_attempt = self.attempt.as_ref().map(|attempt| attempt.epoch);
        let is_free = |epoch: &u8| self.receiving.iter().all(|known| known.key.epoch != *epoch);
        let in_use = self.sending.as_ref().map(|sending| sending.session);
        let old = self.receiving.iter().filter(|known| Some(known.session) != in_use).map(|known| known.key.epoch);
        let mut candidates = (1..=3).filter(is_free).chain(old).filter(|epoch| Some(*epoch) != of_attempt);
        candidates.next().unwrap_or(1)
    }

    fn receive_under(&mut self, key: Direction) -> u64 {
        self.sessions += 1;
        let session = self.sessions;
        self.receiving.retain(|known| known.key.epoch != key.epoch);
        self.receiving.push(Receiving { session, key, top: 0, accepted: HashSet::new() });
        session
    }

    fn send_under(&mut self, session: u64, key: Direction, confirm: Option<Repeated>, now: Instant) {
        let answers_probes = confirm.is_none();
        self.sending = Some(Sending { session, key, next: 0, confirm, answers_probes });
        self.events.push(Event::Session);
        self.send_control(&[]);
        for packet in std::mem::take(&mut self.waiting) {
            self.send(packet, now);
        }
    }

    /// Handles a datagram from the carrier.
    pub(super) fn datagram(&mut self, datagram: &[u8], from: SocketAddr, now: Instant) {
        self.counters.datagrams += 1;
        match datagram {
            [0x80, 0, 0, 0, 0, 0, 0, 1, ..] => self.first(datagram, from),
            [0x80, 0, 0, 0, 0, 0, 0, 2, ..] => self.answer(datagram, now),
            [0x80, 0, 0, 0, 0, 0, 0, 3, ..] => self.retry(datagram, now),
            [0x80, 0, 0, 0, word, ..] if word >> 6 != 0 => self.packet(datagram, from, now),
            _ => self.counters.unsealed += 1,
        }
    }

    fn first(&mut self, first: &[u8], from: SocketAddr) {
        self.peer.get_or_insert(from);
        let identity = self.config.identity;
        let is_same = |known: &&Answered| first.len() == 112 && known.first[..96] == first[..96];
        if let Some(answer) = self.answered.as_ref().filter(is_same).map(|known| known.answer.clone()) {
            self.send_answer(answer, from);
            return;
        }
        let Some((said, answer, session)) = identity.answer(first, rand::random(), self.epoch_for_next()) else {
            self.counters.refused += 1;
            return;
        };
        let cookie = mac(&self.secret, from.to_string().as_bytes());
        let lacks_cookie = self.config.asks_cookies && identity.with_cookie(first, &cookie) != first;
        if said.stamp <= self.newest || lacks_cookie {
            self.counters.replayed += u64::from(said.stamp <= self.newest);
            self.counters.retries_sent += 1;
            let cookie = if lacks_cookie { cookie } else { [0; 16] };
            self.out.push((from, identity.retry(first, rand::random(), self.newest, &cookie)));
            return;
        }
        // Crossing: the greater id goes on.
        if self.attempt.is_some() && identity.id > said.id && self.peer == Some(from) {
            return;
        }
        self.attempt = None;
        self.newest = said.stamp;
        let number = self.receive_under(session.of_initiator);
        let first = first.to_vec();
        self.answered = Some(Answered { session: number, first, answer: answer.clone(), send: session.of_responder });
        self.send_answer(answer, from);
    }

    fn send_answer(&mut self, answer: Vec<u8>, to: SocketAddr) {
        self.counters.answers += 1;
        match self.config.lose_answers.checked_sub(1) {
            Some(left) => self.config.lose_answers = left,
            None => self.out.push((to, answer)),
        }
    }

    fn answer(&mut self, answer: &[u8], now: Instant) {
        // One to an attempt before is late.
        let is_of = |attempt: &&Attempt| answer.len() != 96 || answer[72..80] == attempt.first[80..88];
        let Some(attempt) = self.attempt.as_ref().filter(is_of) else { return };
        let Some(session) = self.config.identity.finish(attempt.begun.clone(), answer) else {
            self.counters.refused += 1;
            return;
        };
        self.attempt = None;
        self.counters.initiated += 1;
        let number = self.receive_under(session.of_responder);
        self.send_under(number, session.of_initiator, Some(Repeated::new(now)), now);
    }

    fn retry(&mut self, retry: &[u8], now: Instant) {
        let (Some(attempt), Some(to)) = (&mut self.attempt, self.peer) else { return };
        let Some((newest, cookie)) = self.config.identity.read_retry(&attempt.first, retry) else {
            self.counters.refused += 1;
            return;
        };
        self.counters.retries_received += 1;
        if newest >= attempt.stamp {
            self.last_stamp = self.last_stamp.max(newest);
            self.begin(now);
        } else if cookie != [0; 16] {
            attempt.first = self.config.identity.with_cookie(&attempt.first, &cookie);
            self.out.push((to, attempt.first.clone()));
        }
    }

    fn packet(&mut self, datagram: &[u8], from: SocketAddr, now: Instant) {
        let epoch = datagram[4] >> 6;
        let Some(receiving) = self.receiving.iter_mut().find(|known| known.key.epoch == epoch) else {
            self.counters.no_key += 1;
            if self.receiving.is_empty() && self.attempt.is_none() {
                self.begin(now);
            }
            return;
        };
        let Some((counter, kind, payload)) = receiving.key.open(receiving.top, datagram) else {
            self.counters.refused += 1;
            return;
        };
        if !receiving.accepted.insert(counter) {
            self.counters.replayed += 1;
            return;
        }
        receiving.top = receiving.top.max(counter);
        let session = receiving.session;
        if self.peer != Some(from) {
            self.peer = Some(from);
            self.counters.moves += 1;
        }
        if let Some(Answered { session, send, .. }) = self.answered.take_if(|answered| answered.session == session) {
            self.counters.confirmed += 1;
            self.send_under(session, send, None, now);
        }
        if let Some(sending) = self.sending.as_mut().filter(|sending| sending.session <= session) {
            sending.confirm = None;
        }
        match kind {
            DATA => self.deliver(payload, now),
            CONTROL => self.control(&payload, session),
            _ => self.counters.refused += 1,
        }
    }

    fn deliver(&mut self, packet: Vec<u8>, now: Instant) {
        self.counters.delivered += 1;
        if let Some(answer) = echo::answer(&packet) {
            self.counters.echoed += 1;
            self.send(answer, now);
        }
        if self.config.tell_packets {
            self.events.push(Event::Delivered(packet));
        }
    }

    fn control(&mut self, message: &[u8], session: u64) {
        self.counters.control += 1;
        match message {
            [] => {
                let in_use = |sending: &Sending| sending.session == session && sending.answers_probes;
                if self.sending.as_ref().is_some_and(in_use) {
                    self.send_control(&[]);
                }
            }
            [number, data @ ..] => {
                if *number == CT_PING {
                    self.send_control(&[&[CT_PONG], data].concat());
                }
                self.events.push(Event::Message(*number));
            }
        }
    }
}
