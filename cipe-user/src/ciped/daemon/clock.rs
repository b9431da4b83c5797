//! The clocks for [`Session`](super::Session).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

use crate::ciped::exchange::Now;

#[derive(Clone, Copy)]
pub(super) struct Clock {
    start: Duration,
}

impl Clock {
    pub(super) fn new() -> Self {
        Self { start: since_boot() }
    }

    pub(super) fn now(self) -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        // Until the year 2554.
        Now { at: since_boot().saturating_sub(self.start), unix_nanos: u64::try_from(unix).unwrap_or(u64::MAX) }
    }

    /// A time of this clock on that of the timers, which stands still while the machine sleeps.
    pub(super) fn timer(self, at: Duration) -> Instant {
        Instant::now() + at.saturating_sub(self.now().at)
    }
}

/// On a clock that goes on while the machine sleeps: keys get older meanwhile.
fn since_boot() -> Duration {
    // Neither part is negative.
    Duration::try_from(clock_gettime(ClockId::Boottime)).unwrap_or_default()
}
