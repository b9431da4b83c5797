//! Queues the sealed datagrams of paced tunnels until they may be sent ([`Pace`]).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::Worker;
use crate::engine::datapath::{Form, Outgoing};
use crate::engine::pace::Pace;
use crate::wire::packet::Type;

/// The queue of one tunnel.
pub(super) struct PacedQueue {
    tunnel: u16,
    pace: Pace,
    queue: VecDeque<Outgoing>,
    /// When more may be sent.
    next: Instant,
}

/// A queue that has been empty for so long is removed: its tunnel may send a burst again anyway.
const MAX_EMPTY_TIME: Duration = Duration::from_secs(1);

impl Worker {
    /// Moves the datagrams of paced tunnels that may not be sent yet to their queues.
    pub(super) fn queue_paced(&mut self, outgoing: &mut Vec<Outgoing>) {
        // Who opens sealed packets runs this program. Messages are few, and the key exchange waits for them.
        let tunnels = &self.datapath.tunnels;
        let is_paced = |out: &Outgoing| {
            let may_be = out.kind == Type::Data && out.form != Form::Sealed;
            may_be && tunnels.get(&out.tunnel).is_some_and(|tunnel| tunnel.paced)
        };
        if !outgoing.iter().any(is_paced) {
            return;
        }
        let now = Instant::now();
        let mut leaving = Vec::with_capacity(outgoing.len());
        let mut touched = Vec::new();
        for out in outgoing.drain(..) {
            if !is_paced(&out) {
                leaving.push(out);
                continue;
            }
            let place = self.paced.iter().position(|paced| paced.tunnel == out.tunnel).unwrap_or_else(|| {
                let (pace, queue) = (Pace::new(now), VecDeque::new());
                self.paced.push(PacedQueue { tunnel: out.tunnel, pace, queue, next: now });
                self.paced.len() - 1
            });
            let paced = &mut self.paced[place];
            if !touched.contains(&place) {
                touched.push(place);
            }
            paced.pace.count(1, now);
            paced.queue.push_back(out);
        }
        for place in touched {
            self.paced[place].dequeue_due(now, &mut leaving);
        }
        *outgoing = leaving;
    }

    /// Returns the time until a queued datagram may be sent.
    pub(super) fn next_paced(&self) -> Duration {
        let next = self.paced.iter().filter(|paced| !paced.queue.is_empty()).map(|paced| paced.next).min();
        next.map_or(Duration::MAX, |next| next.saturating_duration_since(Instant::now()))
    }

    /// Sends the queued datagrams that may be sent now.
    pub(super) fn send_due(&mut self) {
        if self.paced.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut leaving = Vec::new();
        for paced in self.paced.iter_mut().filter(|paced| paced.next <= now) {
            paced.dequeue_due(now, &mut leaving);
        }
        self.paced
            .retain(|paced| !paced.queue.is_empty() || now.saturating_duration_since(paced.next) < MAX_EMPTY_TIME);
        if !leaving.is_empty() {
            self.transmit(&mut leaving);
        }
    }

    /// Sends the whole queue of a tunnel, which is no longer paced.
    pub(super) fn end_pacing(&mut self, number: u16) {
        let Some(place) = self.paced.iter().position(|paced| paced.tunnel == number) else { return };
        let mut leaving = self.paced.swap_remove(place).queue.into();
        self.transmit(&mut leaving);
        self.flush();
    }
}

impl PacedQueue {
    /// Moves the datagrams that may be sent now to `leaving`.
    fn dequeue_due(&mut self, now: Instant, leaving: &mut Vec<Outgoing>) {
        let due = self.pace.take(self.queue.len(), now);
        leaving.extend(self.queue.drain(..due));
        self.next = now + self.pace.gap();
    }
}
