//! What goes through the UDP sockets of a worker's tunnels: superframes, for which a socket is the fastest door, or single
//! frames, for which AF_XDP is.

use std::time::{Duration, Instant};

/// How long one look takes.
const LOOK: Duration = Duration::from_millis(50);

/// Large datagrams alone in their frames, in one look, that are worth another door: about 10 Mbit/s.
const LARGE: u32 = 64;

/// Octets from which a datagram is large: acknowledgements stay below, and come one by one from any device.
const LARGE_OCTETS: usize = 512;

/// The same for datagrams of any size: 50,000 a second.
const MANY: u32 = 2_500;

/// A look at what arrives and leaves.
#[derive(Debug)]
pub struct Sight {
    since: Instant,
    large: u32,
    alone: u32,
    together: u32,
}

impl Sight {
    /// The first look, from `now` on.
    pub fn new(now: Instant) -> Self {
        Self { since: now, large: 0, alone: 0, together: 0 }
    }

    /// Sees a message of `datagrams` datagrams, the first of `octets` octets.
    pub fn take(&mut self, datagrams: usize, octets: usize) {
        if datagrams > 1 {
            self.together = self.together.saturating_add(datagrams as u32);
        } else {
            self.alone = self.alone.saturating_add(1);
            self.large = self.large.saturating_add(u32::from(octets >= LARGE_OCTETS));
        }
    }

    /// Whether most datagrams are alone, and so many that it matters; a new look begins when that is seen, or when this
    /// one is over.
    pub fn shows_single_frames(&mut self, now: Instant) -> bool {
        let shows = self.alone > self.together && (self.large >= LARGE || self.alone >= MANY);
        if shows || now.duration_since(self.since) >= LOOK {
            *self = Self::new(now);
        }
        shows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(messages: &[(usize, usize)], times: usize) -> bool {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        (0..times).any(|_| {
            messages.iter().for_each(|(datagrams, octets)| sight.take(*datagrams, *octets));
            sight.shows_single_frames(start)
        })
    }

    #[test]
    fn a_stream_of_single_frames_is_seen() {
        assert!(look(&[(1, 1468)], 100));
        assert!(look(&[(1, 108)], 3000));
    }

    #[test]
    fn superframes_with_single_frames_between_are_left_to_the_socket() {
        assert!(!look(&[(46, 1468), (1, 1468)], 10_000));
    }

    #[test]
    fn acknowledgements_and_a_few_packets_decide_nothing() {
        assert!(!look(&[(1, 72)], 1000));
        assert!(!look(&[(1, 1468)], 20));
    }

    #[test]
    fn what_was_seen_in_one_look_does_not_count_for_the_next() {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        for look in 1..100 {
            (0..50).for_each(|_| sight.take(1, 1468));
            assert!(!sight.shows_single_frames(start + LOOK * look));
        }
    }
}
