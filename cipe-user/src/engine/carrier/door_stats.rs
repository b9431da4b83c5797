//! Statistics of the authentic datagrams through the UDP sockets of a worker's tunnels: superframes, for which a socket is the
//! fastest door, or single frames, for which AF_XDP is.

use std::time::{Duration, Instant};

use super::Via;

/// Length of a measuring window.
const WINDOW: Duration = Duration::from_millis(50);

/// Minimum large datagrams per window, alone in their frames, for which AF_XDP pays: about 10 Mbit/s.
const MIN_LARGE: u32 = 64;

/// Minimum octets of a large datagram: acknowledgements are shorter, and arrive one by one from any device.
const MIN_LARGE_OCTETS: usize = 512;

/// Minimum datagrams of any size per window, alone in their frames, for which AF_XDP pays: 50,000 per second.
const MIN_ALONE: u32 = 2_500;

/// Minimum sent datagrams per window for which live frames may pay: 10,000 per second.
const MIN_SENT: u32 = 500;

/// Minimum time between two such reports: the receiver may not be able to act on them.
const MIN_REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// What the statistics suggest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DoorHint {
    /// Most datagrams are alone in their frames, and they are many.
    SingleFrames,
    /// Many datagrams are sent.
    ManySent,
}

/// The statistics of the current window.
#[derive(Debug)]
pub(crate) struct DoorStats {
    since: Instant,
    /// When it was last reported that many datagrams are sent.
    reported: Option<Instant>,
    received: Counts,
    sent: Counts,
}

/// The datagrams of one direction.
#[derive(Debug, Default)]
struct Counts {
    large: u32,
    alone: u32,
    together: u32,
}

/// The datagrams that were decrypted, by how they came. Only they count for the choice of a door: anybody can send others.
#[derive(Debug, Default)]
pub(crate) struct Authentic {
    /// By AF_XDP sockets.
    pub(crate) by_card: u64,
    by_socket: Counts,
}

impl Authentic {
    /// Counts a datagram of `octets` octets.
    pub(crate) fn count(&mut self, via: Via, octets: usize) {
        match via {
            Via::Card => self.by_card += 1,
            Via::Alone => self.by_socket.take(1, octets),
            Via::Superframe => self.by_socket.together = self.by_socket.together.saturating_add(1),
        }
    }
}

impl Counts {
    fn take(&mut self, datagrams: usize, octets: usize) {
        if datagrams > 1 {
            self.together = self.together.saturating_add(datagrams as u32);
        } else {
            self.alone = self.alone.saturating_add(1);
            self.large = self.large.saturating_add(u32::from(octets >= MIN_LARGE_OCTETS));
        }
    }

    fn add(&mut self, other: &Self) {
        self.large = self.large.saturating_add(other.large);
        self.alone = self.alone.saturating_add(other.alone);
        self.together = self.together.saturating_add(other.together);
    }
}

impl DoorStats {
    /// Starts the first window at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        Self { since: now, reported: None, received: Counts::default(), sent: Counts::default() }
    }

    /// Counts received datagrams.
    pub(crate) fn receive(&mut self, Authentic { by_socket, .. }: &Authentic) {
        self.received.add(by_socket);
    }

    /// Counts datagrams that are sent in one call. Sent datagrams suggest AF_XDP only if very many are sent alone,
    /// because with AF_XDP no superframes are received any more.
    pub(crate) fn send(&mut self, datagrams: usize) {
        self.sent.take(datagrams, 0);
    }

    /// Returns a suggestion, if there is one. A new window starts after single frames were found, or when the window is
    /// over. For large single datagrams only the receiving direction counts, whatever is sent.
    pub(crate) fn hint(&mut self, now: Instant) -> Option<DoorHint> {
        let Self { received, sent, .. } = self;
        let alone = received.alone.saturating_add(sent.alone);
        let many = alone >= MIN_ALONE && alone > received.together.saturating_add(sent.together);
        let single_frames = many || received.large >= MIN_LARGE && received.alone > received.together;
        let unreported = self.reported.is_none_or(|reported| now.duration_since(reported) >= MIN_REPORT_INTERVAL);
        let much = unreported && sent.alone.saturating_add(sent.together) >= MIN_SENT;
        if single_frames || now.duration_since(self.since) >= WINDOW {
            *self = Self { reported: self.reported, ..Self::new(now) };
        }
        if single_frames {
            return Some(DoorHint::SingleFrames);
        }
        self.reported = if much { Some(now) } else { self.reported };
        much.then_some(DoorHint::ManySent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shows_single_frames(stats: &mut DoorStats, now: Instant) -> bool {
        stats.hint(now) == Some(DoorHint::SingleFrames)
    }

    /// A message of so many datagrams, all authentic.
    fn receive(stats: &mut DoorStats, datagrams: usize, octets: usize) {
        let via = if datagrams > 1 { Via::Superframe } else { Via::Alone };
        let mut authentic = Authentic::default();
        (0..datagrams).for_each(|_| authentic.count(via, octets));
        stats.receive(&authentic);
    }

    fn look(messages: &[(usize, usize)], times: usize) -> bool {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        (0..times).any(|_| {
            messages.iter().for_each(|(datagrams, octets)| receive(&mut stats, *datagrams, *octets));
            shows_single_frames(&mut stats, start)
        })
    }

    #[test]
    fn a_stream_of_single_frames_is_seen() {
        assert!(look(&[(1, 1468)], 100));
        assert!(look(&[(1, 108)], 3000));
    }

    #[test]
    fn what_came_by_a_card_decides_nothing_about_the_socket() {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        let mut authentic = Authentic::default();
        (0..10_000).for_each(|_| authentic.count(Via::Card, 1468));
        assert_eq!(authentic.by_card, 10_000);
        stats.receive(&authentic);
        assert!(!shows_single_frames(&mut stats, start));
    }

    #[test]
    fn superframes_with_single_frames_between_are_left_to_the_socket() {
        assert!(!look(&[(46, 1468), (1, 1468)], 10_000));
    }

    #[test]
    fn what_leaves_together_does_not_hide_what_arrives_alone() {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        stats.send(1000);
        (0..MIN_LARGE).for_each(|_| receive(&mut stats, 1, 1468));
        assert!(shows_single_frames(&mut stats, start));
    }

    #[test]
    fn of_what_leaves_only_very_many_alone_count() {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        (0..MIN_ALONE - 1).for_each(|_| stats.send(1));
        assert!(!shows_single_frames(&mut stats, start));
        stats.send(1);
        assert!(shows_single_frames(&mut stats, start));
    }

    #[test]
    fn much_that_leaves_is_told_once_a_second() {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        let looks = 100;
        let reported = (0..looks).filter(|look| {
            (0..MIN_SENT).for_each(|_| stats.send(20));
            stats.hint(start + WINDOW * *look) == Some(DoorHint::ManySent)
        });
        assert_eq!(reported.count() as u32, (WINDOW * looks).as_secs() as u32);
        assert_eq!(DoorStats::new(start).hint(start), None);
    }

    #[test]
    fn acknowledgements_and_a_few_packets_decide_nothing() {
        assert!(!look(&[(1, 72)], 1000));
        assert!(!look(&[(1, 1468)], 20));
    }

    #[test]
    fn what_was_seen_in_one_look_does_not_count_for_the_next() {
        let start = Instant::now();
        let mut stats = DoorStats::new(start);
        for look in 1..100 {
            (0..50).for_each(|_| receive(&mut stats, 1, 1468));
            assert!(!shows_single_frames(&mut stats, start + WINDOW * look));
        }
    }
}
