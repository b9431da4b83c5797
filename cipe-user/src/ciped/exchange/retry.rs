//! When a message without an answer is sent again.

use std::time::Duration;

/// The intervals of one tunnel.
#[derive(Clone, Copy)]
pub(super) struct Timing {
    /// Least time between two exchanges that the same side starts.
    pub tokxc: Duration,
}

impl Timing {
    /// The first wait while no round trip has been measured.
    const FIRST: Duration = Duration::from_millis(250);
    /// The shortest first wait, however near the peer is.
    const SHORTEST: Duration = Duration::from_millis(20);

    pub fn new(tokxc: Duration) -> Self {
        Self { tokxc: tokxc.max(Duration::from_secs(1)) }
    }

    /// How long a receiver keeps its previous key.
    pub fn keep(self) -> Duration {
        (2 * self.tokxc).max(Duration::from_secs(3))
    }

    /// How long an unanswered message is sent again.
    pub fn give_up(self) -> Duration {
        3 * self.tokxc
    }

    /// The longest wait: short enough for a dozen attempts before [`Self::give_up`], so that a path that loses one
    /// datagram in five is got through.
    fn longest(self) -> Duration {
        self.tokxc / 4
    }

    fn first(self, round_trip: Option<Duration>) -> Duration {
        round_trip.map_or(Self::FIRST, |time| (4 * time).clamp(Self::SHORTEST, Self::FIRST)).min(self.longest())
    }
}

/// One message that waits for its answer.
pub(super) struct Retry {
    timing: Timing,
    /// When it was sent first.
    pub started: Duration,
    /// When it is due again.
    pub next: Duration,
    wait: Duration,
    /// When it was sent last.
    sent: Duration,
    /// Whether it was sent more than once, so that an answer tells no round trip (Karn).
    pub repeated: bool,
}

/// What a passed deadline asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Not passed yet.
    Wait,
    /// Send the message again.
    Again,
    /// It was sent often enough.
    GiveUp,
}

impl Retry {
    /// For a message that is sent at `now`, to a peer as far as `round_trip`.
    pub fn new(timing: Timing, now: Duration, round_trip: Option<Duration>) -> Self {
        let wait = timing.first(round_trip);
        Self { timing, started: now, next: now + wait, wait, sent: now, repeated: false }
    }

    /// For a message that is not sent before `start`.
    pub fn later(timing: Timing, start: Duration) -> Self {
        Self {
            timing,
            started: start,
            next: start,
            wait: timing.first(None) / 2,
            sent: Duration::ZERO,
            repeated: false,
        }
    }

    /// Takes note of the time; the wait doubles each time.
    pub fn due(&mut self, now: Duration) -> Due {
        if now < self.next {
            return Due::Wait;
        }
        if now >= self.started + self.timing.give_up() {
            return Due::GiveUp;
        }
        self.again(now);
        Due::Again
    }

    /// The message is sent again for another reason than its deadline.
    pub fn again(&mut self, now: Duration) {
        self.wait = (2 * self.wait).min(self.timing.longest());
        self.next = (now + self.wait).min(self.started + self.timing.give_up()).max(now);
        (self.repeated, self.sent) = (true, now);
    }

    /// Whether the last one has had the time to reach even a near peer, so that sending it again makes sense.
    pub fn is_old(&self, now: Duration) -> bool {
        now >= self.sent + Timing::SHORTEST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(tokxc: u64) -> Vec<u128> {
        let mut retry = Retry::new(Timing::new(Duration::from_secs(tokxc)), Duration::ZERO, None);
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
    fn a_near_peer_is_asked_again_sooner() {
        let timing = Timing::new(Duration::from_secs(10));
        assert_eq!(timing.first(Some(Duration::from_millis(30))), Duration::from_millis(120));
        assert_eq!(timing.first(Some(Duration::ZERO)), Timing::SHORTEST);
        assert_eq!(timing.first(Some(Duration::from_secs(9))), Timing::FIRST);
    }

    #[test]
    fn a_tokxc_of_zero_does_not_spin() {
        assert!(!attempts(0).is_empty());
    }
}
