//! Which counters were accepted under one receive key (section 4), shared by workers without a lock.
//!
//! A word holds 32 bits of the window and, in its upper half, which block of 32 counters they are. A newer block that falls on
//! the same word takes it over in one compare-and-swap, so no range is ever cleared while somebody sets bits in it. A bit that
//! was set is lost only to a newer block, below which everything is too old: no counter can be accepted twice.

use std::sync::atomic::{AtomicU64, Ordering};

use super::Refused;
use super::counter::END;

const SLOTS: usize = 512;
const BLOCK: u64 = 32;
/// Words of a window: one for each block, and the highest counter.
pub const WORDS: usize = SLOTS + 1;
/// A counter that is lower than the highest one by less than this is judged exactly.
pub const WINDOW: u64 = (SLOTS as u64 - 1) * BLOCK;

// A block's number fits into the upper half of a word.
const _: () = assert!(END / BLOCK <= 1 << 32);

/// A window over any memory, such as a ledger's, that the next engine goes on with. All zeros: nothing was accepted.
pub struct Window<W = Box<[AtomicU64; WORDS]>>(W);

impl Default for Window {
    fn default() -> Self {
        Self(Box::new([const { AtomicU64::new(0) }; WORDS]))
    }
}

impl<W: AsRef<[AtomicU64; WORDS]>> Window<W> {
    /// The window in these words.
    pub fn over(words: W) -> Self {
        Self(words)
    }

    /// The highest counter that was accepted, or 0.
    #[inline]
    pub fn top(&self) -> u64 {
        self.0.as_ref()[SLOTS].load(Ordering::Relaxed)
    }

    /// Accepts a counter, once. Call it only for an authentic packet, and before the packet is used.
    ///
    /// # Errors
    /// [`Refused::TooOld`] or [`Refused::Replayed`].
    #[inline]
    pub fn accept(&self, counter: u64) -> Result<(), Refused> {
        let words = self.0.as_ref();
        let top = self.top();
        if counter >= END || counter.saturating_add(WINDOW) <= top {
            return Err(Refused::TooOld);
        }
        let (block, bit) = (counter / BLOCK, 1 << (counter % BLOCK));
        let slot = &words[block as usize % SLOTS];
        // One word alone decides, so no order between words is needed.
        let mut seen = slot.load(Ordering::Relaxed);
        loop {
            let next = match (seen >> 32).cmp(&block) {
                std::cmp::Ordering::Greater => return Err(Refused::TooOld),
                std::cmp::Ordering::Equal if seen & bit != 0 => return Err(Refused::Replayed),
                std::cmp::Ordering::Equal => seen | bit,
                std::cmp::Ordering::Less => block << 32 | bit,
            };
            match slot.compare_exchange_weak(seen, next, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => break,
                Err(changed) => seen = changed,
            }
        }
        if counter > top {
            words[SLOTS].fetch_max(counter, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::sync::atomic::AtomicUsize;

    use proptest::prelude::*;

    use super::*;

    /// A slow model: a set of all accepted counters.
    #[derive(Default)]
    struct Model {
        accepted: HashSet<u64>,
        top: u64,
    }

    impl Model {
        fn accept(&mut self, counter: u64) -> Result<(), Refused> {
            if counter + WINDOW <= self.top {
                return Err(Refused::TooOld);
            }
            self.top = self.top.max(counter);
            if self.accepted.insert(counter) { Ok(()) } else { Err(Refused::Replayed) }
        }
    }

    proptest! {
        #[test]
        fn it_judges_as_a_set_of_all_counters_does(
            start in prop_oneof![Just(0), 0..END / 2],
            steps in proptest::collection::vec((-20_000i64..20_000, 0u32..40), 1..600),
        ) {
            let (window, mut model) = (Window::default(), Model::default());
            let mut at = start;
            for (step, spread) in steps {
                at = at.saturating_add_signed(step / (1 << (spread % 16)));
                prop_assert_eq!(window.accept(at), model.accept(at), "{} at top {}", at, model.top);
                prop_assert_eq!(window.top(), model.top);
            }
        }
    }

    #[test]
    fn the_edges_of_the_window() {
        let window = Window::default();
        assert_eq!(window.accept(WINDOW), Ok(()));
        assert_eq!(window.accept(0), Err(Refused::TooOld));
        assert_eq!(window.accept(1), Ok(()));
        assert_eq!(window.accept(1), Err(Refused::Replayed));
        assert_eq!(window.accept(WINDOW), Err(Refused::Replayed));
        assert_eq!(window.accept(END - 1), Ok(()));
        assert_eq!(window.accept(END - 1), Err(Refused::Replayed));
        assert_eq!(window.accept(END), Err(Refused::TooOld));
        assert_eq!(window.accept(u64::MAX), Err(Refused::TooOld));
        assert_eq!(window.accept(WINDOW + 1), Err(Refused::TooOld));
        assert_eq!(window.accept(END - WINDOW), Ok(()));
    }

    #[test]
    fn the_next_engine_accepts_nothing_again() {
        let words = [const { AtomicU64::new(0) }; WORDS];
        struct Ledger<'a>(&'a [AtomicU64; WORDS]);
        impl AsRef<[AtomicU64; WORDS]> for Ledger<'_> {
            fn as_ref(&self) -> &[AtomicU64; WORDS] {
                self.0
            }
        }
        assert!((0..50_000).all(|counter| Window::over(Ledger(&words)).accept(counter).is_ok()));
        let next = Window::over(Ledger(&words));
        assert!((0..50_000).all(|counter| next.accept(counter).is_err()));
        assert_eq!(next.accept(50_000), Ok(()));
    }

    #[test]
    fn workers_together_accept_each_counter_once() {
        let window = Window::default();
        let total = 200_000;
        let accepted: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for worker in 0..4 {
                let (window, accepted) = (&window, &accepted);
                scope.spawn(move || {
                    // Each worker sees all counters, each in another order.
                    for counter in (0..total).map(|n| n ^ (worker * 7)).filter(|counter| *counter < total) {
                        if window.accept(counter as u64).is_ok() {
                            accepted[counter].fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let counts: Vec<usize> = accepted.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        assert!(counts.iter().all(|count| *count <= 1));
        assert!(counts.iter().sum::<usize>() > total / 2);
    }
}
