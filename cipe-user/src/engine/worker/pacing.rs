//! What of a paced tunnel's datagrams waits, sealed, until it may leave ([`Pace`]).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Worker;
use crate::engine::datapath::Outgoing;
use crate::engine::pace::Pace;
use crate::wire::packet::Type;

/// One tunnel's.
pub(super) struct Spaced {
    tunnel: u16,
    pace: Pace,
    waiting: VecDeque<Outgoing>,
    /// When to look again.
    next: Instant,
}

/// Without a datagram for so long, nothing is kept of a tunnel: whatever leaves then does so at once.
const IDLE: Duration = Duration::from_secs(1);

impl Worker {
    /// Holds back what of paced tunnels has its time later.
    pub(super) fn hold_back(&mut self, outgoing: &mut Vec<Outgoing>) {
        let is_paced = |number: u16| self.datapath.tunnels.get(&number).is_some_and(|tunnel| tunnel.paced);
        if !outgoing.iter().any(|out| out.kind == Type::Data && is_paced(out.tunnel)) {
            return;
        }
        let now = Instant::now();
        let mut leaving = Vec::with_capacity(outgoing.len());
        let mut touched = Vec::new();
        for out in outgoing.drain(..) {
            // Messages are few, and keys wait for them.
            if out.kind != Type::Data || !is_paced(out.tunnel) {
                leaving.push(out);
                continue;
            }
            let place = self.spaced.iter().position(|spaced| spaced.tunnel == out.tunnel).unwrap_or_else(|| {
                let (pace, waiting) = (Pace::new(now), VecDeque::new());
                self.spaced.push(Spaced { tunnel: out.tunnel, pace, waiting, next: now });
                self.spaced.len() - 1
            });
            let spaced = &mut self.spaced[place];
            if !touched.contains(&place) {
                touched.push(place);
            }
            spaced.pace.count(1, now);
            spaced.waiting.push_back(out);
        }
        for place in touched {
            self.spaced[place].depart(now, &mut leaving);
        }
        *outgoing = leaving;
    }

    /// Time until something that waits may leave.
    pub(super) fn next_departure(&self) -> Duration {
        let next = self.spaced.iter().filter(|spaced| !spaced.waiting.is_empty()).map(|spaced| spaced.next).min();
        next.map_or(Duration::MAX, |next| next.saturating_duration_since(Instant::now()))
    }

    /// Sends what may leave now.
    pub(super) fn depart_in_time(&mut self) {
        if self.spaced.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut leaving = Vec::new();
        for spaced in self.spaced.iter_mut().filter(|spaced| spaced.next <= now) {
            spaced.depart(now, &mut leaving);
        }
        self.spaced.retain(|spaced| !spaced.waiting.is_empty() || now.saturating_duration_since(spaced.next) < IDLE);
        if !leaving.is_empty() {
            self.ship(&mut leaving);
        }
    }

    /// Sends what waits of a tunnel, which is paced no longer.
    pub(super) fn end_pacing(&mut self, number: u16) {
        let Some(place) = self.spaced.iter().position(|spaced| spaced.tunnel == number) else { return };
        let mut leaving = self.spaced.swap_remove(place).waiting.into();
        self.ship(&mut leaving);
        self.flush();
    }
}

impl Spaced {
    /// Moves what may leave now to `leaving`.
    fn depart(&mut self, now: Instant, leaving: &mut Vec<Outgoing>) {
        let due = self.pace.take(self.waiting.len(), now);
        leaving.extend(self.waiting.drain(..due));
        self.next = now + self.pace.gap();
    }
}
