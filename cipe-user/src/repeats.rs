//! Which of the log lines that say the same again are written: the 1st, 2nd, 4th, 8th ..., so that neither a dead peer nor
//! whoever can make datagrams fills a log.

use std::time::Duration;

/// After so long without another one, the next one is the first again.
const QUIET: Duration = Duration::from_secs(60);

/// Whether `total` is to be told, given the total that was `told` last.
pub const fn has_doubled(total: u64, told: u64) -> bool {
    total > 0 && total >= 2 * told
}

/// One thing that may happen again and again.
#[derive(Clone, Copy, Debug, Default)]
pub struct Repeats {
    total: u64,
    told: u64,
    last: Option<Duration>,
}

impl Repeats {
    /// It happened once more, at `now`, on any clock. How often so far, if that is to be told.
    pub fn once_more(&mut self, now: Duration) -> Option<u64> {
        if self.last.replace(now).is_none_or(|last| now.saturating_sub(last) >= QUIET) {
            (self.total, self.told) = (0, 0);
        }
        self.total += 1;
        has_doubled(self.total, self.told).then(|| {
            self.told = self.total;
            self.total
        })
    }
}

/// `line`, and how often that was so far if some times before were not told.
pub fn counted(line: &str, total: u64) -> String {
    if total <= 2 { line.to_owned() } else { format!("{line}; {total} so far") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_time_that_the_count_has_doubled_is_told() {
        let mut repeats = Repeats::default();
        let told: Vec<u64> = (0..1000).filter_map(|n| repeats.once_more(Duration::from_millis(n))).collect();
        assert_eq!(told, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
    }

    #[test]
    fn what_happens_seldom_is_told_each_time() {
        let mut repeats = Repeats::default();
        assert!((1..100).all(|n| repeats.once_more(n * QUIET) == Some(1)));
    }

    #[test]
    fn totals_that_grow_by_many_are_told_too() {
        assert!(!has_doubled(0, 0) && has_doubled(1000, 0) && !has_doubled(1999, 1000) && has_doubled(2000, 1000));
    }
}
