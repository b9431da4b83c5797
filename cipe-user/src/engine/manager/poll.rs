//! When to poll what the kernel does not notify of.

use std::time::{Duration, Instant};

/// Lets a poll happen at most once per interval.
pub(super) struct PollTimer {
    interval: Duration,
    last: Option<Instant>,
}

impl PollTimer {
    /// The first poll is due at once.
    pub(super) fn new(interval: Duration) -> Self {
        Self { interval, last: None }
    }

    /// Whether a poll is due at `now`; if so, the next one is due an interval later.
    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.last.is_none_or(|last| now.duration_since(last) >= self.interval);
        if is_due {
            self.last = Some(now);
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_poll_is_due_at_once_and_then_after_each_interval() {
        let (mut timer, start) = (PollTimer::new(Duration::from_secs(5)), Instant::now());
        let due = (0..=12).filter(|second| timer.is_due(start + Duration::from_secs(*second)));
        assert_eq!(due.collect::<Vec<_>>(), [0, 5, 10]);
    }
}
