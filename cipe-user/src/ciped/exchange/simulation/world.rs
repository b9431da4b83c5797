//! The path between two ends, and its clock.

use std::collections::BTreeMap;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::Input;
use super::MS;
use super::end::{Datagram, End};

pub(super) struct World {
    pub(super) ends: [End; 2],
    pub(super) now: Duration,
    pub(super) queue: BTreeMap<(Duration, u64), Event>,
    pub(super) number: u64,
    pub(super) rng: StdRng,
    pub(super) latency: Duration,
    /// Random addition to the latency, so that datagrams overtake each other.
    pub(super) jitter: Duration,
    pub(super) loss: f64,
    pub(super) duplication: f64,
    /// Which messages are lost: sender, type octet, and how many of that type the sender had sent before.
    pub(super) lose: fn(usize, u8, u32) -> bool,
    pub(super) messages: BTreeMap<(usize, u8), u32>,
}

pub(super) enum Event {
    Arrival(usize, Datagram),
    Data(usize, Duration),
}

impl World {
    pub(super) fn new(ends: [End; 2], seed: u64) -> Self {
        Self {
            ends,
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(seed),
            latency: 15 * MS,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplication: 0.0,
            lose: |_, _, _| false,
            messages: BTreeMap::new(),
        }
    }

    pub(super) fn schedule(&mut self, when: Duration, event: Event) {
        self.number += 1;
        self.queue.insert((when, self.number), event);
    }

    /// End `from` sends a data packet every `interval`.
    pub(super) fn traffic(mut self, from: usize, interval: Duration) -> Self {
        self.schedule(self.now, Event::Data(from, interval));
        self
    }

    pub(super) fn run_until(&mut self, end: Duration) {
        loop {
            let timer = (0..2).filter_map(|i| self.ends[i].deadline().map(|when| (when, i))).min();
            let event = self.queue.first_key_value().map(|((when, _), _)| *when);
            match (timer, event) {
                (Some((when, i)), _) if event.is_none_or(|event| when <= event) && when <= end => {
                    assert!(when >= self.now, "a deadline in the past");
                    self.now = when;
                    self.ends[i].input(Input::Tick, when);
                }
                (_, Some(when)) if when <= end => {
                    let Some((_, event)) = self.queue.pop_first() else { return };
                    self.now = when;
                    match event {
                        Event::Arrival(to, datagram) => self.ends[to].arrive(&datagram, when),
                        Event::Data(from, interval) => {
                            self.ends[from].send_data(when);
                            self.schedule(when + interval, Event::Data(from, interval));
                        }
                    }
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
            self.carry();
        }
    }

    /// Puts the ends' datagrams on the path.
    pub(super) fn carry(&mut self) {
        for from in 0..2 {
            for datagram in std::mem::take(&mut self.ends[from].out) {
                if let Some(payload) = &datagram.message {
                    let before = self.messages.entry((from, payload[0])).or_default();
                    *before += 1;
                    if (self.lose)(from, payload[0], *before - 1) {
                        continue;
                    }
                }
                if self.rng.random_bool(self.loss) {
                    continue;
                }
                for _ in 0..=u8::from(self.rng.random_bool(self.duplication)) {
                    let when = self.now + self.latency + self.jitter.mul_f64(self.rng.random());
                    self.schedule(when, Event::Arrival(1 - from, datagram.clone()));
                }
            }
        }
    }

    /// Whether packets of `from` are under a dynamic key that the other end has.
    pub(super) fn keyed(&self, from: usize) -> bool {
        let (send, other) = (self.ends[from].send, &self.ends[1 - from]);
        send.is_some() && (send == other.receive || send == other.previous)
    }

    /// Whether data of `from` reaches the other end during the next half second.
    pub(super) fn passes(&mut self, from: usize) -> bool {
        let before = self.ends[1 - from].counters.delivered;
        self.run_until(self.now + 500 * MS);
        self.ends[1 - from].counters.delivered > before
    }
}
