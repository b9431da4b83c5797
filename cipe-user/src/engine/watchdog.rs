//! The engine's watchdog: a thread that sees whether the workers and the control thread still go round their loops. If one hangs, the
//! engine kills itself: its daemons start another one, which goes on under the same keys.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use crate::kernel::thread_state::{Silence, ThreadState};

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// If a look is so late, this process got no CPU: nobody is judged.
const MAX_LATE: Duration = Duration::from_millis(500);
/// How long a worker may take for a round; an idle one takes a second.
pub(super) const WORKER_LIMIT: Duration = Duration::from_secs(3);
/// How long the control thread may take for an event or a request.
pub(super) const MANAGER_LIMIT: Duration = Duration::from_secs(10);
/// How much longer a thread may be silent while another one gets no CPU, for which it may wait.
const MAX_EXCUSE: Duration = Duration::from_secs(30);
/// How long the last line of the log may take: what reads the log may be what hangs.
const MAX_LOG_TIME: Duration = Duration::from_millis(200);

/// The rounds of a thread, counted.
#[derive(Default)]
pub(super) struct Pulse {
    rounds: AtomicU64,
    /// 0: it has not begun.
    thread: AtomicU32,
}

impl Pulse {
    /// The calling thread begins.
    pub(super) fn begin(&self) {
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs(), Ordering::Relaxed);
    }

    /// Counts a round of the thread that has begun, its only writer.
    pub(super) fn beat(&self) {
        self.rounds.store(self.rounds.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }
}

/// A thread under watch.
pub(super) struct Watched {
    name: String,
    pulse: Arc<Pulse>,
    limit: Duration,
    seen: u64,
    since: Instant,
    before: Option<ThreadState>,
}

impl Watched {
    /// A thread that takes at most `limit` for a round.
    pub(super) fn new(name: String, pulse: Arc<Pulse>, limit: Duration) -> Self {
        Self { name, pulse, limit, seen: 0, since: Instant::now(), before: None }
    }

    /// Why it is silent at `now`, and for how long; `None`: it goes on, or is traced. `state` gives the state of a thread; `late`: the
    /// watchdog itself got no CPU.
    fn silence(
        &mut self,
        now: Instant,
        late: bool,
        state: impl Fn(u32) -> Option<ThreadState>,
    ) -> Option<(Silence, Duration)> {
        let (rounds, thread) = (self.pulse.rounds.load(Ordering::Relaxed), self.pulse.thread.load(Ordering::Relaxed));
        let goes_on = std::mem::replace(&mut self.seen, rounds) != rounds;
        if goes_on || late || thread == 0 {
            (self.since, self.before) = (now, None);
            return None;
        }
        let present = state(thread)?;
        let before = *self.before.get_or_insert(present);
        let silence = present.silent_since(&before);
        (silence != Silence::Traced).then_some((silence, now.duration_since(self.since)))
    }
}

/// The name of a thread that hangs at `now`. While one gets no CPU, another one may wait for it, and is given more time.
fn hung(all: &mut [Watched], now: Instant, late: bool, state: impl Fn(u32) -> Option<ThreadState>) -> Option<String> {
    let silences: Vec<_> = all.iter_mut().map(|watched| watched.silence(now, late, &state)).collect();
    let excuse = match silences.iter().flatten().any(|(silence, _)| *silence == Silence::Starves) {
        true => MAX_EXCUSE,
        false => Duration::ZERO,
    };
    let hangs = |(watched, silence): (&Watched, Option<(Silence, Duration)>)| {
        let (silence, time) = silence?;
        (silence == Silence::Hangs && time >= watched.limit + excuse).then(|| watched.name.clone())
    };
    all.iter().zip(silences).find_map(hangs)
}

/// Runs `work` in a thread of its own, and waits for its end for `limit` at most.
fn within(limit: Duration, work: impl FnOnce() + Send + 'static) {
    let (done, is_done) = mpsc::channel();
    let run = move || {
        work();
        // Nobody may wait any more.
        let _ = done.send(());
    };
    if std::thread::Builder::new().spawn(run).is_ok() {
        // An error is the end of the time.
        let _ = is_done.recv_timeout(limit);
    }
}

/// The watchdog; it ends when this is dropped.
pub(super) struct Watchdog(Arc<AtomicBool>);

