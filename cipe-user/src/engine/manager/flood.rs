//! A flood of datagrams that no key of a tunnel opens: whether it lasts, and whether a shield is worth its cost.

use std::time::{Duration, Instant};

/// How long few datagrams have to come until a flood is over, and how long few have to be dropped until a shield goes.
const MIN_CALM_TIME: Duration = Duration::from_secs(10);

/// Datagrams dropped per second up to which a shield is not worth its cost. A worker reports a flood from the same rate on.
const MAX_CALM_RATE: u64 = 500;

/// The first and the longest pause after a shield that dropped few datagrams all the time, because the programs do not see the flood.
const MIN_PAUSE: Duration = Duration::from_secs(30);
const MAX_PAUSE: Duration = Duration::from_secs(3600);

/// How long after a flood its pause and the number of floods are remembered.
const MEMORY: Duration = Duration::from_secs(600);

/// The floods of one tunnel. Its clock and the count of dropped datagrams are arguments.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flood {
    /// When many datagrams came last.
    seen: Instant,
    /// Whether they still come.
    is_on: bool,
    /// How many floods began, of which no end is forgotten.
    begun: u64,
    shield: Option<Drops>,
    /// The pause after the next shield that drops few.
    pause: Duration,
    /// When the tunnel may have a shield again.
    not_before: Instant,
}

/// The datagrams that a shield drops.
#[derive(Clone, Copy, Debug)]
struct Drops {
    /// Since when they are few.
    calm_since: Instant,
    /// Whether they were ever many.
    were_many: bool,
    /// When they were counted last, and how many there had been.
    counted: Instant,
    total: u64,
}

/// What has changed about a flood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing.
    None,
    /// The shield is not worth its cost.
    Unshield,
    /// The flood is over.
    Over,
    /// It has been over for so long that nothing needs to be remembered.
    Forgotten,
}

impl Flood {
    /// A tunnel that no flood was seen of.
    pub(super) fn new(now: Instant) -> Self {
        Self { seen: now, is_on: false, begun: 0, shield: None, pause: MIN_PAUSE, not_before: now }
    }

    /// Takes a worker's report of a flood. Returns the number of floods if this one has just begun.
    pub(super) fn reported(&mut self, now: Instant) -> Option<u64> {
        self.seen = now;
        let begins = !std::mem::replace(&mut self.is_on, true);
        self.begun += u64::from(begins);
        begins.then_some(self.begun)
    }

    /// The number of floods so far.
    pub(super) fn number(&self) -> u64 {
        self.begun
    }

    /// Whether the tunnel is to have a shield, and has none.
    pub(super) fn needs_shield(&self, now: Instant) -> bool {
        self.is_on && self.shield.is_none() && now >= self.not_before
    }

    /// Whether the tunnel has a shield.
    pub(super) fn has_shield(&self) -> bool {
        self.shield.is_some()
    }

    /// The tunnel has a shield from now on; `total`: the datagrams that the programs have dropped so far.
    pub(super) fn shielded(&mut self, total: u64, now: Instant) {
        self.shield = Some(Drops { calm_since: now, were_many: false, counted: now, total });
    }

    /// Takes the number of datagrams that the programs have dropped so far.
    pub(super) fn poll(&mut self, total: u64, now: Instant) -> Change {
        let mut change = Change::None;
        if let Some(drops) = &mut self.shield {
            if drops.are_many(total, now) {
                self.seen = now;
            }
            if now.duration_since(drops.calm_since) >= MIN_CALM_TIME {
                (self.not_before, self.pause) = match drops.were_many {
                    true => (now, MIN_PAUSE),
                    false => (now + self.pause, (2 * self.pause).min(MAX_PAUSE)),
                };
                self.shield = None;
                change = Change::Unshield;
            }
        }
        let calm = now.duration_since(self.seen);
        if self.is_on && self.shield.is_none() && calm >= MIN_CALM_TIME {
            self.is_on = false;
            return Change::Over;
        }
        if !self.is_on && calm >= MEMORY && now >= self.not_before { Change::Forgotten } else { change }
    }
}

