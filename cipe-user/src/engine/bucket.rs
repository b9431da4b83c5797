//! Limits a rate, such as that of the replies that a tunnel sends.

use std::time::{Duration, Instant};

/// Events that may happen at once.
const BURST: u32 = 50;
/// Time in which one more may happen: a thousand a second, as the kernel limits its own (`icmp_msgs_per_sec`).
const ONE: Duration = Duration::from_millis(1);

/// A token bucket that knows no clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    tokens: u32,
    /// Up to when tokens have been put in.
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub(super) fn new(now: Instant) -> Self {
        Self { tokens: BURST, filled: now }
    }

    /// Takes a token out, if there is one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.filled);
        let earned = (since.as_nanos() / ONE.as_nanos()).min(BURST.into()) as u32;
        if earned >= BURST - self.tokens {
            (self.tokens, self.filled) = (BURST, now);
        } else {
            self.tokens += earned;
            self.filled += ONE * earned;
        }
        let taken = self.tokens > 0;
        self.tokens -= u32::from(taken);
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_then_one_a_millisecond() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        assert_eq!((0..100).filter(|_| bucket.take(start)).count(), 50);
        let passed = (0..10_000).filter(|tenth| bucket.take(start + Duration::from_micros(tenth * 100))).count();
        assert_eq!(passed, 999);
    }

    #[test]
    fn rest_fills_it_up_and_never_over() {
        let start = Instant::now();
        let mut bucket = Bucket::new(start);
        while bucket.take(start) {}
        let later = start + Duration::from_secs(1_000_000);
        assert_eq!((0..100).filter(|_| bucket.take(later)).count(), 50);
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_earns_nothing() {
        let start = Instant::now() + Duration::from_secs(10);
        let mut bucket = Bucket::new(start);
        while bucket.take(start) {}
        assert!(!bucket.take(start - Duration::from_secs(5)));
        assert!(!bucket.take(start));
        assert!(bucket.take(start + ONE));
    }
}