impl Watchdog {
    /// Starts it.
    ///
    /// # Errors
    /// No thread.
    pub(super) fn start(mut all: Vec<Watched>) -> std::io::Result<Self> {
        let ended = Arc::new(AtomicBool::new(false));
        let ends = ended.clone();
        std::thread::Builder::new().name("cipe-watchdog".to_owned()).spawn(move || {
            let mut last = Instant::now();
            while !ends.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
                let now = Instant::now();
                let late = now.duration_since(std::mem::replace(&mut last, now)) > LOOK + MAX_LATE;
                let state = |thread| ThreadState::of(std::process::id(), thread);
                if let Some(name) = hung(&mut all, now, late, state).filter(|_| !ends.load(Ordering::Relaxed)) {
                    within(MAX_LOG_TIME, move || {
                        tracing::error!("{name} hangs; the engine ends, and its daemons start another one");
                    });
                    // Not an orderly end, which would wait for the thread. No core is dumped of a process with keys.
                    std::process::abort();
                }
            }
        })?;
        Ok(Self(ended))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_thread() -> u32 {
        rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()
    }

    /// Runs `test` with the states of a thread that sleeps for ever, and of this one, which runs and seems to get no CPU.
    fn with_states(test: impl FnOnce(ThreadState, ThreadState)) {
        let (sender, receiver) = mpsc::channel::<()>();
        let (told, thread) = mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            told.send(own_thread()).unwrap();
            let _ = receiver.recv();
        });
        let thread = thread.recv().unwrap();
        let asleep = loop {
            match ThreadState::of(std::process::id(), thread) {
                Some(state) if state.silent_since(&state) == Silence::Hangs => break state,
                _ => std::thread::yield_now(),
            }
        };
        test(asleep, ThreadState::of(std::process::id(), own_thread()).unwrap());
        drop(sender);
        sleeper.join().unwrap();
    }

    #[test]
    fn a_thread_without_a_round_for_too_long_hangs_unless_nobody_got_cpu() {
        with_states(|asleep, running| {
            let pulse = Arc::new(Pulse::default());
            let mut all = [Watched::new("it".to_owned(), pulse.clone(), WORKER_LIMIT)];
            let start = all[0].since;
            let mut hangs = |seconds, late, state| {
                hung(&mut all, start + Duration::from_secs(seconds), late, |_| Some(state)).is_some()
            };
            assert!(!hangs(100, false, asleep), "it has not begun");
            pulse.begin();
            pulse.beat();
            assert!(!hangs(101, false, asleep));
            assert!(!hangs(103, false, asleep));
            assert!(!hangs(104, false, running), "it runs, and got no CPU");
            assert!(!hangs(105, true, asleep), "the watchdog was late");
            assert!(!hangs(107, false, asleep));
            assert!(hangs(108, false, asleep));
            pulse.beat();
            assert!(!hangs(109, false, asleep));
        });
    }

    #[test]
    fn a_thread_that_may_wait_for_one_without_cpu_has_more_time() {
        with_states(|asleep, running| {
            let pulses = [(); 2].map(|()| Arc::new(Pulse::default()));
            let watched = |name: &str, pulse: &Arc<Pulse>| Watched::new(name.to_owned(), pulse.clone(), WORKER_LIMIT);
            let mut all = [watched("waits", &pulses[0]), watched("starves", &pulses[1])];
            // The first one's thread has another number than the second one's.
            pulses[0].thread.store(1, Ordering::Relaxed);
            pulses[1].begin();
            let start = Instant::now();
            let state = |thread| Some(if thread == 1 { asleep } else { running });
            let mut at = |seconds| hung(&mut all, start + Duration::from_secs(seconds), false, state);
            assert_eq!([at(0), at(4), at(32)], [None, None, None]);
            assert_eq!(at(34).as_deref(), Some("waits"));
        });
    }

    #[test]
    fn a_log_that_nobody_reads_does_not_hold_up_the_end() {
        let (_never, wait) = mpsc::channel::<()>();
        within(Duration::from_millis(1), move || _ = wait.recv());
        let (sender, receiver) = mpsc::channel();
        within(Duration::from_secs(60), move || sender.send(7).unwrap());
        assert_eq!(receiver.try_recv(), Ok(7));
    }
}
