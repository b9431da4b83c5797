//! What a device says to superframes of each kind: a queue that is full, or that it does not take such at all.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::inner::headers::TCP;

/// Kinds of superframes that a device or the kernel may or may not cut.
const KINDS: [&str; 3] = ["TCP over IPv4", "TCP over IPv6", "UDP"];

/// Refusals in a row after which no more are sent.
const ENOUGH: u32 = 8;

/// For how long, at first and at most; it doubles each time.
const LEAST_WAIT: Duration = Duration::from_secs(10);
const MOST_WAIT: Duration = Duration::from_secs(640);

/// Of one device, by kind.
#[derive(Debug, Default)]
pub(super) struct Refusals([OfKind; KINDS.len()]);

impl Refusals {
    /// Whether superframes with such IP headers are to be sent now.
    pub(super) fn allow(&self, headers: &[u8], now: Instant) -> bool {
        self.0[kind(headers)].allow(now)
    }

    /// Takes up how sending one went. Returns the kind, why, and for how long none is to be sent, when that begins.
    pub(super) fn take_in(
        &mut self,
        headers: &[u8],
        sent: Result<(), Errno>,
        now: Instant,
    ) -> Option<(&'static str, Errno, Duration)> {
        let kind = kind(headers);
        self.0[kind].take_in(sent, now).map(|(errno, wait)| (KINDS[kind], errno, wait))
    }
}

/// Index in [`KINDS`].
fn kind(headers: &[u8]) -> usize {
    match headers {
        [0x40..=0x4F, _, _, _, _, _, _, _, _, TCP, ..] => 0,
        [0x60..=0x6F, _, _, _, _, _, TCP, ..] => 1,
        _ => 2,
    }
}

#[derive(Debug)]
struct OfKind {
    in_a_row: u32,
    until: Option<Instant>,
    wait: Duration,
}

impl Default for OfKind {
    fn default() -> Self {
        Self { in_a_row: 0, until: None, wait: LEAST_WAIT }
    }
}

impl OfKind {
    fn allow(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    fn take_in(&mut self, sent: Result<(), Errno>, now: Instant) -> Option<(Errno, Duration)> {
        match sent {
            Ok(()) => *self = Self::default(),
            // A full queue drops single frames, too, and takes superframes again when it has sent some.
            Err(Errno::NOBUFS | Errno::AGAIN) => {}
            Err(errno) => {
                self.in_a_row += 1;
                if self.in_a_row >= ENOUGH {
                    let wait = self.wait;
                    *self = Self { in_a_row: 0, until: Some(now + wait), wait: (2 * wait).min(MOST_WAIT) };
                    return Some((errno, wait));
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_is_no_reason() {
        let (mut refusals, now) = (OfKind::default(), Instant::now());
        for errno in [Errno::NOBUFS, Errno::AGAIN].repeat(100) {
            assert_eq!(refusals.take_in(Err(errno), now), None);
            assert!(refusals.allow(now));
        }
    }

    #[test]
    fn a_device_that_takes_none_is_asked_again_ever_later() {
        let (mut refusals, mut now) = (OfKind::default(), Instant::now());
        for seconds in [10, 20, 40, 80, 160, 320, 640, 640] {
            let wait = Duration::from_secs(seconds);
            let told: Vec<_> = (0..ENOUGH).filter_map(|_| refusals.take_in(Err(Errno::INVAL), now)).collect();
            assert_eq!(told, [(Errno::INVAL, wait)]);
            assert!(!refusals.allow(now + wait - Duration::from_millis(1)));
            now += wait;
            assert!(refusals.allow(now));
        }
        assert_eq!(refusals.take_in(Ok(()), now), None);
        let told = (0..ENOUGH).filter_map(|_| refusals.take_in(Err(Errno::INVAL), now)).next();
        assert_eq!(told, Some((Errno::INVAL, LEAST_WAIT)), "one that was taken ends the row");
    }

    #[test]
    fn a_kind_is_given_up_and_the_others_are_not() {
        let (mut tcp, mut udp) = ([0x45; 20], [0x45; 20]);
        (tcp[9], udp[9]) = (TCP, 17);
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let told = (0..ENOUGH).filter_map(|_| refusals.take_in(&udp, Err(Errno::INVAL), now)).next();
        assert_eq!(told, Some(("UDP", Errno::INVAL, LEAST_WAIT)));
        assert!(!refusals.allow(&udp, now));
        assert!(refusals.allow(&tcp, now) && refusals.allow(&[0x60, 0, 0, 0, 0, 0, TCP], now));
    }
}
