//! The trial of a card's zero copy: with some drivers no packet comes in by it, and no counter shows that.

use std::time::{Duration, Instant};

/// How long a card with zero copy may receive nothing until it is given up. Drivers need less to bring up a link that they took down
/// to attach XDP, and so does a key exchange that waits for an answer.
const MAX_SILENCE: Duration = Duration::from_secs(15);

/// How long the kernel copies then, at first; four times as long each time that nothing comes by zero copy again. Each trial may lose
/// all packets of [`MAX_SILENCE`].
const MIN_COPY_TIME: Duration = Duration::from_secs(60 * 60);

/// The same at most.
const MAX_COPY_TIME: Duration = Duration::from_secs(24 * 60 * 60);

/// The trial of one card whose driver has zero copy.
#[derive(Debug, Default)]
pub(super) struct Trial {
    /// When it was given up, and for how long.
    given_up: Option<(Instant, Duration)>,
    /// How long it was given up for last.
    last: Option<Duration>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TrialChange {
    /// Let the kernel copy, for this time at least.
    GiveUp(Duration),
    /// Try zero copy again.
    TryAgain,
}

impl Trial {
    /// Whether the kernel is to copy now.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.is_some()
    }

    /// Judges by the number of datagrams that the card has received since it was opened at `opened`, with zero copy or with copies.
    /// A peer that is away looks like zero copy by which nothing comes: then nothing comes by copies either, and they do no harm.
    /// Zero copy is tried again when something comes by copies.
    pub(super) fn judge(
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
            (None, true) if now.duration_since(opened) >= MAX_SILENCE => {
                let wait = self.last.map_or(MIN_COPY_TIME, |last| (4 * last).min(MAX_COPY_TIME));
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
        assert_eq!(trial.judge(true, start, 0, start + MAX_SILENCE - SECOND), None);
        assert_eq!(trial.judge(true, start, 1, start + MAX_SILENCE), None);
        // It may be idle for as long as it likes.
        assert_eq!(trial.judge(true, start, 1, start + 1000 * MAX_SILENCE), None);
        assert!(!trial.is_given_up());
    }

    #[test]
    fn zero_copy_that_brings_nothing_is_given_up_ever_longer_and_tried_while_copies_bring_something() {
        let (mut trial, mut now) = (Trial::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..6 {
            let opened = now;
            now += MAX_SILENCE;
            let Some(TrialChange::GiveUp(wait)) = trial.judge(true, opened, 0, now) else { panic!("it is kept") };
            assert!(trial.is_given_up());
            waits.push(wait.as_secs() / 3600);
            assert_eq!(trial.judge(false, now, 9, now + wait - SECOND), None);
            // Nothing comes by copies either: the peer is away.
            assert_eq!(trial.judge(false, now, 0, now + wait), None);
            now += wait;
            assert_eq!(trial.judge(false, now, 9, now), Some(TrialChange::TryAgain));
            assert!(!trial.is_given_up());
        }
        assert_eq!(waits, [1, 4, 16, 24, 24, 24]);
        // Once it brings something, all is forgotten.
        assert_eq!(trial.judge(true, now, 1, now), None);
        assert_eq!(trial.judge(true, now, 0, now + MAX_SILENCE), Some(TrialChange::GiveUp(MIN_COPY_TIME)));
    }

    #[test]
    fn a_card_without_zero_copy_is_left_alone() {
        let (mut trial, start) = (Trial::default(), Instant::now());
        assert_eq!(trial.judge(false, start, 0, start + 10 * MAX_SILENCE), None);
    }
}
