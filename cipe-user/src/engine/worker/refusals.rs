//! What a device says to superframes of one kind: a queue that is full, or that it does not take such at all.

use std::time::{Duration, Instant};

use rustix::io::Errno;

/// Refusals in a row after which no more are sent.
const ENOUGH: u32 = 8;

/// For how long, at first and at most; it doubles each time.
const LEAST_WAIT: Duration = Duration::from_secs(10);
const MOST_WAIT: Duration = Duration::from_secs(640);

/// Of one kind.
#[derive(Debug)]
pub struct Refusals {
    in_a_row: u32,
    until: Option<Instant>,
    wait: Duration,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { in_a_row: 0, until: None, wait: LEAST_WAIT }
    }
}

impl Refusals {
    /// Whether such superframes are to be sent now.
    pub fn allow(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    /// Takes up how sending one went. Returns why and for how long none is to be sent, when that begins.
    pub fn take_in(&mut self, sent: Result<(), Errno>, now: Instant) -> Option<(Errno, Duration)> {
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
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        for errno in [Errno::NOBUFS, Errno::AGAIN].repeat(100) {
            assert_eq!(refusals.take_in(Err(errno), now), None);
            assert!(refusals.allow(now));
        }
    }

    #[test]
    fn a_device_that_takes_none_is_asked_again_ever_later() {
        let (mut refusals, mut now) = (Refusals::default(), Instant::now());
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
}
