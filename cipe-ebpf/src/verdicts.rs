//! Counting drops. What is passed or redirected is counted where it ends: by the kernel or by the engine.

use cipe_common::{Verdict, maps::verdict_index};

use crate::maps::VERDICTS;

/// A packet that ends here.
#[derive(Clone, Copy)]
pub struct Drop {
    /// Its tunnel, or [`cipe_common::maps::NO_TUNNEL`].
    pub tunnel: u32,
    pub verdict: Verdict,
}

impl Drop {
    /// Counts the drop and returns `action`, for the caller to return.
    #[inline(always)]
    pub fn count<A>(self, action: A) -> A {
        if let Some(counter) = VERDICTS.get_ptr_mut(verdict_index(self.tunnel, self.verdict)) {
            // SAFETY: the pointer comes from a successful look-up of a per-CPU array, so it is valid and this CPU's own.
            // XDP and TC may interrupt each other on one CPU; losing one count of a drop then is accepted.
            unsafe { *counter += 1 };
        }
        action
    }
}
