//! Paces the datagrams to a peer that may be an original: its receive buffer of 64 KiB holds 28 full datagrams, while
//! one superframe of the local stack becomes 45.
//!
//! A token bucket, as in the kernel's fq scheduler: a few datagrams are sent at once, the others with gaps, at a rate
//! somewhat above the average, so that no datagram waits long. The queue is bounded; if it is full, datagrams are sent
//! without a gap. So pacing never drops a datagram and never limits the rate.

use std::time::{Duration, Instant};

/// Maximum datagrams that are sent at once.
const MAX_BURST: usize = 16;

/// Maximum queued datagrams.
pub(super) const MAX_QUEUED: usize = 256;

/// Ratio of the sending rate to the average rate.
const RATE_FACTOR: f64 = 1.5;

/// Minimum sending rate in datagrams per second; it applies to the first burst after a silence.
const MIN_RATE: f64 = 10_000.0;

/// Time constant of the average.
const AVERAGING_TIME: Duration = Duration::from_millis(20);

/// Minimum gap: a wake-up of a worker takes about as long.
const MIN_GAP: Duration = Duration::from_micros(100);

/// The pacing of one tunnel's datagrams.
#[derive(Debug)]
pub(super) struct Pace {
    /// Average rate of new datagrams, per second.
    rate: f64,
    counted: Instant,
    /// Number of datagrams that may be sent now.
    tokens: f64,
    filled: Instant,
}

impl Pace {
    /// Creates the state of a tunnel that has sent nothing yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { rate: 0.0, counted: now, tokens: MAX_BURST as f64, filled: now }
    }

    /// Counts new datagrams.
    pub(super) fn count(&mut self, datagrams: usize, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_secs_f64();
        let memory = AVERAGING_TIME.as_secs_f64();
        self.rate = self.rate * (-passed / memory).exp() + datagrams as f64 / memory;
        self.counted = now;
    }

    /// Returns how many of `waiting` datagrams to send now.
    pub(super) fn take(&mut self, waiting: usize, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + passed * self.out_rate()).min(MAX_BURST as f64);
        let due = waiting.min(self.tokens as usize);
        self.tokens -= due as f64;
        due.max(waiting.saturating_sub(MAX_QUEUED))
    }

    /// Returns the time until more can be sent.
    pub(super) fn gap(&self) -> Duration {
        let wanted = (MAX_BURST as f64 / 2.0 - self.tokens).max(1.0);
        Duration::from_secs_f64(wanted / self.out_rate()).max(MIN_GAP)
    }

    fn out_rate(&self) -> f64 {
        (self.rate * RATE_FACTOR).max(MIN_RATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Adds `burst` datagrams every `interval` for half a second. Returns the maximum number sent within a millisecond,
    /// and the maximum queue length at the end of an interval, once the average is known.
    fn run(burst: usize, interval: Duration) -> (usize, usize) {
        let start = Instant::now();
        let (mut pace, mut now, mut waiting) = (Pace::new(start), start, 0);
        let (mut departures, mut longest) = (Vec::new(), 0);
        while now < start + Duration::from_millis(500) {
            let next = now + interval;
            pace.count(burst, now);
            waiting += burst;
            loop {
                let due = pace.take(waiting, now);
                waiting -= due;
                departures.push((now, due));
                if waiting == 0 || now + pace.gap() >= next {
                    break;
                }
                now += pace.gap();
            }
            if next > start + Duration::from_millis(100) {
                longest = longest.max(waiting);
            }
            now = next;
        }
        let within = |(place, (at, _)): (usize, &(Instant, usize))| {
            let later = departures[place..].iter();
            later
                .take_while(|(other, _)| other.duration_since(*at) < Duration::from_millis(1))
                .map(|(_, due)| due)
                .sum()
        };
        (departures.iter().enumerate().map(within).max().unwrap_or(0), longest)
    }

    #[test]
    fn a_superframe_leaves_in_pieces_that_a_small_buffer_takes() {
        // 27 Mbit/s in superframes: 45 datagrams every 20 ms.
        let (most, waiting) = run(45, Duration::from_millis(20));
        assert!(most <= 26, "{most} within a millisecond");
        assert_eq!(waiting, 0, "all have left before the next superframe");
    }

    #[test]
    fn what_comes_fast_leaves_as_fast() {
        for (burst, micros) in [(45, 1000), (45, 300), (128, 1000), (5, 50)] {
            let (_, waiting) = run(burst, Duration::from_micros(micros));
            assert!(waiting < 2 * burst.max(MAX_BURST), "{burst} each {micros} µs: {waiting} wait");
        }
    }

    #[test]
    fn single_datagrams_do_not_wait() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        for ms in 0..1000 {
            let now = start + Duration::from_millis(ms);
            pace.count(1, now);
            assert_eq!(pace.take(1, now), 1);
        }
    }

    #[test]
    fn what_waits_is_bounded_and_nothing_is_held_back_beyond() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.count(1000, start);
        assert_eq!(pace.take(1000, start), 1000 - MAX_QUEUED);
        assert!(pace.gap() <= Duration::from_millis(1));
    }
}
