//! Whether the engine still answers. One that hangs is killed, and the daemon starts another one.
//!
//! A machine that gives nobody CPU time is no reason: neither if this process itself is woken late, nor if the engine wants to run and
//! cannot. An engine under a debugger is left alone.

use std::time::Duration;

use tokio::time::Instant;

use crate::control::client::EngineProcess;
use crate::kernel::thread_state::{Silence, ThreadState};

/// Without an event for this time, the engine is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long it may take to answer.
const MAX_SILENCE: Duration = Duration::from_secs(3);
/// If a timer of this process is so late, the machine is starved.
const MAX_LATE: Duration = Duration::from_millis(500);

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    Ask,
    /// It has not answered: find out why.
    Judge,
}

/// When to ask, and how long ago that was.
struct Beat {
    due: Instant,
    asked: Option<Instant>,
}

impl Beat {
    fn heard(&mut self, now: Instant) {
        (self.due, self.asked) = (now + INTERVAL, None);
    }

    fn tick(&mut self, now: Instant) -> Due {
        let Some(late) = now.checked_duration_since(self.due) else { return Due::Nothing };
        self.due = now + INTERVAL;
        match self.asked {
            None => {
                self.asked = Some(now);
                Due::Ask
            }
            Some(_) if late > MAX_LATE => {
                self.asked = Some(now);
                Due::Nothing
            }
            Some(asked) if now.duration_since(asked) >= MAX_SILENCE => Due::Judge,
            Some(_) => Due::Nothing,
        }
    }
}

/// The watch over one engine.
pub(super) struct Heartbeat {
    engine: EngineProcess,
    beat: Beat,
    /// The state of its control thread when it was asked first.
    before: Option<ThreadState>,
}

impl Heartbeat {
    /// Begins to watch an engine that has just been heard of.
    pub(super) fn new(engine: EngineProcess) -> Self {
        Self { engine, beat: Beat { due: Instant::now() + INTERVAL, asked: None }, before: None }
    }

    /// The engine has sent something.
    pub(super) fn heard(&mut self) {
        self.beat.heard(Instant::now());
    }

    /// When [`Self::watch`] is due.
    pub(super) fn deadline(&self) -> Instant {
        self.beat.due
    }

    fn state(&self) -> Option<ThreadState> {
        // The control thread is the first one.
        ThreadState::of(self.engine.pid, self.engine.pid)
    }

    /// Kills the engine if it has not answered: the connection closes then. Returns whether it is to be asked whether it goes on
    /// ([`Request::Beat`](crate::control::protocol::Request::Beat)). `tunnel`: for the log.
    pub(super) fn watch(&mut self, tunnel: &str) -> bool {
        match self.beat.tick(Instant::now()) {
            Due::Nothing => {}
            Due::Ask => {
                self.before = self.state();
                return true;
            }
            Due::Judge => {
                let why = self.state().zip(self.before).map(|(now, before)| now.silent_since(&before));
                if why != Some(Silence::Hangs) {
                    self.beat.asked = Some(Instant::now());
                    return false;
                }
                tracing::error!(
                    "{tunnel}: the engine (process {}) has not answered for {} s; it is killed, and another one started",
                    self.engine.pid,
                    MAX_SILENCE.as_secs()
                );
                if let Err(error) = self.engine.kill() {
                    tracing::error!("{tunnel}: the engine cannot be killed: {error}");
                }
                self.heard();
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is due at these times, in milliseconds, of an engine that answers at none of them.
    fn due_at(times: &[u64]) -> Vec<Due> {
        let start = Instant::now();
        let mut beat = Beat { due: start + INTERVAL, asked: None };
        times.iter().map(|at| beat.tick(start + Duration::from_millis(*at))).collect()
    }

    #[test]
    fn a_silent_engine_is_judged_after_four_seconds() {
        use Due::{Ask, Judge, Nothing};
        assert_eq!(due_at(&[500, 1000, 1500, 2000, 3001, 4002]), [Nothing, Ask, Nothing, Nothing, Nothing, Judge]);
    }

    #[test]
    fn a_daemon_that_gets_no_cpu_judges_nobody() {
        use Due::{Ask, Judge, Nothing};
        let late = [1000, 2000, 4000, 5000, 6000, 7000, 8600, 9600, 10_600];
        let expected = [Ask, Nothing, Nothing, Nothing, Nothing, Judge, Nothing, Nothing, Nothing];
        assert_eq!(due_at(&late), expected);
    }

    #[test]
    fn an_engine_that_says_anything_is_not_asked() {
        let start = Instant::now();
        let mut beat = Beat { due: start + INTERVAL, asked: None };
        for second in 1..10 {
            beat.heard(start + INTERVAL * second);
            assert_eq!(beat.tick(start + INTERVAL * second), Due::Nothing);
        }
    }
}
