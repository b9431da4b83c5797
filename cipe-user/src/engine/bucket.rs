//! Limits a rate, for example of the ICMP errors that a tunnel sends.

use std::time::{Duration, Instant};

/// Maximum ICMP messages at once.
const MAX_BURST: u32 = 50;
/// Time for one more: a thousand per second, the kernel's limit for its own ICMP messages (`icmp_msgs_per_sec`).
const REFILL_INTERVAL: Duration = Duration::from_millis(1);

/// A token bucket without a clock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    tokens: u32,
    /// Maximum events at once.
    burst: u32,
    /// Time for one more event.
    interval: Duration,
    /// When tokens were last added.
    filled: Instant,
}

impl Bucket {
    /// Creates a full bucket for ICMP messages.
    pub(super) fn new(now: Instant) -> Self {
        Self::with(MAX_BURST, REFILL_INTERVAL, now)
    }

    /// Creates a full bucket: for at most `burst` events at once, and one more per `interval`, which is not zero.
    pub(super) fn with(burst: u32, interval: Duration, now: Instant) -> Self {
        Self { tokens: burst, burst, interval, filled: now }
    }

    /// Takes a token. Returns `false` if there is none.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.filled);
        let earned = (since.as_nanos() / self.interval.as_nanos()).min(self.burst.into()) as u32;
        if earned >= self.burst - self.tokens {
            (self.tokens, self.filled) = (self.burst, now);
        } else {
            self.tokens += earned;
            self.filled += self.interval * earned;
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
        assert!(bucket.take(start + REFILL_INTERVAL));
    }
}
