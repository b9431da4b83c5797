//! Which kinds of superframes a device refuses. A full queue is no refusal.

use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::inner::headers::TCP;

/// Kinds of superframes that a device or the kernel may not be able to segment.
const KINDS: [&str; 3] = ["TCP over IPv4", "TCP over IPv6", "UDP"];

/// Maximum refusals in a row before superframes are stopped.
const MAX_REFUSALS: u32 = 8;

/// How long they are stopped: at first, and at most. The time doubles each time.
const MIN_STOP_TIME: Duration = Duration::from_secs(10);
const MAX_STOP_TIME: Duration = Duration::from_secs(640);

/// The refusals of one device, by kind.
#[derive(Debug, Default)]
pub(super) struct Refusals([KindRefusals; KINDS.len()]);

impl Refusals {
    /// Whether superframes with these IP headers may be sent now.
    pub(super) fn allow(&self, headers: &[u8], now: Instant) -> bool {
        self.0[kind(headers)].allow(now)
    }

    /// Records the result of sending a superframe. If superframes of its kind are now stopped, returns the kind, the
    /// error, and the time.
    pub(super) fn record(
        &mut self,
        headers: &[u8],
        sent: Result<(), Errno>,
        now: Instant,
    ) -> Option<(&'static str, Errno, Duration)> {
        let kind = kind(headers);
        self.0[kind].record(sent, now).map(|(errno, wait)| (KINDS[kind], errno, wait))
    }
}

/// The index in [`KINDS`].
fn kind(headers: &[u8]) -> usize {
    match headers {
        [0x40..=0x4F, _, _, _, _, _, _, _, _, TCP, ..] => 0,
        [0x60..=0x6F, _, _, _, _, _, TCP, ..] => 1,
        _ => 2,
    }
}

#[derive(Debug)]
struct KindRefusals {
    count: u32,
    until: Option<Instant>,
    wait: Duration,
}

impl Default for KindRefusals {
    fn default() -> Self {
        Self { count: 0, until: None, wait: MIN_STOP_TIME }
    }
}

impl KindRefusals {
    fn allow(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| until <= now)
    }

    fn record(&mut self, sent: Result<(), Errno>, now: Instant) -> Option<(Errno, Duration)> {
        match sent {
            Ok(()) => *self = Self::default(),
            // A full queue drops single frames too, and accepts superframes again later.
            Err(Errno::NOBUFS | Errno::AGAIN) => {}
            Err(errno) => {
                self.count += 1;
                if self.count >= MAX_REFUSALS {
                    let wait = self.wait;
                    *self = Self { count: 0, until: Some(now + wait), wait: (2 * wait).min(MAX_STOP_TIME) };
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
        let (mut refusals, now) = (KindRefusals::default(), Instant::now());
        for errno in [Errno::NOBUFS, Errno::AGAIN].repeat(100) {
            assert_eq!(refusals.record(Err(errno), now), None);
            assert!(refusals.allow(now));
        }
    }

    #[test]
    fn a_device_that_takes_none_is_asked_again_ever_later() {
        let (mut refusals, mut now) = (KindRefusals::default(), Instant::now());
        for seconds in [10, 20, 40, 80, 160, 320, 640, 640] {
            let wait = Duration::from_secs(seconds);
            let told: Vec<_> = (0..MAX_REFUSALS).filter_map(|_| refusals.record(Err(Errno::INVAL), now)).collect();
            assert_eq!(told, [(Errno::INVAL, wait)]);
            assert!(!refusals.allow(now + wait - Duration::from_millis(1)));
            now += wait;
            assert!(refusals.allow(now));
        }
        assert_eq!(refusals.record(Ok(()), now), None);
        let told = (0..MAX_REFUSALS).filter_map(|_| refusals.record(Err(Errno::INVAL), now)).next();
        assert_eq!(told, Some((Errno::INVAL, MIN_STOP_TIME)), "a success resets the count");
    }

    #[test]
    fn a_kind_is_given_up_and_the_others_are_not() {
        let (mut tcp, mut udp) = ([0x45; 20], [0x45; 20]);
        (tcp[9], udp[9]) = (TCP, 17);
        let (mut refusals, now) = (Refusals::default(), Instant::now());
        let told = (0..MAX_REFUSALS).filter_map(|_| refusals.record(&udp, Err(Errno::INVAL), now)).next();
        assert_eq!(told, Some(("UDP", Errno::INVAL, MIN_STOP_TIME)));
        assert!(!refusals.allow(&udp, now));
        assert!(refusals.allow(&tcp, now) && refusals.allow(&[0x60, 0, 0, 0, 0, 0, TCP], now));
    }
}
