//! The path between two ends, its clock, and the adversary on it, who keeps every datagram.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::*;
use super::end::{Address, Book, End};

pub(super) const MS: Duration = Duration::from_millis(1);
/// How long a NAT keeps a mapping.
pub(super) const NAT_LIFE: Duration = Duration::from_secs(60);
const ADVERSARY: Address = 100;

pub(super) enum Event {
    /// From an address, to an address.
    Arrival(Address, Address, Vec<u8>),
    Data(usize, Duration),
    Attack,
}

pub(super) struct World {
    pub(super) ends: [End; 2],
    pub(super) book: Book,
    pub(super) now: Duration,
    pub(super) queue: BTreeMap<(Duration, u64), Event>,
    number: u64,
    pub(super) rng: StdRng,
    pub(super) latency: Duration,
    /// Random addition to the latency.
    pub(super) jitter: Duration,
    pub(super) loss: f64,
    pub(super) duplication: f64,
    /// Which datagrams are lost: sender, and the datagram.
    pub(super) lose: fn(usize, &[u8]) -> bool,
    /// Whether all datagrams go back to their senders.
    pub(super) reflects: bool,
    /// Every datagram that was ever sent.
    pub(super) recorded: Vec<Vec<u8>>,
    /// The end behind a NAT, which forgets it after a minute of silence, and when it last sent something.
    nat: Option<(usize, Duration)>,
    addresses: Address,
    /// How often the adversary acts.
    attacks: Option<Duration>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut end = |number| {
            let kept = Kept { id: rng.random(), newest: 0, was_sealed: false };
            End::new(number, rng.random(), kept)
        };
        Self {
            ends: [end(0), end(1)],
            book: Book::default(),
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            number: 0,
            rng,
            latency: 15 * MS,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplication: 0.0,
            lose: |_, _| false,
            reflects: false,
            recorded: Vec::new(),
            nat: None,
            addresses: ADVERSARY,
            attacks: None,
        }
    }

    /// Puts an end behind a NAT.
    pub(super) fn behind_nat(mut self, end: usize) -> Self {
        self.nat = Some((end, self.now));
        self
    }

    /// An end gets another address, which its peer does not know.
    pub(super) fn roam(&mut self, end: usize) {
        self.addresses += 1;
        self.ends[end].address = self.addresses;
    }

    /// Delivers a datagram from the peer's present address.
    pub(super) fn deliver(&mut self, to: usize, datagram: &[u8]) {
        let source = self.ends[1 - to].address;
        self.ends[to].arrive(datagram, (source, true), self.now, &mut self.book);
    }

    pub(super) fn schedule(&mut self, when: Duration, event: Event) {
        self.number += 1;
        self.queue.insert((when, self.number), event);
    }

    /// End `from` sends a payload every `interval`.
    pub(super) fn traffic(mut self, from: usize, interval: Duration) -> Self {
        self.schedule(self.now, Event::Data(from, interval));
        self
    }

    /// The adversary acts every `interval`.
    pub(super) fn attacked(mut self, interval: Duration) -> Self {
        self.attacks = Some(interval);
        self.schedule(self.now, Event::Attack);
        self
    }

    pub(super) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let timer = (0..2).filter_map(|i| self.ends[i].deadline().map(|when| (when, i))).min();
            let event = self.queue.first_key_value().map(|((when, _), _)| *when);
            match (timer, event) {
                (Some((when, i)), _) if event.is_none_or(|event| when <= event) && when <= end => {
                    self.now = self.now.max(when);
                    self.ends[i].input(Input::Tick, self.now, &mut self.book);
                    assert!(self.ends[i].deadline().is_none_or(|next| next > self.now), "a deadline that stays");
                }
                (_, Some(when)) if when <= end => {
                    let Some((_, event)) = self.queue.pop_first() else { return };
                    self.now = when;
                    self.happen(event);
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
            self.carry();
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Arrival(source, address, datagram) => {
                let Some(to) = (0..2).find(|end| self.ends[*end].address == address) else { return };
                if self.nat.is_some_and(|(end, last)| end == to && self.now - last >= NAT_LIFE) {
                    return;
                }
                let is_peer = self.ends[1 - to].address == source;
                self.ends[to].arrive(&datagram, (source, is_peer), self.now, &mut self.book);
            }
            Event::Data(from, interval) => {
                self.ends[from].send_data(self.now, &mut self.book);
                self.schedule(self.now + interval, Event::Data(from, interval));
            }
            Event::Attack => {
                self.attack();
                if let Some(interval) = self.attacks {
                    self.schedule(self.now + interval, Event::Attack);
                }
            }
        }
    }

    /// Sends a recorded datagram, whole or changed, to either end: also to its sender.
    fn attack(&mut self) {
        if self.recorded.is_empty() {
            return;
        }
        // Handshake messages are rare, and what it is about.
        let handshakes: Vec<usize> = (0..self.recorded.len()).filter(|i| self.recorded[*i][4] < 0x40).collect();
        let which = match self.rng.random_range(0..3) {
            0 => self.rng.random_range(0..self.recorded.len()),
            1 => self.recorded.len() - 1 - self.rng.random_range(0..self.recorded.len().min(20)),
            _ => handshakes.get(self.rng.random_range(0..handshakes.len().max(1))).copied().unwrap_or(0),
        };
        let mut datagram = self.recorded[which].clone();
        match self.rng.random_range(0..8) {
            0 => {
                let at = self.rng.random_range(0..datagram.len());
                datagram[at] ^= 1 << self.rng.random_range(0..8);
            }
            1 => datagram.truncate(self.rng.random_range(0..datagram.len())),
            // Another epoch.
            2 => datagram[4] = datagram[4] & 0x3F | self.rng.random::<u8>() & 0xC0,
            _ => {}
        }
        let to = self.rng.random_range(0..2);
        // From the peer's address, or from the adversary's own.
        let source = if self.rng.random() { self.ends[1 - to].address } else { ADVERSARY };
        self.ends[to].arrive(&datagram, (source, source != ADVERSARY), self.now, &mut self.book);
    }

    /// Puts the ends' datagrams on the path.
    fn carry(&mut self) {
        for from in 0..2 {
            for (datagram, to) in std::mem::take(&mut self.ends[from].out) {
                if let Some((end, last)) = self.nat.filter(|(end, _)| *end == from) {
                    if self.now - last >= NAT_LIFE {
                        self.roam(end);
                    }
                    self.nat = Some((end, self.now));
                }
                if self.recorded.len() < 20_000 {
                    self.recorded.push(datagram.clone());
                }
                if (self.lose)(from, &datagram) || self.rng.random_bool(self.loss) {
                    continue;
                }
                for _ in 0..=u8::from(self.rng.random_bool(self.duplication)) {
                    let when = self.now + self.latency + self.jitter.mul_f64(self.rng.random());
                    let source = self.ends[from].address;
                    let (source, to) =
                        if self.reflects { (self.ends[1 - from].address, Some(source)) } else { (source, to) };
                    if let Some(to) = to {
                        self.schedule(when, Event::Arrival(source, to, datagram.clone()));
                    }
                }
            }
        }
    }

    /// The same path without an adversary and without faults.
    pub(super) fn heal(&mut self) {
        (self.loss, self.duplication, self.jitter) = (0.0, 0.0, Duration::ZERO);
        self.lose = |_, _| false;
        self.attacks = None;
    }

    /// Whether packets of both ends arrive at the other end during the next half second.
    pub(super) fn passes(&mut self) -> bool {
        let before = [0, 1].map(|end| self.book.delivered(end));
        self.run(500 * MS);
        [0, 1].iter().all(|end| self.book.delivered(*end) > before[*end])
    }

    pub(super) fn is_sealed(&self) -> bool {
        (0..2).all(|from| {
            let other = &self.ends[1 - from];
            self.ends[from]
                .sending
                .as_ref()
                .is_some_and(|sending| other.receiving.values().any(|(_, octets, ..)| *octets == *sending.key.octets))
        })
    }
}
