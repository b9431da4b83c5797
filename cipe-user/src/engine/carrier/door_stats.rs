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

/// Datagrams that leave in one look that are worth another way out: 10,000 a second.
const MUCH: u32 = 500;

/// How often that is told at most: whoever hears it may have no other way.
const TELL: Duration = Duration::from_secs(1);

/// What a look shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shows {
    /// Most datagrams are alone, and so many that it matters.
    SingleFrames,
    /// Much is sent.
    ManySent,
}

/// A look at what arrives and leaves.
#[derive(Debug)]
pub(crate) struct Sight {
    since: Instant,
    /// When it was told last that much is sent.
    told: Option<Instant>,
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
    pub(crate) fn new(now: Instant) -> Self {
        Self { since: now, told: None, received: Seen::default(), sent: Seen::default() }
    }

    /// Sees a message arrive of `datagrams` datagrams, the first of `octets` octets.
    pub(crate) fn receive(&mut self, datagrams: usize, octets: usize) {
        self.received.take(datagrams, octets);
    }

    /// Sees so many datagrams leave in one call. Of what leaves, only very many that leave alone call for another door: on it,
    /// nothing can come in as a superframe any more.
    pub(crate) fn send(&mut self, datagrams: usize) {
        self.sent.take(datagrams, 0);
    }

    /// What this look shows so far, if anything; a new one begins with single frames, or when this one is over. Large
    /// datagrams that arrive alone are judged by what arrives: how they are answered is another matter.
    pub(crate) fn shows(&mut self, now: Instant) -> Option<Shows> {
        let Self { received, sent, .. } = self;
        let alone = received.alone.saturating_add(sent.alone);
        let many = alone >= MANY && alone > received.together.saturating_add(sent.together);
        let single_frames = many || received.large >= LARGE && received.alone > received.together;
        let untold = self.told.is_none_or(|told| now.duration_since(told) >= TELL);
        let much = untold && sent.alone.saturating_add(sent.together) >= MUCH;
        if single_frames || now.duration_since(self.since) >= LOOK {
            *self = Self { told: self.told, ..Self::new(now) };
        }
        if single_frames {
            return Some(Shows::SingleFrames);
        }
        self.told = if much { Some(now) } else { self.told };
        much.then_some(Shows::ManySent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows_single_frames(sight: &mut Sight, now: Instant) -> bool {
        sight.shows(now) == Some(Shows::SingleFrames)
    }

    fn look(messages: &[(usize, usize)], times: usize) -> bool {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        (0..times).any(|_| {
            messages.iter().for_each(|(datagrams, octets)| sight.receive(*datagrams, *octets));
            shows_single_frames(&mut sight, start)
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
        assert!(shows_single_frames(&mut sight, start));
    }

    #[test]
    fn of_what_leaves_only_very_many_alone_count() {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        (0..MANY - 1).for_each(|_| sight.send(1));
        assert!(!shows_single_frames(&mut sight, start));
        sight.send(1);
        assert!(shows_single_frames(&mut sight, start));
    }

    #[test]
    fn much_that_leaves_is_told_once_a_second() {
        let start = Instant::now();
        let mut sight = Sight::new(start);
        let looks = 100;
        let told = (0..looks).filter(|look| {
            (0..MUCH).for_each(|_| sight.send(20));
            sight.shows(start + LOOK * *look) == Some(Shows::ManySent)
        });
        assert_eq!(told.count() as u32, (LOOK * looks).as_secs() as u32);
        assert_eq!(Sight::new(start).shows(start), None);
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
            assert!(!shows_single_frames(&mut sight, start + LOOK * look));
        }
    }
}
