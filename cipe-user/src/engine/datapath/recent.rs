//! The IVs of the datagrams that a worker sent last. They prove that an ICMP error is about one of our datagrams: an attacker may
//! know the addresses and ports of a tunnel, but only a host on the path sees the IVs. Under `nokey`, the first eight octets of the
//! payload take the place of the IV.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::wire::packet::IV;

/// The number of IVs that a worker remembers, a power of two; 8 octets each. At 100,000 datagrams a second they cover
/// 160 ms, and an error arrives within a round trip.
const REMEMBERED: usize = 1 << 14;

/// A ring of IVs. Its worker writes, every worker reads.
#[derive(Debug)]
pub(super) struct RecentIvs {
    ring: Box<[AtomicU64]>,
    next: AtomicUsize,
}

impl Default for RecentIvs {
    fn default() -> Self {
        Self { ring: (0..REMEMBERED).map(|_| AtomicU64::new(0)).collect(), next: AtomicUsize::new(0) }
    }
}

impl RecentIvs {
    /// Stores the IV of a datagram in place of the oldest one. Only the ring's own worker calls this.
    pub(super) fn remember(&self, iv: [u8; IV]) {
        let next = self.next.load(Ordering::Relaxed);
        self.ring[next % REMEMBERED].store(u64::from_ne_bytes(iv), Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// Returns whether this IV is among the stored ones.
    pub(super) fn contains(&self, iv: [u8; IV]) -> bool {
        let iv = u64::from_ne_bytes(iv);
        // Zero marks a free place. An IV of ours is zero with a probability of 2^-64.
        iv != 0 && self.ring.iter().any(|sent| sent.load(Ordering::Relaxed) == iv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_datagrams_are_remembered_and_no_others() {
        let recent = RecentIvs::default();
        assert!(!recent.contains([0; IV]), "free places are no datagrams");
        for number in 1..=REMEMBERED as u64 + 3 {
            recent.remember(number.to_be_bytes());
        }
        assert!(!recent.contains(3u64.to_be_bytes()), "the oldest have made room");
        assert!(recent.contains(4u64.to_be_bytes()));
        assert!(recent.contains((REMEMBERED as u64 + 3).to_be_bytes()));
        assert!(!recent.contains((REMEMBERED as u64 + 4).to_be_bytes()));
    }
}
