//! Spacing of what leaves for a peer that may be an original: its receive buffer of 64 KiB holds 28 full datagrams, and what one
//! superframe of the local stack becomes is 45 of them.
//!
//! A bucket of tokens, as the kernel's fq scheduler has it: a few datagrams leave at once, the others with gaps between them, somewhat
//! faster than they come on average, so that the spacing holds up none for long. What waits is bounded; beyond that
//! datagrams leave without a gap, as without all this: spacing never drops one and never limits the rate.

use std::time::{Duration, Instant};

/// Datagrams that leave at once at most.
const BURST: usize = 16;

/// Datagrams that wait at most.
pub(super) const MOST_WAITING: usize = 256;

/// Times of the average rate that datagrams leave at.
const AHEAD: f64 = 1.5;

/// Datagrams a second that leave in any case: what the first burst after a silence is spread over.
const LEAST_RATE: f64 = 10_000.0;

/// What the average is taken over.
const MEMORY: Duration = Duration::from_millis(20);

/// Gaps are not shorter: to wake a worker takes as long.
const SHORTEST_GAP: Duration = Duration::from_micros(100);

/// The spacing of one tunnel's datagrams.
#[derive(Debug)]
pub(super) struct Pace {
    /// Datagrams a second that came, on average.
    rate: f64,
    counted: Instant,
    /// Datagrams that may leave.
    tokens: f64,
    filled: Instant,
}

impl Pace {
    /// Of a tunnel that has sent nothing yet.
    pub(super) fn new(now: Instant) -> Self {
        Self { rate: 0.0, counted: now, tokens: BURST as f64, filled: now }
    }

    /// Counts datagrams that come to be sent.
    pub(super) fn count(&mut self, datagrams: usize, now: Instant) {
        let passed = now.saturating_duration_since(self.counted).as_secs_f64();
        let memory = MEMORY.as_secs_f64();
        self.rate = self.rate * (-passed / memory).exp() + datagrams as f64 / memory;
        self.counted = now;
    }

    /// How many of `waiting` datagrams leave now.
    pub(super) fn take(&mut self, waiting: usize, now: Instant) -> usize {
        let passed = now.saturating_duration_since(self.filled).as_secs_f64();
        self.filled = now;
        self.tokens = (self.tokens + passed * self.out_rate()).min(BURST as f64);
        let due = waiting.min(self.tokens as usize);
        self.tokens -= due as f64;
        due.max(waiting.saturating_sub(MOST_WAITING))
    }

    /// When to look again, if some wait.
    pub(super) fn gap(&self) -> Duration {
        let wanted = (BURST as f64 / 2.0 - self.tokens).max(1.0);
        Duration::from_secs_f64(wanted / self.out_rate()).max(SHORTEST_GAP)
    }

    fn out_rate(&self) -> f64 {
        (self.rate * AHEAD).max(LEAST_RATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lets `burst` datagrams come each `interval` for half a second; returns the most that left within a millisecond, and the
    /// longest queue at the end of an interval, once the average is known.
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
        // 27 Mbit/s in superframes: 45 datagrams each 20 ms.
        let (most, waiting) = run(45, Duration::from_millis(20));
        assert!(most <= 26, "{most} within a millisecond");
        assert_eq!(waiting, 0, "all have left before the next superframe");
    }

    #[test]
    fn what_comes_fast_leaves_as_fast() {
        for (burst, micros) in [(45, 1000), (45, 300), (128, 1000), (5, 50)] {
            let (_, waiting) = run(burst, Duration::from_micros(micros));
            assert!(waiting < 2 * burst.max(BURST), "{burst} each {micros} µs: {waiting} wait");
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
        assert_eq!(pace.take(1000, start), 1000 - MOST_WAITING);
        assert!(pace.gap() <= Duration::from_millis(1));
    }
}
