//! Whether a card's zero copy brings anything: with some drivers nothing comes in by it, and no counter tells.

use std::time::{Duration, Instant};

/// How long a card with zero copy may bring nothing. Longer than drivers take to bring a link up that they took down to attach
/// XDP, and than a key exchange that waits for an answer.
const SILENCE: Duration = Duration::from_secs(15);

/// How long the kernel copies then, at first; four times as long each time that zero copy again brings nothing. Each trial may cost
/// all that comes in [`SILENCE`].
const LEAST_WAIT: Duration = Duration::from_secs(60 * 60);

/// The same at most.
const MOST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);

/// Of one card whose driver has zero copy.
#[derive(Debug, Default)]
pub(super) struct Trial {
    /// When it was given up, and for how long.
    given_up: Option<(Instant, Duration)>,
    /// How long it was given up for last.
    last: Option<Duration>,
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TrialChange {
    /// Let the kernel copy, for so long at least.
    GiveUp(Duration),
    /// Try zero copy again.
    TryAgain,
}

impl Trial {
    /// Whether the kernel is to copy now.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.is_some()
    }

    /// Takes up how many datagrams have come by the card since it was opened at `opened`, with zero copy or copies. A peer that
    /// is away looks like zero copy that brings nothing: then copies bring nothing either, and do no harm. Zero copy is tried again
    /// when copies bring something.
    pub(super) fn look(
        &mut self,
        zero_copy: bool,
        opened: Instant,
        received: u64,
        now: Instant,
    ) -> Option<TrialChange> {
        match (self.given_up, zero_copy) {
            (None, true) if received > 0 => {
                self.last = None;
                None
            }
            (None, true) if now.duration_since(opened) >= SILENCE => {
                let wait = self.last.map_or(LEAST_WAIT, |last| (4 * last).min(MOST_WAIT));
                (self.given_up, self.last) = (Some((now, wait)), Some(wait));
                Some(TrialChange::GiveUp(wait))
            }
            (Some((since, wait)), false) if received > 0 && now.duration_since(since) >= wait => {
                self.given_up = None;
                Some(TrialChange::TryAgain)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn zero_copy_that_brings_something_is_kept() {
        let (mut trial, start) = (Trial::default(), Instant::now());
        assert_eq!(trial.look(true, start, 0, start + SILENCE - SECOND), None);
        assert_eq!(trial.look(true, start, 1, start + SILENCE), None);
        // It may be idle for as long as it likes.
        assert_eq!(trial.look(true, start, 1, start + 1000 * SILENCE), None);
        assert!(!trial.is_given_up());
    }

    #[test]
    fn zero_copy_that_brings_nothing_is_given_up_ever_longer_and_tried_while_copies_bring_something() {
        let (mut trial, mut now) = (Trial::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..6 {
            let opened = now;
            now += SILENCE;
            let Some(TrialChange::GiveUp(wait)) = trial.look(true, opened, 0, now) else { panic!("it is kept") };
            assert!(trial.is_given_up());
            waits.push(wait.as_secs() / 3600);
            assert_eq!(trial.look(false, now, 9, now + wait - SECOND), None);
            // Nothing comes by copies either: the peer is away.
            assert_eq!(trial.look(false, now, 0, now + wait), None);
            now += wait;
            assert_eq!(trial.look(false, now, 9, now), Some(TrialChange::TryAgain));
            assert!(!trial.is_given_up());
        }
        assert_eq!(waits, [1, 4, 16, 24, 24, 24]);
        // Once it brings something, all is forgotten.
        assert_eq!(trial.look(true, now, 1, now), None);
        assert_eq!(trial.look(true, now, 0, now + SILENCE), Some(TrialChange::GiveUp(LEAST_WAIT)));
    }

    #[test]
    fn a_card_without_zero_copy_is_left_alone() {
        let (mut trial, start) = (Trial::default(), Instant::now());
        assert_eq!(trial.look(false, start, 0, start + 10 * SILENCE), None);
    }
}
