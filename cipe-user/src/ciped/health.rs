//! Whether the peer answers: pings, their deadlines, and the count of errors (protocol section 4).
//!
//! A state machine without clocks; times are relative to any fixed moment.

use std::time::Duration;

/// Intervals and limits, as in the options of the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthOptions {
    /// Between two CT_PINGs; zero: none are sent.
    pub ping: Duration,
    /// How long to wait for the CT_PONG; zero: no wait.
    pub toping: Duration,
    /// Errors that are tolerated while no message of the peer's comes; `None`: any number.
    pub maxerr: Option<u32>,
}

/// The actions when the deadline has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Due {
    /// A CT_PING had no answer: see [`Health::error`].
    pub unanswered: bool,
    /// Several in a row had no answer, and nothing else came from the peer for so long that it may have other keys than
    /// we assume.
    pub silent: bool,
    /// Send a CT_PING.
    pub ping: bool,
    /// The peer did not answer after too many network errors: give up. The number of errors.
    pub gone: Option<u32>,
}

/// The result of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorAction {
    /// Tolerated; the number of errors since the last message of the peer.
    Tolerate(u32),
    /// Too many: the number of errors.
    GiveUp(u32),
    /// Too many network errors, which may be forged: ask the peer before giving up. The number of errors.
    AskPeer(u32),
}

/// State of one tunnel.
#[derive(Clone, Debug)]
pub struct Health {
    limits: HealthOptions,
    next_ping: Option<Duration>,
    answer_due: Option<Duration>,
    errors: u32,
    /// Unanswered CT_PINGs in a row.
    unanswered: u32,
    /// Minimum silence after which the peer's keys are in doubt.
    min_silence: Duration,
    /// When they are in doubt next, and the wait after that.
    doubt: (Duration, Duration),
    /// Set while the peer is asked for a last time, after too many network errors.
    last_call: Option<LastCall>,
}

/// The CT_PINGs of the last call, whose answer decides whether to give up.
#[derive(Clone, Copy, Debug)]
struct LastCall {
    next_ping: Duration,
    ends: Duration,
}

/// Number of CT_PINGs in the last call, and the interval between them.
const LAST_PINGS: u32 = 5;
const LAST_PING_INTERVAL: Duration = Duration::from_secs(1);

/// One unanswered CT_PING may be a lost datagram; this many in a row mean that the peer cannot open our packets.
const MIN_UNANSWERED_PINGS: u32 = 2;

impl Health {
    /// Starts at `now`; the first CT_PING comes one interval later. Keys are in doubt after `min_silence` (tokxc) of
    /// silence, and each further time after twice the wait before.
    pub fn new(limits: HealthOptions, min_silence: Duration, now: Duration) -> Self {
        let doubt = (now + min_silence, min_silence);
        let mut health = Self {
            limits,
            next_ping: None,
            answer_due: None,
            errors: 0,
            unanswered: 0,
            min_silence,
            doubt,
            last_call: None,
        };
        health.set_limits(limits, now);
        health
    }

    /// Replaces the limits; the count of errors continues.
    pub fn set_limits(&mut self, limits: HealthOptions, now: Duration) {
        self.limits = limits;
        self.next_ping = (!limits.ping.is_zero()).then(|| now + limits.ping);
        self.answer_due = None;
    }

    /// When [`Health::tick`] is due.
    pub fn deadline(&self) -> Option<Duration> {
        let last_call = self.last_call.map(|call| call.next_ping.min(call.ends));
        [self.next_ping, self.answer_due, last_call].into_iter().flatten().min()
    }

    /// Checks the deadlines at `now`.
    pub fn tick(&mut self, now: Duration) -> Due {
        let mut due = Due::default();
        if self.answer_due.is_some_and(|at| at <= now) {
            self.answer_due = None;
            self.unanswered = self.unanswered.saturating_add(1);
            due.unanswered = true;
            let (at, wait) = self.doubt;
            if self.unanswered >= MIN_UNANSWERED_PINGS && at <= now {
                self.doubt = (now + wait, wait.saturating_mul(2));
                due.silent = true;
            }
        }
        if self.next_ping.is_some_and(|at| at <= now) {
            self.next_ping = Some(now + self.limits.ping);
            // If toping is longer than ping, it applies to the first of the unanswered pings.
            if !self.limits.toping.is_zero() && self.answer_due.is_none() {
                self.answer_due = Some(now + self.limits.toping);
            }
            due.ping = true;
        }
        if let Some(call) = &mut self.last_call {
            if call.ends <= now {
                self.last_call = None;
                due.gone = Some(self.errors);
            } else if call.next_ping <= now {
                call.next_ping = now + LAST_PING_INTERVAL;
                due.ping = true;
            }
        }
        due
    }

    /// A CT_PONG came.
    pub fn answered(&mut self) {
        self.answer_due = None;
    }

    /// A message of the peer's came: the count of errors starts again.
    pub fn heard(&mut self, now: Duration) {
        (self.errors, self.unanswered, self.last_call) = (0, 0, None);
        self.doubt = (now + self.min_silence, self.min_silence);
    }

