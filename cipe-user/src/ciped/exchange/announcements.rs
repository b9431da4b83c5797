//! The times at which NK_IND messages were sent, and whether the peer may have taken another key than the one in use.
//! An original takes the key of the last NK_IND that arrives, which may be that of an earlier key.

use std::time::Duration;

use super::retry::Timing;

/// Maximum time by which the network delays an NK_IND behind the NK_IND of the next key.
const MAX_REORDER_DELAY: Duration = Duration::from_secs(2);

/// All times are on the clock of the exchange.
pub(super) struct Announcements {
    timing: Timing,
    /// When the last NK_IND was sent for the key that is announced or in use.
    last: Option<Duration>,
    /// When the last NK_IND was sent for any earlier key.
    of_earlier_key: Option<Duration>,
    /// When a new key was last announced because the peer might lack the key in use.
    diverged: Option<Duration>,
    /// When the key in use was last announced once more.
    repeated: Option<Duration>,
    /// When to announce the key in use once more.
    due: Option<Duration>,
}

impl Announcements {
    /// The state before the first NK_IND.
    pub(super) fn new(timing: Timing) -> Self {
        Self { timing, last: None, of_earlier_key: None, diverged: None, repeated: None, due: None }
    }

    /// All keys are lost. NK_IND messages of earlier keys may still arrive.
    pub(super) fn start_over(&mut self) {
        (self.diverged, self.due) = (None, None);
    }

    /// The first NK_IND of a key was sent.
    pub(super) fn first_sent(&mut self, now: Duration) {
        self.replacement_sent(now);
        self.due = None;
    }

    /// The first NK_IND was sent for a key that replaces one without an NK_ACK.
    pub(super) fn replacement_sent(&mut self, now: Duration) {
        self.of_earlier_key = self.last.replace(now);
    }

    /// An NK_IND was retransmitted for the same key.
    pub(super) fn retransmitted(&mut self, now: Duration) {
        self.last = Some(now);
    }

    /// The key in use was announced once more.
    pub(super) fn in_use_sent_again(&mut self, now: Duration) {
        (self.repeated, self.last) = (Some(now), Some(now));
    }

    /// Whether a key may be announced because the peer might lack the one in use: at most once per tokxc. If so, this
    /// counts as such an announcement.
    pub(super) fn may_diverge(&mut self, now: Duration) -> bool {
        let may = self.diverged.is_none_or(|last| now >= last + self.timing.tokxc);
        if may {
            self.diverged = Some(now);
        }
        may
    }

    /// The peer has taken a new key, which is in use from now on. A peer that `keeps_keys` never takes an older key.
    pub(super) fn taken_by_peer(&mut self, now: Duration, keeps_keys: bool) {
        let may_be_overtaken = !keeps_keys && self.of_earlier_key.is_some_and(|at| now < at + MAX_REORDER_DELAY);
        self.due = may_be_overtaken.then(|| self.not_too_often(now + MAX_REORDER_DELAY));
    }

    /// The peer has taken the key in use once more. If there were new doubts in the meantime, it is announced again
    /// later.
    pub(super) fn taken_again(&mut self, now: Duration) {
        self.due = self.due.map(|_| self.not_too_often(now));
    }

    /// The peer may have taken another key than the one in use.
    pub(super) fn doubt(&mut self, now: Duration) {
        self.due = Some(self.not_too_often(now));
    }

    /// The exchange has failed: the key in use is not announced once more.
    pub(super) fn give_up(&mut self) {
        self.due = None;
    }

    /// Returns when to announce the key in use once more.
    pub(super) fn due(&self) -> Option<Duration> {
        self.due
    }

    /// Whether to announce the key in use once more now. If so, it is no longer due.
    pub(super) fn take_due(&mut self, now: Duration) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// Returns `at`, or a later time, so that the key in use is announced once more at most once per tokxc.
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
            announcements.first_sent(seconds(101) - between);
            announcements.first_sent(seconds(101));
            announcements.taken_by_peer(seconds(101), keeps_keys);
            assert_eq!(announcements.due(), due.map(seconds), "{between:?}, {keeps_keys}");
        }
    }

    #[test]
    fn the_first_key_of_all_is_not_doubted() {
        let mut announcements = new();
        announcements.first_sent(seconds(1));
        announcements.retransmitted(seconds(2));
        announcements.taken_by_peer(seconds(2), false);
        assert_eq!(announcements.due(), None);
    }

    #[test]
    fn the_key_in_use_is_announced_once_more_once_per_tokxc_at_most() {
        let mut announcements = new();
        announcements.doubt(seconds(5));
        assert!(!announcements.take_due(seconds(4)) && announcements.take_due(seconds(5)));
        announcements.in_use_sent_again(seconds(5));
        announcements.taken_again(seconds(6));
        assert_eq!(announcements.due(), None, "nothing has made it doubtful");
        announcements.doubt(seconds(6));
        announcements.taken_again(seconds(7));
        assert_eq!(announcements.due(), Some(seconds(15)));
        announcements.first_sent(seconds(8));
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
