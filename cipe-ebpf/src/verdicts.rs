//! Counting drops. What is passed or redirected is counted where it ends: by the kernel or by the engine.

use cipe_common::{
    Verdict,
    maps::{NO_TUNNEL, verdict_index},
};

use crate::maps::VERDICTS;

/// A packet that ends here.
#[derive(Clone, Copy)]
pub struct Drop {
    /// Its tunnel, or [`NO_TUNNEL`].
    pub tunnel: u32,
    pub verdict: Verdict,
}

impl Drop {
    /// Counts the drop and returns `action`, for the caller to return. A tunnel beyond the table (a forged stamp) counts
    /// as none.
    #[inline(always)]
    pub fn count<A>(self, action: A) -> A {
        self.add(1);
        action
    }

    /// Counts the segments of a superframe but one, which [`Drop::count`] does.
    #[inline(always)]
    pub fn count_others(self, segments: u32) {
        self.add(u64::from(segments).saturating_sub(1));
    }

    #[inline(always)]
    fn add(self, packets: u64) {
        let row = |tunnel| VERDICTS.get_ptr_mut(verdict_index(tunnel, self.verdict));
        if let Some(counter) = row(self.tunnel).or_else(|| row(NO_TUNNEL)) {
            // SAFETY: the pointer comes from a successful look-up of a per-CPU array, so it is valid and this CPU's own.
            // XDP and TC may interrupt each other on one CPU; losing one count of a drop then is accepted.
            unsafe { *counter += packets };
        }
    }
}
