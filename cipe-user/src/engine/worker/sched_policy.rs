//! Selects the scheduling policy of a worker: whether it preempts the running thread when it wakes.
//!
//! A round trip through an idle tunnel is a chain of wake-ups: a sender wakes a worker, which sends and wakes the next
//! one. Under SCHED_OTHER, the woken worker preempts its waker, which stays runnable, so the scheduler sends the next
//! one to an idle CPU. That CPU must leave its idle state first: some microseconds on bare metal, thirty to fifty in a
//! virtual machine. Under SCHED_BATCH, the worker waits until its waker sleeps, which is soon, and the chain stays on
//! one CPU.
//!
//! But if all CPUs are busy with computing, SCHED_BATCH costs whole time slices, some milliseconds each. So a worker
//! compares its running time with its waiting time, and uses SCHED_OTHER for a while if it mostly waits.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

use crate::kernel::scheduling::{self, SchedulingPolicy};

/// Minimum time slices for a decision; below, the minimum time between two decisions.
const MIN_SLICES: u64 = 16;
const DECISION_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum mean wait for a CPU. Waiting for a waker to sleep, or for an idle CPU to wake, is shorter.
const MAX_MEAN_WAIT: Duration = Duration::from_micros(200);

/// Maximum ratio of waiting time to running time under SCHED_BATCH. If tunnels and other load share the CPUs, a worker
/// waits for about a third of its running time.
const MAX_WAIT_RATIO: u64 = 4;

/// How long a worker uses SCHED_OTHER before it tries SCHED_BATCH again.
const PREEMPTING_TIME: Duration = Duration::from_secs(60);

/// The scheduler's counters of a thread since its start (/proc/PID/schedstat; Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Clone, Copy, Default)]
struct SliceCounters {
    /// Nanoseconds of running.
    ran: u64,
    /// Nanoseconds of waiting for a CPU.
    waited: u64,
    /// Number of time slices.
    count: u64,
}

impl SliceCounters {
    fn parse(text: &[u8]) -> Option<Self> {
        let mut numbers = std::str::from_utf8(text).ok()?.split_ascii_whitespace().map_while(|word| word.parse().ok());
        Some(Self { ran: numbers.next()?, waited: numbers.next()?, count: numbers.next()? })
    }
}

/// Selects the policy of the thread that created it.
pub(super) struct PolicySelector {
    /// `None` if the counters cannot be read, or the policy must not change.
    schedstat: Option<File>,
    policy: SchedulingPolicy,
    last: SliceCounters,
    next: Instant,
}

impl PolicySelector {
    /// Sets SCHED_BATCH for the calling thread, unless the operator has chosen a policy (`CPUSchedulingPolicy=` of a
    /// service).
    pub(super) fn new(now: Instant) -> Self {
        let schedstat = (scheduling::policy() == Some(SchedulingPolicy::Other))
            .then(|| File::open("/proc/thread-self/schedstat").ok())
            .flatten();
        let mut selector =
            Self { schedstat, policy: SchedulingPolicy::Other, last: SliceCounters::default(), next: now };
        if let Some(counters) = selector.counters() {
            selector.last = counters;
            selector.change(SchedulingPolicy::Batch, now + DECISION_INTERVAL);
        }
        selector
    }

    /// Decides again, if it is time. Call it after a wake-up.
    pub(super) fn update(&mut self, now: Instant) {
        if now < self.next {
            return;
        }
        self.next = now + DECISION_INTERVAL;
        if let Some(counters) = self.counters() {
            self.decide(counters, now);
        }
    }

    fn decide(&mut self, counters: SliceCounters, now: Instant) {
        let since = SliceCounters {
            ran: counters.ran.saturating_sub(self.last.ran),
            waited: counters.waited.saturating_sub(self.last.waited),
            count: counters.count.saturating_sub(self.last.count),
        };
        match self.policy {
            SchedulingPolicy::Other => self.change(SchedulingPolicy::Batch, now + DECISION_INTERVAL),
            SchedulingPolicy::Batch if since.count < MIN_SLICES => return,
            SchedulingPolicy::Batch if waits_too_long(since) => {
                self.change(SchedulingPolicy::Other, now + PREEMPTING_TIME);
            }
            SchedulingPolicy::Batch => {}
        }
        self.last = counters;
    }

    fn counters(&self) -> Option<SliceCounters> {
        let mut text = [0; 64];
        let length = self.schedstat.as_ref()?.read_at(&mut text, 0).ok()?;
        SliceCounters::parse(&text[..length])
    }

    fn change(&mut self, policy: SchedulingPolicy, next: Instant) {
        match scheduling::set_policy(policy) {
            Ok(()) => {
                tracing::debug!("{policy:?} is now this worker's scheduling policy");
                self.policy = policy;
                self.next = next;
            }
            Err(error) => {
                tracing::debug!("a worker keeps its scheduling policy: {error}");
                self.schedstat = None;
            }
        }
    }
}

fn waits_too_long(counters: SliceCounters) -> bool {
    counters.waited > counters.count * MAX_MEAN_WAIT.as_nanos() as u64
        && counters.waited > counters.ran * MAX_WAIT_RATIO
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedstat_is_three_numbers() {
        let counters = SliceCounters::parse(b"1234 56 7\n").unwrap();
        assert_eq!((counters.ran, counters.waited, counters.count), (1234, 56, 7));
        for text in [&b""[..], b"1 2", b"1 2 x", b"-1 2 3", b"\xff"] {
            assert!(SliceCounters::parse(text).is_none(), "{text:?}");
        }
    }

    #[test]
    fn only_long_waits_that_exceed_the_running_time_count() {
        let counters =
            |ran_us: u64, waited_us: u64| SliceCounters { ran: ran_us * 1000, waited: waited_us * 1000, count: 10 };
        assert!(!waits_too_long(counters(200, 500)), "idle CPUs that must be woken");
        assert!(!waits_too_long(counters(8000, 3000)), "a busy tunnel");
        assert!(!waits_too_long(counters(200, 2000)), "on the edge");
        assert!(waits_too_long(counters(200, 2001)), "others compute");
        assert!(!waits_too_long(counters(600, 2001)), "others compute, but it runs a lot itself");
    }

    #[test]
    fn a_thread_runs_as_batch_until_it_waits_too_long_and_again_later() {
        let thread = std::thread::spawn(|| {
            let now = Instant::now();
            let mut selector = PolicySelector::new(now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
            let later = |selector: &PolicySelector, count| SliceCounters {
                ran: selector.last.ran + 10_000 * count,
                waited: selector.last.waited + 500_000 * count,
                count: selector.last.count + count,
            };
            selector.decide(later(&selector, MIN_SLICES - 1), now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch), "too few slices to decide");
            selector.decide(later(&selector, MIN_SLICES), now);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Other));
            selector.update(now + PREEMPTING_TIME / 2);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Other));
            selector.update(now + PREEMPTING_TIME);
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_policy_that_the_operator_chose_stays() {
        let thread = std::thread::spawn(|| {
            scheduling::set_policy(SchedulingPolicy::Batch).unwrap();
            let now = Instant::now();
            let mut selector = PolicySelector::new(now);
            selector.update(now + PREEMPTING_TIME);
            assert!(selector.schedstat.is_none());
            assert_eq!(scheduling::policy(), Some(SchedulingPolicy::Batch));
        });
        thread.join().unwrap();
    }
}
