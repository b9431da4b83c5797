//! The IVs of the datagrams that a worker sent last: an ICMP error that quotes one of them is about a datagram of ours.
//!
//! Whoever can send ICMP knows the addresses and ports of a tunnel; the IV of a datagram only those who see it pass. Under `nokey`
//! the first eight octets of the payload stand for it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::wire::packet::IV;

/// Datagrams that a worker remembers, a power of two: 8 octets each. An error comes back after a round trip; at 100,000 datagrams a second
/// these are 160 ms.
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
    /// Remembers the IV of a datagram in place of the oldest one. Only the ring's own worker calls this.
    pub(super) fn remember(&self, iv: [u8; IV]) {
        let next = self.next.load(Ordering::Relaxed);
        self.ring[next % REMEMBERED].store(u64::from_ne_bytes(iv), Ordering::Relaxed);
        self.next.store(next.wrapping_add(1), Ordering::Relaxed);
    }

    /// Whether a datagram with this IV is among the last ones.
    pub(super) fn contains(&self, iv: [u8; IV]) -> bool {
        let iv = u64::from_ne_bytes(iv);
        // Zero stands for a free place; no IV of ours is zero but by a chance of 2^-64.
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
