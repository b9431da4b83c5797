//! Limits attempts whose reason anybody can forge: a packet that does not open proves nothing.

use std::time::Duration;

/// The first pause between two such attempts.
const SHORTEST: Duration = Duration::from_secs(5);
/// The longest one; also the time without such an attempt after which the pause is halved.
const LONGEST: Duration = Duration::from_secs(320);

/// The pause after the last attempt of this kind. Neither a handshake nor a packet ends it, as a forged packet causes both.
#[derive(Default)]
pub(super) struct BackOff(Option<(Duration, Duration)>);

impl BackOff {
    /// Whether an attempt may begin; if so, it is counted as begun.
    pub(super) fn begin(&mut self, now: Duration) -> bool {
        let next = match self.0 {
            None => SHORTEST,
            Some((began, pause)) => {
                let passed = now.saturating_sub(began);
                let halvings = (passed.as_secs() / LONGEST.as_secs()).min(8);
                let pause = (pause / (1 << halvings)).max(SHORTEST);
                if passed < pause {
                    return false;
                }
                (2 * pause).min(LONGEST)
            }
        };
        self.0 = Some((now, next));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_and_is_halved_in_quiet_times() {
        let mut backoff = BackOff::default();
        let begun: Vec<u64> = (0..2_000).filter(|second| backoff.begin(Duration::from_secs(*second))).collect();
        assert_eq!(begun, [0, 5, 15, 35, 75, 155, 315, 635, 955, 1275, 1595, 1915]);
        // The pause of 320 s is halved three times: 40 s, and the next one is 80 s.
        let quiet = 1_915 + 3 * 320;
        let begun: Vec<u64> =
            (quiet..quiet + 200).filter(|second| backoff.begin(Duration::from_secs(*second))).collect();
        assert_eq!(begun, [quiet, quiet + 80]);
    }
}
