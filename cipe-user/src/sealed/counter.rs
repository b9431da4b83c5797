//! Counters of packets under one key (section 4).

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bits of a counter that are in the packet.
pub const BITS: u32 = 30;
/// At this counter new keys are made.
pub const RENEW: u64 = 1 << 28;
/// No counter from here on is used.
pub const END: u64 = 1 << 36;

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

/// Takes up to `count` counters of a key, whose next free one is `next`, for one caller alone; fewer, or none, if the key has no
/// more. They are taken before they are used, so an engine that goes on with `next` in the same memory uses none again.
pub(super) fn take(next: &AtomicU64, count: u64) -> Range<u64> {
    let after = |next: u64| next.saturating_add(count).min(END);
    let taken = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| (next < END).then(|| after(next)));
    taken.map_or(END..END, |first| first..after(first))
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
        let next = AtomicU64::new(END - 643);
        let taken: Vec<u64> = std::thread::scope(|scope| {
            let worker = || {
                std::iter::from_fn(|| Some(take(&next, 64)).filter(|range| !range.is_empty()))
                    .flatten()
                    .collect::<Vec<_>>()
            };
            let workers: Vec<_> = (0..4).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(taken.len(), 643);
        assert_eq!(taken.iter().collect::<HashSet<_>>().len(), taken.len());
        assert!(taken.iter().all(|counter| *counter < END));
        assert!(take(&next, 1).is_empty() && take(&AtomicU64::new(u64::MAX), 1).is_empty());
    }
}
