//! Whether the peer really is at another address than the known one. Until that is proven, only questions go there.
//!
//! An authentic packet does not prove its source address: somebody may have recorded it, or have caught it on its way. So
//! its source is a *candidate* only. It gets a CT_PING, under the static key, which every peer has. The mark in it depends
//! on the address, the time and a random key that never leaves the process. The peer is there if a CT_PONG with that mark
//! comes from there.
//!
//! No mark is stored, so there may be any number of candidates: a flood of recorded packets from many sources cannot
//! displace the question to the genuine peer. Only the number of questions is bounded, for packets under the static key
//! and under dynamic keys separately: after a restart recorded packets open under the static key only, so they take
//! nothing from a peer that has a dynamic key. A lost question is repeated when the next packet comes from there.

use std::hash::{BuildHasher, RandomState};
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::engine::bucket::Bucket;
use crate::engine::locked;

/// Octets of a mark.
const MARK: usize = 16;

/// The data of a CT_PING to a candidate: hexadecimal digits, since some peers may take it for a text. Other questions of
/// the engine have marks of other lengths.
pub(crate) type Mark = [u8; MARK];

/// How long a mark is valid: at least this long, and less than twice as long. Longer than any round trip.
const MARK_LIFE: Duration = Duration::from_secs(4);

/// Questions of one tunnel at once, and the time for one more.
const MAX_BURST: u32 = 8;
const REFILL_INTERVAL: Duration = Duration::from_millis(100);

/// Minimum time between two questions to the same address, if no other address got one in between.
const MIN_REPEAT_INTERVAL: Duration = Duration::from_millis(100);

/// How long after its last question the daemon's messages also go to a candidate.
const CANDIDATE_LIFE: Duration = Duration::from_secs(3);

/// The questions to candidates of one tunnel, shared by all workers.
pub struct Challenge {
    key: RandomState,
    start: Instant,
    state: Mutex<State>,
}

struct State {
    /// The candidate that got the last question, and when.
    last: Option<(SocketAddr, Instant)>,
    /// For packets under the static key, and under a dynamic key.
    budgets: [Bucket; 2],
}

impl Default for Challenge {
    fn default() -> Self {
        let start = Instant::now();
        let budget = Bucket::with(MAX_BURST, REFILL_INTERVAL, start);
        Self { key: RandomState::new(), start, state: Mutex::new(State { last: None, budgets: [budget; 2] }) }
    }
}

impl Challenge {
    /// Call this if an authentic packet, under a dynamic key or not, has come from another address than the peer's.
    /// Returns the mark of the question that is due, if any.
    pub fn ask(&self, candidate: SocketAddr, is_dynamic: bool, now: Instant) -> Option<Mark> {
        let mut state = locked(&self.state);
        let is_repeated = |(last, at): (SocketAddr, Instant)| {
            last == candidate && now.saturating_duration_since(at) < MIN_REPEAT_INTERVAL
        };
        if state.last.is_some_and(is_repeated) || !state.budgets[usize::from(is_dynamic)].take(now) {
            return None;
        }
        state.last = Some((candidate, now));
        Some(self.mark(candidate, self.period(now)))
    }

    /// Returns the last candidate, for a while after its last question.
    pub fn candidate(&self, now: Instant) -> Option<SocketAddr> {
        let (last, at) = locked(&self.state).last?;
        (now.saturating_duration_since(at) < CANDIDATE_LIFE).then_some(last)
    }

    /// Reads the data of a CT_PONG; returns whether it proves that the peer is at the address `from`.
    pub fn is_proof(&self, data: &[u8], from: SocketAddr, now: Instant) -> bool {
        // Filler may follow the mark.
        let Some(answer) = data.first_chunk::<MARK>() else { return false };
        let period = self.period(now);
        [Some(period), period.checked_sub(1)].into_iter().flatten().any(|period| self.mark(from, period) == *answer)
    }

    fn period(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / MARK_LIFE.as_secs()
    }

    fn mark(&self, candidate: SocketAddr, period: u64) -> Mark {
        let mut mark = [0; MARK];
        let hash = self.key.hash_one((candidate, period)).to_be_bytes();
        for (digits, octet) in mark.chunks_exact_mut(2).zip(hash) {
            digits.copy_from_slice(&[digit(octet >> 4), digit(octet & 15)]);
        }
        mark
    }
}

fn digit(value: u8) -> u8 {
    b"0123456789abcdef"[usize::from(value & 15)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: u16) -> SocketAddr {
        let [high, low] = host.to_be_bytes();
        SocketAddr::from(([198, 18, high, low], 6789))
    }

    #[test]
    fn only_the_mark_of_that_address_and_time_is_a_proof() {
        let (challenge, other) = (Challenge::default(), Challenge::default());
        let start = challenge.start;
        let mark = challenge.ask(at(1), true, start).unwrap();
        assert!(mark.iter().all(u8::is_ascii_hexdigit));
        let filled = [&mark[..], &[0; 100]].concat();
        assert!(challenge.is_proof(&mark, at(1), start) && challenge.is_proof(&filled, at(1), start));
        assert!(challenge.is_proof(&mark, at(1), start + MARK_LIFE), "on a path with a long round trip");
        assert!(!challenge.is_proof(&mark, at(1), start + 2 * MARK_LIFE), "a recorded answer");
        assert!(!challenge.is_proof(&mark, at(2), start), "of another address");
        assert!(!other.is_proof(&mark, at(1), start), "of another engine or tunnel");
        for wrong in [&mark[..15], &[b'0'; 16], &[]] {
            assert!(!challenge.is_proof(wrong, at(1), start));
        }
    }

    #[test]
    fn the_same_candidate_gets_few_questions_and_a_flood_of_candidates_not_many() {
        let challenge = Challenge::default();
        let ms = |ms| challenge.start + Duration::from_millis(ms);
        let asked = (0..1000).filter(|time| challenge.ask(at(1), false, ms(*time)).is_some()).count();
        assert_eq!(asked, 10);
        let flood = (1000..11_000).filter(|time| challenge.ask(at(*time as u16), false, ms(*time)).is_some()).count();
        assert!(flood <= 110, "{flood} questions in 10 s");
        assert!(
            challenge.ask(at(2), true, ms(11_000)).is_some(),
            "a peer with a dynamic key is asked beside the flood"
        );
    }

    #[test]
    fn a_peer_that_repeats_itself_is_asked_amid_a_flood() {
        let challenge = Challenge::default();
        // For each packet of the peer's, ten recorded ones come from other sources.
        let is_asked = |time: u64| {
            let from = if time.is_multiple_of(11) { at(0) } else { at(time as u16) };
            challenge.ask(from, false, challenge.start + Duration::from_millis(time)).is_some() && from == at(0)
        };
        assert!((0..5000).any(is_asked));
    }

    #[test]
    fn a_candidate_is_one_for_a_while() {
        let challenge = Challenge::default();
        let start = challenge.start;
        assert_eq!(challenge.candidate(start), None);
        challenge.ask(at(1), false, start);
        assert_eq!(challenge.candidate(start), Some(at(1)));
        assert_eq!(challenge.candidate(start + CANDIDATE_LIFE), None);
    }
}
