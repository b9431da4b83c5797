//! The counters of one tunnel in one thread: written by this thread only, read by all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cipe_common::Verdict;

/// Packets by verdict, and payload octets. There is only one writer, so load and store are enough; no locked
/// instruction is needed.
pub struct Counters {
    verdicts: [AtomicU64; Verdict::COUNT],
    octets_sent: AtomicU64,
    octets_delivered: AtomicU64,
    receive_key_used: AtomicU64,
    bogus_length: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            verdicts: std::array::from_fn(|_| AtomicU64::new(0)),
            octets_sent: AtomicU64::new(0),
            octets_delivered: AtomicU64::new(0),
            receive_key_used: AtomicU64::new(0),
            bogus_length: AtomicU64::new(0),
        }
    }
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
}

impl Counters {
    /// Counts one packet.
    pub fn count(&self, verdict: Verdict) {
        add(&self.verdicts[verdict as usize], 1);
    }

    /// Counts several packets.
    pub fn count_all(&self, verdict: Verdict, packets: u64) {
        add(&self.verdicts[verdict as usize], packets);
    }

    /// Counts one sent data packet of `octets` payload octets.
    pub fn sent(&self, octets: usize) {
        self.count(Verdict::Sent);
        add(&self.octets_sent, octets as u64);
    }

    /// Counts one delivered packet of `octets` payload octets.
    pub fn delivered(&self, octets: usize) {
        self.count(Verdict::Delivered);
        add(&self.octets_delivered, octets as u64);
    }

    /// Counts one datagram of an invalid length, `octets`.
    pub fn bogus(&self, octets: usize) {
        self.count(Verdict::BadLength);
        self.bogus_length.store(octets as u64, Ordering::Relaxed);
    }

    /// Returns the length of the last such datagram.
    pub fn bogus_length(&self) -> u64 {
        self.bogus_length.load(Ordering::Relaxed)
    }

    /// Records that the peer uses the key that the receive slot had at this generation.
    pub fn use_receive_key(&self, generation: u64) {
        self.receive_key_used.store(generation, Ordering::Relaxed);
    }

    /// Returns the generation of the newest receive key that the peer was seen to use; 0: none yet.
    pub fn receive_key_used(&self) -> u64 {
        self.receive_key_used.load(Ordering::Relaxed)
    }

    /// Returns the number of packets under one verdict.
    pub fn of(&self, verdict: Verdict) -> u64 {
        self.verdicts[verdict as usize].load(Ordering::Relaxed)
    }

    /// Returns the number of packets under each verdict.
    pub fn all(&self) -> [u64; Verdict::COUNT] {
        std::array::from_fn(|verdict| self.verdicts[verdict].load(Ordering::Relaxed))
    }

    /// Returns the payload octets sent and delivered.
    pub fn octets(&self) -> (u64, u64) {
        (self.octets_sent.load(Ordering::Relaxed), self.octets_delivered.load(Ordering::Relaxed))
    }
}

/// The counters of one tunnel in all workers and in the control thread; they are added when they are read.
pub struct Tally {
    workers: Vec<Arc<Counters>>,
    control: Counters,
}

impl Tally {
    /// Creates the counters for `workers` workers.
    pub fn new(workers: usize) -> Self {
        Self { workers: (0..workers).map(|_| Arc::default()).collect(), control: Counters::default() }
    }

    /// Returns the number of workers.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// Returns the counters of worker `number`.
    pub fn of_worker(&self, number: usize) -> &Arc<Counters> {
        &self.workers[number]
    }

    /// Returns the counters of the control thread.
    pub fn of_control(&self) -> &Counters {
        &self.control
    }

    fn all(&self) -> impl Iterator<Item = &Counters> {
        self.workers.iter().map(AsRef::as_ref).chain([&self.control])
    }

    /// Returns the number of packets under one verdict.
    pub fn of(&self, verdict: Verdict) -> u64 {
        self.all().map(|counters| counters.of(verdict)).sum()
    }

    /// Returns the payload octets sent and delivered.
    pub fn octets(&self) -> (u64, u64) {
        let add = |(sent, delivered), (more_sent, more_delivered)| (sent + more_sent, delivered + more_delivered);
        self.all().map(Counters::octets).fold((0, 0), add)
    }

    /// Returns the generation of the newest receive key that the peer was seen to use; 0: none yet.
    pub fn receive_key_used(&self) -> u64 {
        self.all().map(Counters::receive_key_used).max().unwrap_or(0)
    }

    /// Returns the length of the last datagram of an invalid length that any worker has seen.
    pub fn bogus_length(&self) -> u64 {
        self.all().map(Counters::bogus_length).max().unwrap_or(0)
    }
}