    /// A network error at `now`. `heard`: an authentic packet has come from the peer since the last one.
    ///
    /// Anybody can forge ICMP errors, so they alone never end the tunnel: after more than `maxerr` errors, the peer is
    /// asked.
    pub fn network_error(&mut self, heard: bool, now: Duration) -> ErrorAction {
        if heard {
            self.heard(now);
        }
        self.errors = self.errors.saturating_add(1);
        match self.limits.maxerr {
            Some(most) if self.errors > most && self.last_call.is_none() => {
                self.last_call = Some(LastCall { next_ping: now, ends: now + LAST_PINGS * LAST_PING_INTERVAL });
                ErrorAction::AskPeer(self.errors)
            }
            _ => ErrorAction::Tolerate(self.errors),
        }
    }

    /// An unanswered CT_PING.
    pub fn error(&mut self) -> ErrorAction {
        self.errors = self.errors.saturating_add(1);
        match self.limits.maxerr {
            Some(most) if self.errors > most => ErrorAction::GiveUp(self.errors),
            _ => ErrorAction::Tolerate(self.errors),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn health(ping: u32, toping: u32, maxerr: Option<u32>) -> Health {
        Health::new(HealthOptions { ping: ping * SECOND, toping: toping * SECOND, maxerr }, 10 * SECOND, Duration::ZERO)
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
        assert_eq!(health.tick(10 * SECOND), Due { ping: true, ..Due::default() });
        assert_eq!(health.deadline(), Some(13 * SECOND));
        assert_eq!(health.tick(13 * SECOND), Due { unanswered: true, ..Due::default() });
        assert_eq!(health.deadline(), Some(20 * SECOND));
        assert_eq!(health.tick(20 * SECOND), Due { ping: true, ..Due::default() });
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
    fn errors_are_borne_up_to_maxerr_while_the_peer_is_not_heard() {
        let mut strict = health(0, 0, Some(0));
        assert_eq!(strict.error(), ErrorAction::GiveUp(1));
        let mut usual = health(0, 0, Some(2));
        assert_eq!(usual.error(), ErrorAction::Tolerate(1));
        assert_eq!(usual.error(), ErrorAction::Tolerate(2));
        usual.heard(SECOND);
        assert_eq!(usual.error(), ErrorAction::Tolerate(1));
        assert_eq!(usual.error(), ErrorAction::Tolerate(2));
        assert_eq!(usual.error(), ErrorAction::GiveUp(3));
        let mut patient = health(0, 0, None);
        assert!((0..1000).all(|_| matches!(patient.error(), ErrorAction::Tolerate(_))));
    }

    #[test]
    fn network_errors_alone_end_nothing_while_the_peer_answers() {
        let mut health = health(0, 0, Some(1));
        for second in 0..1000 {
            let now = second * SECOND;
            health.network_error(false, now);
            let due = health.tick(now);
            assert_eq!(due.gone, None);
            if due.ping {
                health.heard(now);
            }
        }
    }

    #[test]
    fn data_from_the_peer_sets_the_count_of_network_errors_back() {
        let mut health = health(0, 0, Some(1));
        assert!((0..1000).all(|second| health.network_error(true, second * SECOND) == ErrorAction::Tolerate(1)));
    }

    #[test]
    fn a_peer_that_answers_none_of_the_last_pings_is_given_up() {
        let mut health = health(0, 0, Some(1));
        assert_eq!(health.network_error(false, SECOND), ErrorAction::Tolerate(1));
        assert_eq!(health.deadline(), None);
        assert_eq!(health.network_error(false, SECOND), ErrorAction::AskPeer(2));
        let mut pings = 0;
        for second in 1.. {
            assert!(health.deadline().is_some_and(|at| at <= second * SECOND));
            let due = health.tick(second * SECOND);
            pings += u32::from(due.ping);
            if due.gone.is_some() {
                assert_eq!((due.gone, second, pings), (Some(3), 6, LAST_PINGS));
                break;
            }
            if second == 2 {
                assert_eq!(health.network_error(false, 2 * SECOND), ErrorAction::Tolerate(3));
            }
        }
    }

    #[test]
    fn keys_are_doubted_when_several_pings_stay_unanswered_and_ever_more_seldom() {
        let mut health = health(2, 2, None);
        let mut doubts = Vec::new();
        for second in 1..=200 {
            if health.tick(second * SECOND).silent {
                doubts.push(second);
            }
            if second == 100 {
                health.heard(second * SECOND);
            }
        }
        assert_eq!(doubts, [10, 20, 40, 80, 110, 120, 140, 180]);
    }

    #[test]
    fn one_lost_ping_casts_no_doubt_on_the_keys() {
        let mut health = health(60, 5, None);
        for second in 1..1000 {
            let now = second * SECOND;
            assert!(!health.tick(now).silent);
            // Every other ping is answered.
            if second % 120 == 1 {
                health.answered();
                health.heard(now);
            }
        }
    }
}
