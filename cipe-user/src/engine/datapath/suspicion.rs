//! Whether so many datagrams cannot be decrypted that it pays to look at their ends first.

/// Decrypted packets that outweigh one failure. Two blocks more for each packet cost less than the rest of a failed one
/// from about this ratio on.
const FAILURE_WEIGHT: usize = 32;

/// Level from which on the ends are looked at: a full batch of failures, or fewer that come again and again.
const ON: usize = FAILURE_WEIGHT * 64;

/// The most that failures can add up to, so that the end of a flood is noticed soon.
const MAX: usize = 2 * ON;

/// The balance of the last failures and successes of one worker. Between [`ON`] and zero it stays as it was, so that it does not
/// change all the time.
#[derive(Debug, Default)]
pub(super) struct Suspicion {
    level: usize,
    is_on: bool,
}

impl Suspicion {
    /// Whether to look at the ends of datagrams first.
    pub(super) fn is_on(&self) -> bool {
        self.is_on
    }

    /// Counts the datagrams of a batch: those that no key has opened, and the others.
    pub(super) fn count(&mut self, failed: usize, others: usize) {
        self.level = (self.level + FAILURE_WEIGHT * failed).min(MAX).saturating_sub(others);
        self.is_on = self.level >= ON || self.is_on && self.level > 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_raises_it_and_the_packets_after_it_end_it() {
        let mut suspicion = Suspicion::default();
        suspicion.count(63, 0);
        assert!(!suspicion.is_on());
        suspicion.count(1, 0);
        assert!(suspicion.is_on());
        suspicion.count(1_000_000, 0);
        suspicion.count(0, MAX - 1);
        assert!(suspicion.is_on());
        suspicion.count(0, 1);
        assert!(!suspicion.is_on());
    }

    #[test]
    fn damage_now_and_then_never_raises_it() {
        let mut suspicion = Suspicion::default();
        for _ in 0..100_000 {
            suspicion.count(1, FAILURE_WEIGHT);
            assert!(!suspicion.is_on());
        }
    }

    #[test]
    fn it_stays_while_more_fails_than_it_costs() {
        let mut suspicion = Suspicion::default();
        suspicion.count(64, 0);
        for _ in 0..100_000 {
            suspicion.count(1, FAILURE_WEIGHT - 1);
            assert!(suspicion.is_on());
        }
    }
}
