//! Whether a worker that wakes takes the CPU from whoever runs there, or waits.
//!
//! A round trip through an idle tunnel is a chain of wakings: who sends wakes a worker, which sends and wakes the next. One
//! that takes the CPU at once (SCHED_OTHER) leaves its waker runnable beside it, so the scheduler sends the next one to an
//! idle CPU, which must first be woken: some microseconds on bare metal, thirty to fifty in a virtual machine. One that
//! waits (SCHED_BATCH) has the CPU a moment later, since wakers of this kind soon sleep, and the chain stays where it is.
//!
//! But while something computes on every CPU, patience costs its time slices, some milliseconds each. So a worker
//! compares how long it ran with how long it waited for a CPU, and is impatient for a while where it mostly waits.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use crate::kernel::scheduling::{self, SchedulingPolicy};

/// Turns on a CPU, and the least time, that a judgement needs.
const TURNS: u64 = 16;
const PERIOD: Duration = Duration::from_millis(100);

/// A mean wait for a turn that is no waker's way to its sleep, nor an idle CPU's waking.
const LONG: Duration = Duration::from_micros(200);

/// Times of its running that a patient worker has waited, at least, before it is impatient. Where tunnels and load fill the
/// CPUs, workers wait a third of their running.
const MOSTLY: u64 = 4;

/// How long a worker is impatient, before it tries again.
const IMPATIENT: Duration = Duration::from_secs(60);

/// What the scheduler counted for a thread, ever (/proc/PID/schedstat; Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Clone, Copy, Default)]
struct Turns {
    /// Nanoseconds on a CPU.
    ran: u64,
    /// Nanoseconds of waiting for one.
    waited: u64,
    /// How often it was given one.
    count: u64,
}

impl Turns {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut numbers = std::str::from_utf8(text).ok()?.split_ascii_whitespace().map_while(|word| word.parse().ok());
        Some(Self { ran: numbers.next()?, waited: numbers.next()?, count: numbers.next()? })
    }
}

/// The patience of the thread that made it.
pub(super) struct Patience {
    /// None if nothing can be learnt, or nothing is to be changed.
    schedstat: Option<File>,
    policy: SchedulingPolicy,
    judged: Turns,
    next: Instant,
}

impl Patience {
    /// Makes the calling thread patient, unless somebody chose its policy (`CPUSchedulingPolicy=` of a service).
    pub(super) fn new(now: Instant) -> Self {
        let schedstat = (scheduling::policy() == Some(SchedulingPolicy::Other))
            .then(|| File::open("/proc/thread-self/schedstat").ok())
            .flatten();
        let mut patience = Self { schedstat, policy: SchedulingPolicy::Other, judged: Turns::default(), next: now };
        if let Some(turns) = patience.turns() {
            patience.judged = turns;
            patience.change(SchedulingPolicy::Batch, now + PERIOD);
        }
        patience
    }

    /// Judges anew, if it is time to. To be called after a waking.
    pub(super) fn judge(&mut self, now: Instant) {
        if now < self.next {
            return;
        }
        self.next = now + PERIOD;
        if let Some(turns) = self.turns() {
            self.judge_by(turns, now);
        }
    }

    fn judge_by(&mut self, turns: Turns, now: Instant) {
        let since = Turns {
            ran: turns.ran.saturating_sub(self.judged.ran),
            waited: turns.waited.saturating_sub(self.judged.waited),
            count: turns.count.saturating_sub(self.judged.count),
        };
        match self.policy {
            SchedulingPolicy::Other => self.change(SchedulingPolicy::Batch, now + PERIOD),
            SchedulingPolicy::Batch if since.count < TURNS => return,
            SchedulingPolicy::Batch if waits_too_long(since) => self.change(SchedulingPolicy::Other, now + IMPATIENT),
            SchedulingPolicy::Batch => {}
        }
        self.judged = turns;
    }

    fn turns(&self) -> Option<Turns> {
        let mut text = [0; 64];
        let length = self.schedstat.as_ref()?.read_at(&mut text, 0).ok()?;
        Turns::parse(&text[..length])
    }

    fn change(&mut self, policy: SchedulingPolicy, next: Instant) {
        match scheduling::set_policy(policy) {
            Ok(()) => {
                tracing::debug!("{policy:?} is this worker's scheduling policy now");
                self.policy = policy;
                self.next = next;
            }
            Err(error) => {
                tracing::debug!("a worker's scheduling policy stays: {error}");
                self.schedstat = None;
            }
        }
    }
}

fn waits_too_long(turns: Turns) -> bool {
    turns.waited > turns.count * LONG.as_nanos() as u64 && turns.waited > turns.ran * MOSTLY
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_are_three_numbers() {
        let turns = Turns::parse(b"1234 56 7\n").unwrap();
        assert_eq!((turns.ran, turns.waited, turns.count), (1234, 56, 7));
        for text in [&b""[..], b"1 2", b"1 2 x", b"-1 2 3", b"\xff"] {
            assert!(Turns::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn only_who_mostly_waits_and_long_is_impatient() {
        let turns = |ran_us: u64, waited_us: u64| Turns { ran: ran_us * 1000, waited: waited_us * 1000, count: 10 };
        assert!(!waits_too_long(turns(200, 500)), "idle CPUs that must be woken");
        assert!(!waits_too_long(turns(8000, 3000)), "a busy tunnel");
        assert!(!waits_too_long(turns(200, 2000)), "on the edge");
        assert!(waits_too_long(turns(200, 2001)), "others compute");
        assert!(!waits_too_long(turns(600, 2001)), "others compute, but it runs a lot itself");
    }

    #[test]
    fn a_thread_is_patient_until_it_waits_too_long_and_again_later() {
        let thread = std::thread::spawn(|| {
            let now = Instant::now();
            let mut patience = Patience::new(now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
            let later = |patience: &Patience, count| Turns {
                ran: patience.judged.ran + 10_000 * count,
                waited: patience.judged.waited + 500_000 * count,
                count: patience.judged.count + count,
            };
            patience.judge_by(later(&patience, TURNS - 1), now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch), "too few turns to say");
            patience.judge_by(later(&patience, TURNS), now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Other));
            patience.judge(now + IMPATIENT / 2);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Other));
            patience.judge(now + IMPATIENT);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_policy_that_somebody_chose_stays() {
        let thread = std::thread::spawn(|| {
            scheduling::set_policy(SchedulingPolicy::Batch).unwrap();
            let now = Instant::now();
            let mut patience = Patience::new(now);
            patience.judge(now + IMPATIENT);
            assert!(patience.schedstat.is_none());
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
        });
        thread.join().unwrap();
    }
}
