//! When to retransmit a message that has no answer.

use std::time::Duration;

/// The intervals of one tunnel.
#[derive(Clone, Copy)]
pub(super) struct Timing {
    /// Minimum time between two exchanges that the same side starts.
    pub tokxc: Duration,
}

impl Timing {
    /// The first wait before a round trip has been measured.
    const FIRST_WAIT: Duration = Duration::from_millis(250);
    /// Minimum first wait, even if the peer is near.
    const MIN_FIRST_WAIT: Duration = Duration::from_millis(20);

    pub(super) fn new(tokxc: Duration) -> Self {
        Self { tokxc: tokxc.max(Duration::from_secs(1)) }
    }

    /// How long a receiver keeps its previous key.
    pub(super) fn keep(self) -> Duration {
        (2 * self.tokxc).max(Duration::from_secs(3))
    }

    /// How long an unanswered message is retransmitted.
    pub(super) fn give_up(self) -> Duration {
        3 * self.tokxc
    }

    /// Maximum wait: short enough for a dozen attempts before [`Self::give_up`], so that an exchange succeeds on a path
    /// that loses one datagram in five.
    fn longest(self) -> Duration {
        self.tokxc / 4
    }
}

/// How long to wait for the first answer of an exchange, according to the round trips so far.
#[derive(Clone, Copy)]
pub(super) struct FirstWait {
    timing: Timing,
    wait: Duration,
}

impl FirstWait {
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, wait: Timing::FIRST_WAIT.min(timing.longest()) }
    }

    pub(super) fn get(self) -> Duration {
        self.wait
    }

    /// An answer came `after` the first message. If the message was `repeated`, it is unknown which one was answered
    /// (Karn's algorithm). Then the next wait is longer, until it is long enough to measure the round trip.
    pub(super) fn learn(&mut self, after: Duration, repeated: bool) {
        let wait = if repeated { 2 * self.wait } else { (4 * after).max(Timing::MIN_FIRST_WAIT) };
        self.wait = wait.min(self.timing.longest());
    }
}

/// A message that waits for its answer.
pub(super) struct Retry {
    timing: Timing,
    /// When it was sent first.
    pub started: Duration,
    /// When it is due again.
    pub next: Duration,
    wait: Duration,
    /// When it was sent last.
    sent: Duration,
    /// Whether it was sent more than once, so that an answer measures no round trip (Karn's algorithm).
    pub repeated: bool,
}

/// The action when the deadline is checked.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// The deadline has not passed.
    Wait,
    /// Send the message again.
    Again,
    /// It has been retransmitted often enough.
    GiveUp,
}

impl Retry {
    /// For a message that is sent at `now`, and retransmitted after `wait`.
    pub(super) fn new(timing: Timing, now: Duration, wait: Duration) -> Self {
        Self { timing, started: now, next: now + wait, wait, sent: now, repeated: false }
    }

    /// For a message that is not sent before `start`.
    pub(super) fn later(timing: Timing, start: Duration, wait: Duration) -> Self {
        Self { timing, started: start, next: start, wait: wait / 2, sent: Duration::ZERO, repeated: false }
    }

    /// Checks the deadline at `now`; the wait doubles each time.
    pub(super) fn due(&mut self, now: Duration) -> Due {
        if now < self.next {
            return Due::Wait;
        }
        if now >= self.started + self.timing.give_up() {
            return Due::GiveUp;
        }
        self.again(now);
        Due::Again
    }

    /// The message is retransmitted for another reason than its deadline.
    pub(super) fn again(&mut self, now: Duration) {
        self.wait = (2 * self.wait).min(self.timing.longest());
        self.next = (now + self.wait).min(self.started + self.timing.give_up()).max(now);
        (self.repeated, self.sent) = (true, now);
    }

    /// Whether the last message has had time to reach even a near peer, so that a retransmission is useful.
    pub(super) fn is_old(&self, now: Duration) -> bool {
        now >= self.sent + Timing::MIN_FIRST_WAIT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(tokxc: u64) -> Vec<u128> {
        let timing = Timing::new(Duration::from_secs(tokxc));
        let mut retry = Retry::new(timing, Duration::ZERO, FirstWait::new(timing).get());
        let mut at = Vec::new();
        loop {
            let now = retry.next;
            assert_eq!(retry.due(now - Duration::from_nanos(1)), Due::Wait);
            match retry.due(now) {
                Due::Again => at.push(now.as_millis()),
                Due::GiveUp => {
                    assert_eq!(now.as_secs(), 3 * tokxc.max(1));
                    return at;
                }
                Due::Wait => panic!("the deadline has passed"),
            }
        }
    }

    #[test]
    fn waits_double_up_to_a_quarter_of_tokxc() {
        assert_eq!(attempts(10)[..6], [250, 750, 1750, 3750, 6250, 8750]);
        assert_eq!(attempts(1), (1..12).map(|quarter| quarter * 250).collect::<Vec<_>>());
    }

    #[test]
    fn a_near_peer_is_asked_again_sooner_and_a_far_one_later() {
        let timing = Timing::new(Duration::from_secs(10));
        for (round_trip, wait) in [(0, 20), (30, 120), (300, 1_200), (9_000, 2_500)] {
            let mut first = FirstWait::new(timing);
            first.learn(Duration::from_millis(round_trip), false);
            assert_eq!(first.get().as_millis(), wait);
        }
    }

    #[test]
    fn a_round_trip_beyond_the_first_wait_is_learned_after_some_exchanges() {
        let timing = Timing::new(Duration::from_secs(10));
        let mut first = FirstWait::new(timing);
        let round_trip = Duration::from_millis(700);
        let repeated: Vec<bool> = (0..5)
            .map(|_| {
                let repeated = first.get() < round_trip;
                first.learn(round_trip, repeated);
                repeated
            })
            .collect();
        assert_eq!(repeated, [true, true, false, false, false]);
        assert_eq!(first.get(), timing.longest(), "four round trips are more than the longest wait");
    }

    #[test]
    fn a_tokxc_of_zero_does_not_spin() {
        assert!(!attempts(0).is_empty());
    }
}
