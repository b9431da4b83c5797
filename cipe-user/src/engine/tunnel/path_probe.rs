//! Asks the peer whether datagrams of the current size arrive, after an ICMP error that claims the opposite without
//! proof.
//!
//! Some routers quote so little of a datagram that the IV is missing; anybody may have sent such an error. So the peer
//! gets a few CT_PINGs of the maximum size, with DF. If it answers one, the error is ignored; if not, the error is
//! believed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::engine::locked;

/// Octets of a probe's mark, which the answer copies.
const MARK: usize = 12;

/// The data of a CT_PING that probes the path. Other questions of the engine have marks of other lengths.
pub(crate) type Mark = [u8; MARK];

/// Number of CT_PINGs before an error is believed, and the interval between them.
const MAX_PROBES: u32 = 3;
const PROBE_INTERVAL: Duration = Duration::from_millis(300);

/// How long errors without proof are ignored after an answer.
const IGNORE_TIME: Duration = Duration::from_secs(3);

/// Probes of one tunnel's path, shared by all workers.
#[derive(Debug, Default)]
pub struct PathProbe {
    /// Whether `state` has an open probe; it is read for each batch.
    is_open: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    open: Option<Open>,
    answered: Option<Instant>,
}

#[derive(Debug)]
struct Open {
    mark: Mark,
    /// The path MTU that the error claims, in octets.
    claimed: u32,
    sent: u32,
    due: Instant,
}

/// The next step of an open probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probing {
    /// Send a CT_PING with this mark.
    Send(Mark),
    /// There was no answer: apply the path MTU of the error, in octets.
    Believe(u32),
}

impl PathProbe {
    /// Starts a probe because an error without proof claims a path MTU of `claimed` octets; `mark` is random. Returns
    /// `false` if no probe is started, because one is open or the peer has just answered one.
    pub fn doubt(&self, claimed: u32, mark: Mark, now: Instant) -> bool {
        let mut state = locked(&self.state);
        let is_quiet = state.answered.is_some_and(|answered| now.saturating_duration_since(answered) < IGNORE_TIME);
        if is_quiet || state.open.is_some() {
            return false;
        }
        state.open = Some(Open { mark, claimed, sent: 0, due: now });
        self.is_open.store(true, Ordering::Relaxed);
        true
    }

    /// Whether a probe is open. Call [`Self::poll`] until it is not.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Returns the step that is due at `now`, if any.
    pub fn poll(&self, now: Instant) -> Option<Probing> {
        if !self.is_open() {
            return None;
        }
        let mut state = locked(&self.state);
        let open = state.open.as_mut().filter(|open| open.due <= now)?;
        if open.sent < MAX_PROBES {
            open.sent += 1;
            open.due = now + PROBE_INTERVAL;
            return Some(Probing::Send(open.mark));
        }
        let claimed = open.claimed;
        state.open = None;
        self.is_open.store(false, Ordering::Relaxed);
        Some(Probing::Believe(claimed))
    }

    /// Reads the data of a CT_PONG; returns whether it answers a probe.
    pub fn answered(&self, data: &[u8], now: Instant) -> bool {
        if !self.is_open() {
            return false;
        }
        let mut state = locked(&self.state);
        // Filler may follow the mark.
        let is_answer = state.open.as_ref().is_some_and(|open| data.starts_with(&open.mark));
        if is_answer {
            (state.open, state.answered) = (None, Some(now));
            self.is_open.store(false, Ordering::Relaxed);
        }
        is_answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A_MARK: Mark = [7; MARK];

    #[test]
    fn an_answered_probe_refutes_the_error_and_silences_others_for_a_while() {
        let (probe, start) = (PathProbe::default(), Instant::now());
        assert_eq!(probe.poll(start), None);
        assert!(probe.doubt(576, A_MARK, start));
        assert!(!probe.doubt(600, [8; MARK], start), "one at a time");
        assert_eq!(probe.poll(start), Some(Probing::Send(A_MARK)));
        assert_eq!(probe.poll(start), None, "not due");
        assert!(!probe.answered(&[9; 1400], start), "an answer to something else");
        let mut data = vec![0; 1400];
        data[..MARK].copy_from_slice(&A_MARK);
        assert!(probe.answered(&data, start));
        assert!(!probe.answered(&data, start), "answered already");
        assert_eq!(probe.poll(start + 10 * PROBE_INTERVAL), None);
        assert!(!probe.doubt(576, A_MARK, start + IGNORE_TIME / 2));
        assert!(probe.doubt(576, A_MARK, start + IGNORE_TIME));
    }

    #[test]
    fn an_error_is_believed_when_no_probe_is_answered() {
        let (probe, start) = (PathProbe::default(), Instant::now());
        assert!(probe.doubt(576, A_MARK, start));
        let mut steps = Vec::new();
        for tenth in 0..20 {
            steps.extend(probe.poll(start + tenth * Duration::from_millis(100)));
        }
        assert_eq!(steps, [Probing::Send(A_MARK), Probing::Send(A_MARK), Probing::Send(A_MARK), Probing::Believe(576)]);
        assert!(!probe.is_open());
    }
}
