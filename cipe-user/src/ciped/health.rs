//! Whether the peer still answers: pings, their deadlines, and the count of errors (protocol section 4).
//!
//! A state machine without clocks; times are since any fixed moment.

use std::time::Duration;

/// Intervals and limits, as in the options of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Between two CT_PINGs; zero: none are sent.
    pub ping: Duration,
    /// For the CT_PONG to come; zero: not waited for.
    pub toping: Duration,
    /// Errors between two key exchanges that are borne; `None`: any number.
    pub maxerr: Option<u32>,
}

/// What a passed deadline asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// A CT_PING stayed without an answer: see [`Health::error`].
    pub unanswered: bool,
    /// Send a CT_PING.
    pub ping: bool,
}

/// What an error led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// So many since the last exchange.
    Bear(u32),
    /// Too many.
    GiveUp(u32),
}

/// State of one tunnel.
#[derive(Clone, Debug)]
pub struct Health {
    limits: Limits,
    next_ping: Option<Duration>,
    answer_due: Option<Duration>,
    errors: u32,
}

impl Health {
    /// Starts at `now`; the first CT_PING comes one interval later.
    pub fn new(limits: Limits, now: Duration) -> Self {
        let mut health = Self { limits, next_ping: None, answer_due: None, errors: 0 };
        health.set_limits(limits, now);
        health
    }

    /// Replaces the limits; errors so far count on.
    pub fn set_limits(&mut self, limits: Limits, now: Duration) {
        self.limits = limits;
        self.next_ping = (!limits.ping.is_zero()).then(|| now + limits.ping);
        self.answer_due = None;
    }

    /// When [`Health::tick`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        [self.next_ping, self.answer_due].into_iter().flatten().min()
    }

    /// Takes note of the time.
    pub fn tick(&mut self, now: Duration) -> Due {
        let mut due = Due::default();
        if self.answer_due.is_some_and(|at| at <= now) {
            self.answer_due = None;
            due.unanswered = true;
        }
        if self.next_ping.is_some_and(|at| at <= now) {
            self.next_ping = Some(now + self.limits.ping);
            // A longer toping than ping judges the first of the unanswered.
            if !self.limits.toping.is_zero() && self.answer_due.is_none() {
                self.answer_due = Some(now + self.limits.toping);
            }
            due.ping = true;
        }
        due
    }

    /// A CT_PONG came.
    pub fn answered(&mut self) {
        self.answer_due = None;
    }

    /// A key was exchanged: errors count anew.
    pub fn exchanged(&mut self) {
        self.errors = 0;
    }

    /// A network error, or an unanswered CT_PING.
    pub fn error(&mut self) -> Verdict {
        self.errors = self.errors.saturating_add(1);
        match self.limits.maxerr {
            Some(most) if self.errors > most => Verdict::GiveUp(self.errors),
            _ => Verdict::Bear(self.errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn health(ping: u32, toping: u32, maxerr: Option<u32>) -> Health {
        Health::new(Limits { ping: ping * SECOND, toping: toping * SECOND, maxerr }, Duration::ZERO)
    }

    #[test]
    fn without_ping_nothing_is_ever_due() {
        assert_eq!(health(0, 5, Some(8)).deadline(), None);
    }

    #[test]
    fn pings_go_at_their_interval_and_unanswered_ones_are_found() {
        let mut health = health(10, 3, Some(8));
        assert_eq!(health.deadline(), Some(10 * SECOND));
        assert_eq!(health.tick(9 * SECOND), Due::default());
        assert_eq!(health.tick(10 * SECOND), Due { unanswered: false, ping: true });
        assert_eq!(health.deadline(), Some(13 * SECOND));
        assert_eq!(health.tick(13 * SECOND), Due { unanswered: true, ping: false });
        assert_eq!(health.deadline(), Some(20 * SECOND));
        assert_eq!(health.tick(20 * SECOND), Due { unanswered: false, ping: true });
        health.answered();
        assert_eq!(health.deadline(), Some(30 * SECOND));
    }

    #[test]
    fn without_toping_no_answer_is_missed() {
        let mut health = health(1, 0, Some(0));
        for second in 1..100 {
            assert!(!health.tick(second * SECOND).unanswered);
        }
    }

    #[test]
    fn a_toping_longer_than_ping_still_finds_a_dead_peer() {
        let mut health = health(1, 3, Some(8));
        let missed = (1..100).filter(|second| health.tick(*second * SECOND).unanswered).count();
        assert!(missed > 20, "{missed}");
    }

    #[test]
    fn errors_are_borne_up_to_maxerr_between_two_exchanges() {
        let mut strict = health(0, 0, Some(0));
        assert_eq!(strict.error(), Verdict::GiveUp(1));
        let mut usual = health(0, 0, Some(2));
        assert_eq!(usual.error(), Verdict::Bear(1));
        assert_eq!(usual.error(), Verdict::Bear(2));
        usual.exchanged();
        assert_eq!(usual.error(), Verdict::Bear(1));
        assert_eq!(usual.error(), Verdict::Bear(2));
        assert_eq!(usual.error(), Verdict::GiveUp(3));
        let mut patient = health(0, 0, None);
        assert!((0..1000).all(|_| matches!(patient.error(), Verdict::Bear(_))));
    }
}
