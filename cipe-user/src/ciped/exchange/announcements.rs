//! When NK_IND have left for our keys, and whether the peer may have taken another one last than that of the key in use: an original
//! takes whatever NK_IND comes last, perhaps that of an earlier key.

use std::time::Duration;

use super::retry::Timing;

/// How much later than the next key's NK_IND one may arrive.
const REORDERED: Duration = Duration::from_secs(2);

/// All times on the clock of the exchange.
pub(super) struct Announcements {
    timing: Timing,
    /// When the last one left for the key that is announced, or in use.
    last: Option<Duration>,
    /// When the last one left for any key before that.
    of_earlier_key: Option<Duration>,
    /// When a key was announced last because the peer might lack the one in use.
    diverged: Option<Duration>,
    /// When the key in use was announced last once more.
    repeated: Option<Duration>,
    /// When the key in use is to be announced once more.
    due: Option<Duration>,
}

impl Announcements {
    /// None has left.
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, last: None, of_earlier_key: None, diverged: None, repeated: None, due: None }
    }

    /// All keys are lost. Those of before may still arrive.
    pub(super) fn start_over(&mut self) {
        (self.diverged, self.due) = (None, None);
    }

    /// The first one of a key leaves.
    pub(super) fn begin(&mut self, now: Duration) {
        self.another(now);
        self.due = None;
    }

    /// The first one leaves of a key that takes the place of one without an answer.
    pub(super) fn another(&mut self, now: Duration) {
        self.of_earlier_key = self.last.replace(now);
    }

    /// One leaves again for the same key.
    pub(super) fn again(&mut self, now: Duration) {
        self.last = Some(now);
    }

    /// One leaves once more for the key in use.
    pub(super) fn once_more(&mut self, now: Duration) {
        (self.repeated, self.last) = (Some(now), Some(now));
    }

    /// Whether a key may be announced because the peer might lack the one in use: once per tokxc at most. If so, that is noted.
    pub(super) fn may_diverge(&mut self, now: Duration) -> bool {
        let may = self.diverged.is_none_or(|last| now >= last + self.timing.tokxc);
        if may {
            self.diverged = Some(now);
        }
        may
    }

    /// The peer has taken a new key, which is in use from now on. One that `keeps_keys` takes none that is older.
    pub(super) fn taken(&mut self, now: Duration, keeps_keys: bool) {
        let may_be_overtaken = !keeps_keys && self.of_earlier_key.is_some_and(|at| now < at + REORDERED);
        self.due = may_be_overtaken.then(|| self.not_too_often(now + REORDERED));
    }

    /// The peer has taken the key in use once more. What made it doubtful meanwhile is looked into again.
    pub(super) fn taken_again(&mut self, now: Duration) {
        self.due = self.due.map(|_| self.not_too_often(now));
    }

    /// The peer may have taken another key than the one in use.
    pub(super) fn doubt(&mut self, now: Duration) {
        self.due = Some(self.not_too_often(now));
    }

    /// Nothing is announced once more: no key came through.
    pub(super) fn give_up(&mut self) {
        self.due = None;
    }

    /// When the key in use is to be announced once more.
    pub(super) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Whether that is now; it is no longer due then.
    pub(super) fn take_due(&mut self, now: Duration) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// `at`, or later, so that the key in use is announced once more once per tokxc at most.
    fn not_too_often(&self, at: Duration) -> Duration {
        self.repeated.map_or(at, |last| at.max(last + self.timing.tokxc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn new() -> Announcements {
        Announcements::new(Timing::new(seconds(10)))
    }

    #[test]
    fn a_key_whose_announcement_may_be_overtaken_is_announced_once_more() {
        for (between, keeps_keys, due) in
            [(seconds(1), false, Some(103)), (seconds(2), false, None), (seconds(1), true, None)]
        {
            let mut announcements = new();
            announcements.begin(seconds(101) - between);
            announcements.begin(seconds(101));
            announcements.taken(seconds(101), keeps_keys);
            assert_eq!(announcements.due(), due.map(seconds), "{between:?}, {keeps_keys}");
        }
    }

    #[test]
    fn the_first_key_of_all_is_not_doubted() {
        let mut announcements = new();
        announcements.begin(seconds(1));
        announcements.again(seconds(2));
        announcements.taken(seconds(2), false);
        assert_eq!(announcements.due(), None);
    }

    #[test]
    fn the_key_in_use_is_announced_once_more_once_per_tokxc_at_most() {
        let mut announcements = new();
        announcements.doubt(seconds(5));
        assert!(!announcements.take_due(seconds(4)) && announcements.take_due(seconds(5)));
        announcements.once_more(seconds(5));
        announcements.taken_again(seconds(6));
        assert_eq!(announcements.due(), None, "nothing has made it doubtful");
        announcements.doubt(seconds(6));
        announcements.taken_again(seconds(7));
        assert_eq!(announcements.due(), Some(seconds(15)));
        announcements.begin(seconds(8));
        assert_eq!(announcements.due(), None, "there is another key");
    }

    #[test]
    fn a_peer_that_may_lack_the_key_is_told_of_another_once_per_tokxc_at_most() {
        let mut announcements = new();
        let may: Vec<u64> = (0..25).filter(|second| announcements.may_diverge(seconds(*second))).collect();
        assert_eq!(may, [0, 10, 20]);
        announcements.start_over();
        assert!(announcements.may_diverge(seconds(25)));
    }
}
