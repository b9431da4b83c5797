//! The [identities](super::packets::identity) of the datagrams that a worker sent last. They prove that an ICMP error is about one
//! of our datagrams: an attacker may know the addresses and ports of a tunnel, but only a host on the path sees the datagrams.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::packets::IDENTITY;

/// The number of datagrams that a worker remembers, a power of two; 8 octets each. At 100,000 datagrams a second they cover
/// 160 ms, and an error arrives within a round trip.
const REMEMBERED: usize = 1 << 14;

/// A ring of identities. Its worker writes, every worker reads.
#[derive(Debug)]
pub(super) struct RecentDatagrams {
    ring: Box<[AtomicU64]>,
    next: AtomicUsize,
}

impl Default for RecentDatagrams {
    fn default() -> Self {
        Self { ring: (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect(), next: AtomicUsize::new(0) }
    }
}

impl RecentDatagrams {
    /// Stores the identity of a datagram in place of the oldest one. Only the ring's own worker calls this.
    pub(super) fn remember(&self, identity: [u8; IDENTITY]) {
        let next = self.next.load(Ordering::Relaxed);
        self.ring[next % REMEMBERED].store(u64::from_ne_bytes(identity), Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// Returns whether this identity is among the stored ones.
    pub(super) fn contains(&self, identity: [u8; IDENTITY]) -> bool {
        let identity = u64::from_ne_bytes(identity);
        // Zero marks a free place. An identity of ours is zero with a probability of 2^-64.
        identity != 0 && self.ring.iter().any(|sent| sent.load(Ordering::Relaxed) == identity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_datagrams_are_remembered_and_no_others() {
        let recent = RecentDatagrams::default();
        assert!(!recent.contains([0; IDENTITY]), "free places are no datagrams");
        for number in 1..=REMEMBERED as u64 + 3 {
            recent.remember(number.to_be_bytes());
        }
        assert!(!recent.contains(3u64.to_be_bytes()), "the oldest have made room");
        assert!(recent.contains(4u64.to_be_bytes()));
        assert!(recent.contains((REMEMBERED as u64 + 3).to_be_bytes()));
        assert!(!recent.contains((REMEMBERED as u64 + 4).to_be_bytes()));
    }
}
