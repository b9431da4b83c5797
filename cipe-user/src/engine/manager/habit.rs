//! Whether single frames come on a device that might deliver superframes, and when the UDP sockets get it back to find that out anew.

use std::time::{Duration, Instant};

/// How long a device has to be calm until the UDP sockets get it back.
const MIN_CALM_TIME: Duration = Duration::from_secs(10);

/// The same at most, where single frames came again soon each time.
const MAX_CALM_TIME: Duration = Duration::from_secs(640);

/// Interval between two counts of the datagrams.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

/// Datagrams per second up to which a device is calm. It is far below the rate that shows single frames (`carrier/door_stats.rs`), if
/// they come evenly.
const MAX_CALM_RATE: u64 = 500;

/// The observations of one device.
#[derive(Debug)]
pub(super) struct Habit {
    single_frames: bool,
    /// How long it has to be calm.
    wait: Duration,
    /// When the UDP sockets got it back.
    left: Option<Instant>,
    calm: Option<Calm>,
}

#[derive(Debug)]
struct Calm {
    since: Instant,
    /// When the datagrams were counted last.
    counted: Instant,
    /// Datagrams that had come until then.
    total: u64,
}

impl Default for Habit {
    fn default() -> Self {
        Self { single_frames: false, wait: MIN_CALM_TIME, left: None, calm: None }
    }
}

impl Habit {
    /// Whether single frames come in numbers, as far as is known.
    pub(super) fn has_single_frames(&self) -> bool {
        self.single_frames
    }

    /// Notes that single frames come in numbers; returns whether that is new. The sooner they come again, the longer it takes until the device
    /// counts as calm.
    pub(super) fn see_single_frames(&mut self, now: Instant) -> bool {
        if self.single_frames {
            return false;
        }
        let soon = self.left.is_some_and(|left| now.duration_since(left) < self.wait);
        self.wait = if soon { (2 * self.wait).min(MAX_CALM_TIME) } else { MIN_CALM_TIME };
        self.single_frames = true;
        true
    }

    /// Takes the number of authentic datagrams through AF_XDP so far; returns whether the device was calm for so long that the UDP sockets are
    /// to have it back.
    pub(super) fn is_calm(&mut self, total: u64, now: Instant) -> bool {
        let calm = self.calm.get_or_insert(Calm { since: now, counted: now, total });
        let passed = now.duration_since(calm.counted);
        if passed < COUNT_INTERVAL {
            return false;
        }
        let datagrams = total.saturating_sub(calm.total);
        let since = if datagrams as f64 > MAX_CALM_RATE as f64 * passed.as_secs_f64() { now } else { calm.since };
        *calm = Calm { since, counted: now, total };
        now.duration_since(since) >= self.wait
    }

    /// The UDP sockets get the device back; returns how long it was calm at least.
    pub(super) fn leave(&mut self, now: Instant) -> Duration {
        (self.single_frames, self.left, self.calm) = (false, Some(now), None);
        self.wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds until a device is calm that gets so many datagrams a second, up to an hour.
    fn seconds(habit: &mut Habit, rate: u64, start: Instant) -> Option<u64> {
        (0..3600).find(|second| habit.is_calm(rate * second, start + Duration::from_secs(*second)))
    }

    #[test]
    fn a_device_with_little_traffic_is_calm_after_ten_seconds() {
        for rate in [0, 1, MAX_CALM_RATE] {
            assert_eq!(seconds(&mut Habit::default(), rate, Instant::now()), Some(10), "{rate}");
        }
    }

    #[test]
    fn a_device_under_load_is_never_calm() {
        assert_eq!(seconds(&mut Habit::default(), MAX_CALM_RATE + 1, Instant::now()), None);
    }

    #[test]
    fn calm_begins_anew_after_a_burst() {
        let (mut habit, start) = (Habit::default(), Instant::now());
        let total = |second: u64| if second < 7 { 0 } else { 10_000 };
        let calm = (0..100).find(|second| habit.is_calm(total(*second), start + Duration::from_secs(*second)));
        assert_eq!(calm, Some(17));
    }

    #[test]
    fn a_look_that_is_late_judges_by_the_rate() {
        let (mut habit, start) = (Habit::default(), Instant::now());
        assert!(!habit.is_calm(0, start));
        assert!(!habit.is_calm(100, start + Duration::from_millis(999)));
        assert!(habit.is_calm(20 * MAX_CALM_RATE, start + Duration::from_secs(20)));
    }

    #[test]
    fn bursts_that_come_again_and_again_change_the_door_ever_less_often() {
        let (mut habit, mut now) = (Habit::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..9 {
            assert!(habit.see_single_frames(now) && !habit.see_single_frames(now));
            let calm = seconds(&mut habit, 1, now).unwrap();
            now += Duration::from_secs(calm);
            assert_eq!(habit.leave(now).as_secs(), calm);
            waits.push(calm);
            now += Duration::from_secs(5);
        }
        assert_eq!(waits, [10, 20, 40, 80, 160, 320, 640, 640, 640]);
        // A device that was right at the UDP sockets for long begins from the start.
        now += Duration::from_secs(640);
        assert!(habit.see_single_frames(now));
        assert_eq!(seconds(&mut habit, 0, now), Some(10));
    }
}
