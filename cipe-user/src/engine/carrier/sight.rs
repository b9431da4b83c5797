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
    received: Seen,
    sent: Seen,
}

/// Datagrams of one direction.
#[derive(Debug, Default)]
struct Seen {
    large: u32,
    alone: u32,
    together: u32,
}

impl Seen {
    fn take(&mut self, datagrams: usize, octets: usize) {
        if datagrams > 1 {
            self.together = self.together.saturating_add(datagrams as u32);
        } else {
            self.alone = self.alone.saturating_add(1);
            self.large = self.large.saturating_add(u32::from(octets >= LARGE_OCTETS));
        }
    }
}

impl Sight {
    /// The first look, from `now` on.
    pub fn new(now: Instant) -> Self {
        Self { since: now, received: Seen::default(), sent: Seen::default() }
    }

    /// Sees a message arrive of `datagrams` datagrams, the first of `octets` octets.
    pub fn receive(&mut self, datagrams: usize, octets: usize) {
        self.received.take(datagrams, octets);
    }

    /// Sees so many datagrams leave in one call. Of what leaves, only very many that leave alone call for another door: on it,
    /// nothing can come in as a superframe any more.
    pub fn send(&mut self, datagrams: usize) {
        self.sent.take(datagrams, 0);
    }

    /// Whether most datagrams are alone, and so many that it matters; a new look begins when that is seen, or when this
    /// one is over. Large ones that arrive alone are judged by what arrives: how they are answered is another matter.
    pub fn shows_single_frames(&mut self, now: Instant) -> bool {
        let Self { received, sent, .. } = self;
        let alone = received.alone.saturating_add(sent.alone);
        let many = alone >= MANY && alone > received.together.saturating_add(sent.together);
        let shows = many || received.large >= LARGE && received.alone > received.together;
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
            messages.iter().for_each(|(datagrams, octets)| sight.receive(*datagrams, *octets));
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
    fn what_leaves_together_does_not_hide_what_arrives_alone() {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        sight.send(1000);
        (0..LARGE).for_each(|_| sight.receive(1, 1468));
        assert!(sight.shows_single_frames(start));
    }

    #[test]
    fn of_what_leaves_only_very_many_alone_count() {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        (0..MANY - 1).for_each(|_| sight.send(1));
        assert!(!sight.shows_single_frames(start));
        sight.send(1);
        assert!(sight.shows_single_frames(start));
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
            (0..50).for_each(|_| sight.receive(1, 1468));
            assert!(!sight.shows_single_frames(start + LOOK * look));
        }
    }
}