impl Drops {
    /// Counts the datagrams since the last time; returns whether there were many.
    fn are_many(&mut self, total: u64, now: Instant) -> bool {
        let dropped = total.saturating_sub(self.total);
        let passed = now.duration_since(self.counted);
        (self.counted, self.total) = (now, total);
        let are_many = dropped as f64 > MAX_CALM_RATE as f64 * passed.as_secs_f64();
        if are_many {
            (self.calm_since, self.were_many) = (now, true);
        }
        are_many
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happened in a flood, with the second.
    #[derive(Debug, PartialEq, Eq)]
    enum Happened {
        Begun(u64),
        Shielded,
        Unshielded,
        Over,
        Forgotten,
    }
    use Happened::*;

    /// Lets `seconds` pass; `reported`: whether workers report a flood in that second; `rate`: datagrams that a shield drops in it.
    fn run(seconds: u64, reported: impl Fn(u64) -> bool, rate: impl Fn(u64) -> u64) -> Vec<(u64, Happened)> {
        let start = Instant::now();
        let (mut flood, mut total, mut happened) = (Flood::new(start), 7, Vec::new());
        for second in 0..seconds {
            let now = start + Duration::from_secs(second);
            total += if flood.has_shield() { rate(second) } else { 0 };
            match flood.poll(total, now) {
                Change::None => {}
                Change::Unshield => happened.push((second, Unshielded)),
                Change::Over => happened.push((second, Over)),
                Change::Forgotten => {
                    happened.push((second, Forgotten));
                    break;
                }
            }
            if reported(second) {
                happened.extend(flood.reported(now).map(|number| (second, Begun(number))));
                if flood.needs_shield(now) {
                    flood.shielded(total, now);
                    happened.push((second, Shielded));
                }
            }
        }
        happened
    }

    #[test]
    fn a_shield_goes_ten_seconds_after_the_flood_and_not_before() {
        let expected = |end| vec![(0, Begun(1)), (0, Shielded), (end, Over), (end + 590, Forgotten)];
        for end in [1, 20, 3000] {
            let rate = |second| if second <= end { MAX_CALM_RATE + 1 } else { MAX_CALM_RATE };
            assert_eq!(run(10_000, |second| second == 0, rate), expected(end + 10), "{end}");
        }
    }

    #[test]
    fn the_time_begins_anew_when_the_flood_comes_again() {
        let rate = |second| if (1..3).contains(&second) || second == 9 { 10_000 } else { 0 };
        let happened = run(100, |second| second == 0, rate);
        assert_eq!(happened, [(0, Begun(1)), (0, Shielded), (19, Over)]);
    }

    #[test]
    fn a_shield_that_sees_nothing_comes_again_after_growing_pauses_in_one_flood() {
        let happened = run(40_000, |second| second < 20_000, |_| 0);
        let shields: Vec<u64> = happened.iter().filter(|(_, what)| *what == Shielded).map(|(at, _)| *at).collect();
        assert_eq!(shields[..6], [0, 40, 110, 240, 490, 980]);
        assert!(shields.len() < 15, "{shields:?}");
        let pauses = shields.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(pauses.max() == Some(3610), "{shields:?}");
        let begun = happened.iter().filter(|(_, what)| matches!(what, Begun(_))).count();
        let over: Vec<_> = happened.iter().filter(|(_, what)| *what == Over).collect();
        assert_eq!((begun, over), (1, vec![&(20_009, Over)]));
    }

    #[test]
    fn short_floods_that_the_programs_do_not_see_wait_as_long() {
        let happened = run(10_000, |second| second % 20 == 0, |_| 0);
        assert!(happened.iter().filter(|(_, what)| *what == Shielded).count() < 12, "{happened:?}");
        assert!(happened.contains(&(9980, Begun(500))), "their number is remembered");
    }

    #[test]
    fn a_shield_that_worked_may_come_again_at_once() {
        let happened = run(60, |second| second < 30, |second| if second < 3 { 10_000 } else { 0 });
        assert_eq!(happened[..4], [(0, Begun(1)), (0, Shielded), (12, Unshielded), (12, Shielded)]);
        // This one dropped nothing.
        assert_eq!(happened[4..], [(22, Unshielded), (39, Over)]);
    }
}
