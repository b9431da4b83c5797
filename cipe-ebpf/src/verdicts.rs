//! Counts drops. The kernel or the engine counts the packets that a program passes or redirects.

use cipe_common::{
    Verdict,
    maps::{KERNEL_VERDICTS, NO_TUNNEL, drops_index},
};

use crate::{bounds::masked, maps::VERDICTS};

/// A packet that the program drops.
#[derive(Clone, Copy)]
pub struct Drop {
    /// Its tunnel, or [`NO_TUNNEL`].
    pub tunnel: u32,
    pub verdict: Verdict,
}

impl Drop {
    /// Counts the drop and returns `action`. If the tunnel is beyond the table (a forged stamp), the drop counts for [`NO_TUNNEL`].
    #[inline(always)]
    pub fn count<A>(self, action: A) -> A {
        self.add(1);
        action
    }

    /// Counts all segments of a superframe but one. [`Drop::count`] counts that one.
    #[inline(always)]
    pub fn count_others(self, segments: u32) {
        self.add(u64::from(segments).saturating_sub(1));
    }

    #[inline(always)]
    fn add(self, packets: u64) {
        let Some(index) = self.verdict.kernel_index() else { return };
        let drops = |tunnel| VERDICTS.get_ptr_mut(drops_index(tunnel));
        if let Some(drops) = drops(self.tunnel).or_else(|| drops(NO_TUNNEL)) {
            let counter = drops.cast::<u64>().wrapping_add(masked::<KERNEL_VERDICTS>(index));
            // SAFETY: the pointer comes from a successful look-up of a per-CPU array, so it is valid and this CPU's own; the
            // index is below the number of counters there.
            // XDP and TC may interrupt each other on one CPU. One drop may then stay uncounted, which is accepted.
            unsafe { *counter += packets };
        }
    }
}
