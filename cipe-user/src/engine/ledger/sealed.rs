//! The records of keys for sealed packets (docs/SEALED.md, section 4): of a send key the next counter, of a receive key the window.
//!
//! Unlike other records, one of a sealed key is never given away while the key may be in use: no record, no key.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::layout::{self, HASH, NEXT_COUNTER, NUMBER, SEALED_RECEIVE, SEALED_SEND, SINCE};
use super::{Ledger, Use, locked};
use crate::sealed::cipher::KEY;
use crate::sealed::window::WORDS;

/// Whether a key was ever in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handed {
    /// Never: a record is made for it.
    New,
    /// By an engine before this one, which has made the record.
    Used,
}

/// CLOCK_BOOTTIME, the clock of the keys' ages: it goes on while the machine sleeps.
pub(crate) fn boottime() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
}

/// The record of one key. Its place is not given to another key while this exists.
struct SealedRecord {
    ledger: Arc<Ledger>,
    index: usize,
}

impl SealedRecord {
    fn field(&self, field: usize) -> &AtomicU64 {
        self.ledger.word(layout::record(self.index) + field)
    }

    fn since(&self) -> Duration {
        Duration::from_nanos(self.field(SINCE).load(Ordering::Relaxed))
    }
}

impl Drop for SealedRecord {
    fn drop(&mut self) {
        // Whoever sees that it is free sees all stores of this holder.
        self.ledger.holders[self.index].fetch_sub(1, Ordering::Release);
    }
}

/// The next counter of a send key.
pub struct NextCounter(SealedRecord);

impl NextCounter {
    /// When the record was made, on the clock of [`boottime`].
    pub fn since(&self) -> Duration {
        self.0.since()
    }
}

impl AsRef<AtomicU64> for NextCounter {
    #[inline]
    fn as_ref(&self) -> &AtomicU64 {
        self.0.field(NEXT_COUNTER)
    }
}

/// The window of a receive key.
pub struct WindowWords(SealedRecord);

impl WindowWords {
    /// When the record was made, on the clock of [`boottime`].
    pub fn since(&self) -> Duration {
        self.0.since()
    }
}

impl AsRef<[AtomicU64; WORDS]> for WindowWords {
    #[inline]
    fn as_ref(&self) -> &[AtomicU64; WORDS] {
        let words = self.0.ledger.words.get(layout::window(self.0.index)..).unwrap_or_default();
        let Some(window) = words.as_flattened().first_chunk() else { unreachable!("the last window ends the ledger") };
        window
    }
}

impl Ledger {
    /// Returns the counter of a send key; `None` for a used key without a record, or if all records are in use.
    pub fn sealed_send(self: &Arc<Self>, key: &[u8; KEY], handed: Handed) -> Option<NextCounter> {
        self.sealed(Use::SealedSend, SEALED_SEND, key, handed).map(NextCounter)
    }

    /// Returns the window of a receive key; `None` as for a send key.
    pub fn sealed_receive(self: &Arc<Self>, key: &[u8; KEY], handed: Handed) -> Option<WindowWords> {
        self.sealed(Use::SealedReceive, SEALED_RECEIVE, key, handed).map(WindowWords)
    }

    fn sealed(
        self: &Arc<Self>,
        used: Use,
        records: Range<usize>,
        key: &[u8; KEY],
        handed: Handed,
    ) -> Option<SealedRecord> {
        let hash = self.hash(used, key);
        let _opening = locked(&self.opening);
        let known = self.find(used, hash).map(|(index, _)| index);
        let index = match (known, handed) {
            // No record is ever made empty again.
            (Some(index), _) => index,
            (None, Handed::New) => {
                let number = |index: &usize| self.word(layout::record(*index) + NUMBER).load(Ordering::Relaxed);
                let is_free = |index: &usize| self.holders[*index].load(Ordering::Acquire) == 0;
                let index = records.filter(is_free).min_by_key(number)?;
                self.make(index, hash);
                index
            }
            (None, Handed::Used) => return None,
        };
        self.holders[index].fetch_add(1, Ordering::Relaxed);
        Some(SealedRecord { ledger: self.clone(), index })
    }

