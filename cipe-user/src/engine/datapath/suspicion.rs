//! Whether so many datagrams cannot be decrypted that it pays to look at their ends first.

use std::time::{Duration, Instant};

/// What one failure adds: the level stays as it is at 500 failures a second. So few are not worth a look at every datagram, nor a
/// shield in the programs.
const FAILURE: Duration = Duration::from_millis(2);

/// Decrypted packets that outweigh one failure. Two blocks more for each packet cost less than the rest of a failed one
/// from about this ratio on.
const FAILURE_WEIGHT: u32 = 32;

/// Level from which on the ends are looked at: a full batch of failures, or fewer that come again and again.
const ON: Duration = FAILURE.saturating_mul(64);

/// The most that failures can add up to, so that the end of a flood is noticed soon.
const MAX: Duration = ON.saturating_mul(2);

/// The balance of the last failures and successes of one worker. Between [`ON`] and zero it stays as it was, so that it does not
/// change all the time.
#[derive(Debug)]
pub(super) struct Suspicion {
    /// The time until it is over, if nothing comes.
    level: Duration,
    counted: Instant,
    is_on: bool,
}

impl Suspicion {
    /// None.
    pub(super) fn new(now: Instant) -> Self {
        Self { level: Duration::ZERO, counted: now, is_on: false }
    }

    /// Whether to look at the ends of datagrams first.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Counts the datagrams of a batch: those that no key has opened, and the others.
    pub(super) fn count(&mut self, failed: usize, others: usize, now: Instant) {
        let factor = |count: usize| count.min(1 << 20) as u32;
        self.level = self.level.saturating_sub(now.saturating_duration_since(self.counted));
        self.counted = now;
        self.level = (self.level + FAILURE * factor(failed)).min(MAX);
        self.level = self.level.saturating_sub(FAILURE / FAILURE_WEIGHT * factor(others));
        self.is_on = self.level >= ON || self.is_on && !self.level.is_zero();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Packets that outweigh the highest level.
    const OUTWEIGH: usize = 2 * 64 * FAILURE_WEIGHT as usize;

    #[test]
    fn a_flood_raises_it_and_the_packets_after_it_end_it() {
        let now = Instant::now();
        let mut suspicion = Suspicion::new(now);
        suspicion.count(63, 0, now);
        assert!(!suspicion.is_on());
        suspicion.count(1, 0, now);
        assert!(suspicion.is_on());
        suspicion.count(usize::MAX, 0, now);
        suspicion.count(0, OUTWEIGH - 1, now);
        assert!(suspicion.is_on());
        suspicion.count(0, 1, now);
        assert!(!suspicion.is_on());
        suspicion.count(1_000_000, usize::MAX, now);
        assert!(!suspicion.is_on());
    }

    #[test]
    fn damage_now_and_then_never_raises_it() {
        let now = Instant::now();
        let mut suspicion = Suspicion::new(now);
        for _ in 0..100_000 {
            suspicion.count(1, FAILURE_WEIGHT as usize, now);
            assert!(!suspicion.is_on());
        }
    }

    #[test]
    fn it_stays_while_more_fails_than_it_costs() {
        let now = Instant::now();
        let mut suspicion = Suspicion::new(now);
        suspicion.count(64, 0, now);
        for _ in 0..100_000 {
            suspicion.count(1, FAILURE_WEIGHT as usize - 1, now);
            assert!(suspicion.is_on());
        }
    }

    #[test]
    fn a_slow_trickle_never_raises_it_and_a_pause_ends_it() {
        let start = Instant::now();
        let mut suspicion = Suspicion::new(start);
        for second in 0..1000 {
            suspicion.count(63, 0, start + Duration::from_secs(second));
            assert!(!suspicion.is_on());
        }
        let mut now = start + Duration::from_secs(1000);
        suspicion.count(64, 0, now);
        for _ in 0..100_000 {
            now += Duration::from_millis(1);
            suspicion.count(1, 0, now);
            assert!(suspicion.is_on(), "1000 a second are a flood");
        }
        suspicion.count(0, 0, now + MAX);
        assert!(!suspicion.is_on());
    }
}
