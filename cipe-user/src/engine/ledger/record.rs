//! The record of one key in a ledger.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::layout::{self, LOGGED, NUMBER, OCTETS, PACKETS, SINCE};
use super::{Ledger, locked};

/// Nanoseconds of CLOCK_MONOTONIC, the clock of [`Instant`], which all processes share until the machine starts again.
pub(super) fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// The record of a key.
pub struct Record {
    ledger: Arc<Ledger>,
    index: usize,
    number: u64,
    is_new: bool,
}

impl Record {
    pub(super) fn new(ledger: Arc<Ledger>, index: usize, number: u64, is_new: bool) -> Self {
        ledger.holders[index].fetch_add(1, Ordering::Relaxed);
        Self { ledger, index, number, is_new }
    }

    fn field(&self, field: usize) -> &AtomicU64 {
        self.ledger.word(layout::record(self.index) + field)
    }

    /// When the record was made; `None`: just now.
    pub fn since(&self) -> Option<Instant> {
        let passed = monotonic().saturating_sub(self.field(SINCE).load(Ordering::Relaxed));
        if self.is_new { None } else { Instant::now().checked_sub(Duration::from_nanos(passed)) }
    }

    /// Packets sealed or accepted.
    pub fn packets(&self) -> u64 {
        self.field(PACKETS).load(Ordering::Relaxed)
    }

    /// Payload octets sealed or accepted.
    #[cfg(test)]
    pub fn octets(&self) -> u64 {
        self.field(OCTETS).load(Ordering::Relaxed)
    }

    /// Counts more packets and payload octets; returns both totals.
    pub fn account(&self, packets: u64, octets: u64) -> (u64, u64) {
        (
            self.field(PACKETS).fetch_add(packets, Ordering::Relaxed) + packets,
            self.field(OCTETS).fetch_add(octets, Ordering::Relaxed) + octets,
        )
    }

    /// The entries of its log, oldest first.
    pub fn entries(&self) -> impl Iterator<Item = u64> {
        let (start, entries) = layout::log(self.index).unwrap_or_default();
        let logged = if entries == 0 { 0 } else { self.field(LOGGED).load(Ordering::Acquire) };
        self.ledger.ring(start, logged, entries.max(1))
    }

    /// Locks its log. `None`: the record is another key's now, after which this one is of no use any more.
    pub fn log(&self) -> Option<Log<'_>> {
        let lock = locked(&self.ledger.records[self.index]);
        let is_own = self.field(NUMBER).load(Ordering::Relaxed) == self.number;
        is_own.then_some(Log { record: self, _lock: lock })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.ledger.holders[self.index].fetch_sub(1, Ordering::Relaxed);
    }
}

/// The locked log of a record.
pub struct Log<'a> {
    record: &'a Record,
    _lock: MutexGuard<'a, ()>,
}

impl Log<'_> {
    /// Adds an entry.
    pub fn push(&mut self, entry: u64) {
        let ledger = &self.record.ledger;
        let Some((start, entries)) = layout::log(self.record.index) else { return };
        let logged = self.record.field(LOGGED).load(Ordering::Relaxed);
        if self.record.index != 0 && logged >= entries as u64 {
            return ledger.set_broken();
        }
        ledger.word(start + logged as usize % entries).store(entry, Ordering::Relaxed);
        self.record.field(LOGGED).store(logged + 1, Ordering::Release);
    }
}