    /// Makes the empty record of a key in a place that nobody holds.
    fn make(&self, index: usize, hash: [u64; 2]) {
        let record = layout::record(index);
        // It has no number while it is written.
        self.word(record + NUMBER).store(0, Ordering::SeqCst);
        let window =
            if SEALED_RECEIVE.contains(&index) { layout::window(index)..layout::window(index) + WORDS } else { 0..0 };
        [record + NEXT_COUNTER].into_iter().chain(window).for_each(|word| self.word(word).store(0, Ordering::Relaxed));
        self.word(record + SINCE).store(boottime().as_nanos() as u64, Ordering::Relaxed);
        (0..2).for_each(|word| self.word(record + HASH + word).store(hash[word], Ordering::Relaxed));
        self.word(record + NUMBER).store(self.next_number(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::engine::ledger::layout::{SEALED_RECEIVE_RECORDS, SEALED_SEND_RECORDS};
    use crate::sealed::window::Window;

    fn key(number: u8) -> [u8; KEY] {
        [number; KEY]
    }

    #[test]
    fn the_next_engine_goes_on_with_counters_and_windows() {
        let (ledger, memory) = Ledger::new().unwrap();
        let send = ledger.sealed_send(&key(1), Handed::New).unwrap();
        send.as_ref().fetch_add(700, Ordering::Relaxed);
        let since = send.since();
        assert!(since <= boottime());
        let receive = [2, 3, 4].map(|number| Window::over(ledger.sealed_receive(&key(number), Handed::New).unwrap()));
        for (window, from) in receive.iter().zip([0, 100, 20_000]) {
            assert!((from..from + 50).all(|counter| window.accept(counter).is_ok()));
        }
        // The engine is killed, or still lives: the memory is the same.
        let next = Ledger::take_over(memory.as_fd()).unwrap();
        let continued = next.sealed_send(&key(1), Handed::Used).unwrap();
        assert_eq!((continued.as_ref().load(Ordering::Relaxed), continued.since()), (700, since));
        for (number, from) in [(2, 0), (3, 100), (4, 20_000)] {
            let window = Window::over(next.sealed_receive(&key(number), Handed::Used).unwrap());
            assert_eq!(window.top(), from + 49);
            assert!((from..from + 50).all(|counter| window.accept(counter).is_err()), "accepted twice");
            assert!(window.accept(from + 50).is_ok());
        }
    }

    #[test]
    fn a_used_key_without_a_record_is_none_and_a_new_one_is_never_made_empty_again() {
        let (ledger, _memory) = Ledger::new().unwrap();
        assert!(ledger.sealed_send(&key(1), Handed::Used).is_none());
        assert!(ledger.sealed_receive(&key(1), Handed::Used).is_none());
        ledger.sealed_send(&key(1), Handed::New).unwrap().as_ref().store(5, Ordering::Relaxed);
        assert!(ledger.sealed_receive(&key(1), Handed::Used).is_none(), "one key in two uses is two");
        let again = ledger.sealed_send(&key(1), Handed::New).unwrap();
        assert_eq!(again.as_ref().load(Ordering::Relaxed), 5);
    }

    #[test]
    fn no_record_in_use_is_given_away_and_the_oldest_free_one_is() {
        let (ledger, _memory) = Ledger::new().unwrap();
        let mut send: Vec<NextCounter> = (0..SEALED_SEND_RECORDS as u8)
            .map(|number| ledger.sealed_send(&key(number), Handed::New).unwrap())
            .collect();
        assert!(ledger.sealed_send(&key(100), Handed::New).is_none());
        send[1].as_ref().store(9, Ordering::Relaxed);
        drop(send.remove(1));
        assert_eq!(ledger.sealed_send(&key(100), Handed::New).unwrap().as_ref().load(Ordering::Relaxed), 0);
        assert!(ledger.sealed_send(&key(1), Handed::Used).is_none());

        let windows: Vec<WindowWords> = (0..SEALED_RECEIVE_RECORDS as u8)
            .map(|number| ledger.sealed_receive(&key(number), Handed::New).unwrap())
            .collect();
        assert!(ledger.sealed_receive(&key(100), Handed::New).is_none());
        assert!(windows.into_iter().all(|words| Window::over(words).accept(3).is_ok()));
        // All are free now, and each key is known until its record is given away.
        let next = Window::over(ledger.sealed_receive(&key(100), Handed::New).unwrap());
        assert!(next.accept(3).is_ok(), "it has the window of the key before it");
        assert!(ledger.sealed_receive(&key(0), Handed::Used).is_none());
        assert!(ledger.sealed_receive(&key(1), Handed::Used).is_some());
    }
}
