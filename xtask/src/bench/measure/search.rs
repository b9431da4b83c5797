//! The search for the highest rate without loss: a flood gives the first rate; then the rate rises in steps, and then it is
//! bisected between a rate that passed and one that failed.

use anyhow::Result;
use cipe_tests::traffic::{Pace, Report};

/// Share of datagrams that may be lost.
const MAX_LOSS: f64 = 0.001;
/// The search ends when the failed rate is this close to the passed one.
const FINAL_RATIO: f64 = 1.05;
/// Factor of a step up while no rate has failed yet.
const STEP_UP: f64 = 1.35;
/// Factor of a step down while no rate has passed yet.
const STEP_DOWN: f64 = 1.5;
/// Below this share of the requested rate, the sender is at its limit.
const MIN_SENT_SHARE: f64 = 0.85;

/// The result of a trial.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Trial {
    /// Datagrams a second that were really sent.
    pub sent: f64,
    /// Datagrams a second that arrived.
    pub arrived: f64,
    /// Share that did not arrive.
    pub loss: f64,
}

impl From<&Report> for Trial {
    fn from(report: &Report) -> Self {
        Self { sent: report.sent_a_second(), arrived: report.total.datagrams_a_second(), loss: report.loss() }
    }
}

/// The result of the search.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Found {
    /// The highest rate really sent that lost at most [`MAX_LOSS`]; 0 if none did.
    pub rate: f64,
    /// Rate of the flood that arrived.
    pub flood: f64,
}

/// Searches with at most `steps` trials in addition to the flood.
///
/// # Errors
/// A trial fails.
pub(crate) fn loss_free(steps: usize, mut trial: impl FnMut(Pace) -> Result<Trial>) -> Result<Found> {
    let flood = trial(Pace::Flood)?.arrived;
    let mut found = Found { rate: 0.0, flood };
    let (mut passed, mut failed) = (None, None);
    let mut rate = flood.max(2000.0);
    for _ in 0..steps {
        let result = trial(Pace::Fixed(rate as u64))?;
        if result.loss <= MAX_LOSS {
            found.rate = result.sent.max(found.rate);
            passed = Some(rate);
            if result.sent < rate * MIN_SENT_SHARE {
                break;
            }
        } else {
            failed = Some(rate);
        }
        rate = match (passed, failed) {
            (Some(low), Some(high)) if high / low < FINAL_RATIO => break,
            (Some(low), Some(high)) => (low * high).sqrt(),
            (None, _) => rate / STEP_DOWN,
            (_, None) => rate * STEP_UP,
        };
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tunnel that loses every datagram above `capacity`, and a sender that reaches the rate `sender`.
    fn search(capacity: f64, sender: f64, collapse: f64) -> Found {
        loss_free(12, |pace| {
            let sent = if let Pace::Fixed(rate) = pace { sender.min(rate as f64) } else { sender };
            let arrived = if sent > capacity { capacity * collapse } else { sent };
            Ok(Trial { sent, arrived, loss: 1.0 - arrived / sent })
        })
        .expect("no trial fails")
    }

    #[test]
    fn the_rate_found_is_just_below_the_capacity() {
        for (capacity, collapse) in [(100_000.0, 1.0), (35_000.0, 0.7), (420_000.0, 0.2)] {
            let found = search(capacity, 900_000.0, collapse);
            assert!(
                found.rate <= capacity * 1.001 && found.rate > capacity / FINAL_RATIO / 1.001,
                "{capacity}: {found:?}"
            );
            assert_eq!(found.flood, capacity * collapse);
        }
    }

    #[test]
    fn a_sender_at_its_end_ends_the_search() {
        let found = search(1e9, 600_000.0, 1.0);
        assert_eq!(found, Found { rate: 600_000.0, flood: 600_000.0 });
    }

    #[test]
    fn a_tunnel_that_always_loses_has_no_rate() {
        let lossy = |_| Ok(Trial { sent: 1000.0, arrived: 900.0, loss: 0.1 });
        assert_eq!(loss_free(5, lossy).expect("no trial fails").rate, 0.0);
    }
}
