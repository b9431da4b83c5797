//! Rate limit for repeated log lines: only the 1st, 2nd, 4th, 8th and so on are written, so that neither a dead peer nor a
//! sender of forged datagrams can fill a log.

use std::time::Duration;

/// If a line does not repeat for this long, the next one counts as the first again.
const RESET_AFTER: Duration = Duration::from_secs(60);

/// Returns whether to log `total`: it is at least twice the total that was logged last (`told`).
pub const fn has_doubled(total: u64, told: u64) -> bool {
    total > 0 && total >= 2 * told
}

/// An event that may repeat.
#[derive(Clone, Copy, Debug, Default)]
pub struct Repeats {
    total: u64,
    told: u64,
    last: Option<Duration>,
}

impl Repeats {
    /// Counts the event once more, at `now`, on any clock. Returns the number of events so far if it should be logged.
    pub fn once_more(&mut self, now: Duration) -> Option<u64> {
        if self.last.replace(now).is_none_or(|last| now.saturating_sub(last) >= RESET_AFTER) {
            (self.total, self.told) = (0, 0);
        }
        self.total += 1;
        has_doubled(self.total, self.told).then(|| {
            self.told = self.total;
            self.total
        })
    }
}

/// Returns `line`, and adds the number of events so far if some of them were not logged.
pub fn counted(line: &str, total: u64) -> String {
    if total <= 2 { line.to_owned() } else { format!("{line}; {total} so far") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_doubling_of_the_count_is_logged() {
        let mut repeats = Repeats::default();
        let told: Vec<u64> = (0..1000).filter_map(|n| repeats.once_more(Duration::from_millis(n))).collect();
        assert_eq!(told, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    }

    #[test]
    fn a_rare_event_is_logged_each_time() {
        let mut repeats = Repeats::default();
        assert!((1..100).all(|n| repeats.once_more(n * RESET_AFTER) == Some(1)));
    }

    #[test]
    fn totals_that_grow_in_large_steps_are_logged() {
        assert!(!has_doubled(0, 0) && has_doubled(1000, 0) && !has_doubled(1999, 1000) && has_doubled(2000, 1000));
    }
}
