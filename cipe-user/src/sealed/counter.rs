//! Counters of packets under one key (section 4).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::window::WINDOW;

/// Bits of a counter that are in the packet.
pub const BITS: u32 = 30;
/// At this counter new keys are made.
pub const RENEW: u64 = 1 << 28;
/// No counter from here on is used.
pub const END: u64 = 1 << 36;
/// Counters that a worker takes at once.
pub const RANGE: u64 = 64;
/// How far a worker's counter may lie below the next free one: half of the window.
const MAX_LAG: u64 = WINDOW / 2;

const SPAN: u64 = 1 << BITS;

/// The low bits of a counter, as in the packet.
pub const fn low(counter: u64) -> u32 {
    (counter % SPAN) as u32
}

/// Completes the low bits of a counter to the number nearest to `top`, the highest counter that was authentic.
pub const fn complete(low: u32, top: u64) -> u64 {
    let near = top - top % SPAN + low as u64 % SPAN;
    if near + SPAN / 2 <= top {
        near + SPAN
    } else if near > top + SPAN / 2 && near >= SPAN {
        near - SPAN
    } else {
        near
    }
}

/// Takes `count` counters of a key, whose next free one is `next`, for one caller alone. `None`: the key has no more. They are
/// taken before they are used, so an engine that goes on with `next` in the same memory uses none again.
pub fn take(next: &AtomicU64, count: u64) -> Option<Range<u64>> {
    let after = |next: u64| next.saturating_add(count).min(END);
    let taken = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next < END).then(|| after(next)));
    taken.ok().map(|first| first..after(first))
}

/// The counters of one worker under one key.
#[derive(Debug, Default)]
pub(super) struct Counters(Range<u64>);

impl Counters {
    /// Returns a counter that nobody else gets; `None`: the key has no more. What a dropped worker has left is never used. A
    /// worker with little to send gives up what it has left when others have gone on: its packets would be too old.
    #[inline]
    pub(super) fn next(&mut self, shared: &AtomicU64) -> Option<u64> {
        if self.0.is_empty() || self.0.start + MAX_LAG < shared.load(Ordering::Relaxed) {
            self.0 = take(shared, RANGE)?;
        }
        self.0.next()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_counter_near_the_newest_is_completed(top in 0..END, distance in -(SPAN as i64 / 2) + 1..=SPAN as i64 / 2) {
            if let Some(counter) = top.checked_add_signed(distance) {
                prop_assert_eq!(complete(low(counter), top), counter);
            }
        }

        #[test]
        fn any_low_bits_are_kept(top in 0..END, bits in 0..SPAN as u32) {
            let counter = complete(bits, top);
            prop_assert_eq!(low(counter), bits);
            prop_assert!(counter <= top + SPAN / 2 || counter < SPAN);
        }
    }

    #[test]
    fn the_edges_of_completion() {
        let half = SPAN as u32 / 2;
        for (bits, top, counter) in [
            (0, 0, 0),
            (SPAN as u32 - 1, 0, SPAN - 1),
            (SPAN as u32 - 1, SPAN, SPAN - 1),
            (0, SPAN - 1, SPAN),
            (half, SPAN, SPAN + SPAN / 2),
            (half + 1, SPAN, SPAN / 2 + 1),
            (half, SPAN / 2 + SPAN, SPAN + SPAN / 2),
        ] {
            assert_eq!(complete(bits, top), counter, "{bits} at {top}");
        }
    }

    #[test]
    fn workers_share_no_counter_and_the_last_one_is_the_last() {
        let next = AtomicU64::new(END - 10 * RANGE - 3);
        let taken: Vec<u64> = std::thread::scope(|scope| {
            let worker = || {
                let mut counters = Counters::default();
                std::iter::from_fn(|| counters.next(&next)).collect::<Vec<_>>()
            };
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(taken.len() as u64, 10 * RANGE + 3);
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), taken.len());
        assert!(taken.iter().all(|counter| *counter < END));
        assert_eq!(take(&next, 1), None);
    }

    #[test]
    fn a_worker_with_little_to_send_stays_in_the_window() {
        let next = AtomicU64::new(0);
        let [mut slow, mut fast] = [const { Counters(0..0) }; 2];
        for _ in 0..20 {
            let newest = (0..3_000).filter_map(|_| fast.next(&next)).max().unwrap();
            let counter = slow.next(&next).unwrap();
            assert!(counter + WINDOW / 2 + RANGE >= newest, "{counter} when {newest} was sent");
        }
    }

    #[test]
    fn an_engine_that_follows_another_begins_behind_what_that_one_has_taken() {
        let next = AtomicU64::new(0);
        let [mut killed, mut other] = [const { Counters(0..0) }; 2];
        assert_eq!((killed.next(&next), other.next(&next)), (Some(0), Some(RANGE)));
    }
}
