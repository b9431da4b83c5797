//! The engine's watchdog: a thread that sees whether the workers and the control thread still go round their loops. If one hangs, the
//! engine kills itself: its daemons start another one, which goes on under the same keys.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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

    /// Whether it hangs at `now`. `state` gives the state of a thread; `late`: the watchdog itself got no CPU.
    fn hangs(&mut self, now: Instant, late: bool, state: impl Fn(u32) -> Option<ThreadState>) -> bool {
        let (rounds, thread) = (self.pulse.rounds.load(Ordering::Relaxed), self.pulse.thread.load(Ordering::Relaxed));
        let goes_on = std::mem::replace(&mut self.seen, rounds) != rounds;
        if goes_on || late || thread == 0 {
            (self.since, self.before) = (now, None);
            return false;
        }
        let Some(present) = state(thread) else { return false };
        let before = *self.before.get_or_insert(present);
        now.duration_since(self.since) >= self.limit && present.silent_since(&before) == Silence::Hangs
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
                let hung = all.iter_mut().find_map(|watched| watched.hangs(now, late, state).then_some(&watched.name));
                if let Some(name) = hung.filter(|_| !ends.load(Ordering::Relaxed)) {
                    tracing::error!("{name} hangs; the engine ends, and its daemons start another one");
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

    #[test]
    fn a_thread_without_a_round_for_too_long_hangs_unless_nobody_got_cpu() {
        let own = || {
            let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
            ThreadState::of(std::process::id(), thread)
        };
        let pulse = Arc::new(Pulse::default());
        let mut watched = Watched::new("it".to_owned(), pulse.clone(), WORKER_LIMIT);
        let start = watched.since;
        // Not a state that starves: this thread runs, and another one sleeps for ever.
        let (sender, receiver) = std::sync::mpsc::channel::<()>();
        let (told, thread) = std::sync::mpsc::channel();
        let sleeper = std::thread::spawn(move || {
            told.send(rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs()).unwrap();
            let _ = receiver.recv();
        });
        let thread = thread.recv().unwrap();
        let asleep = loop {
            match ThreadState::of(std::process::id(), thread) {
                Some(state) if state.silent_since(&state) == Silence::Hangs => break state,
                _ => std::thread::yield_now(),
            }
        };
        let after = |seconds| start + Duration::from_secs(seconds);
        let state = |_| Some(asleep);
        assert!(!watched.hangs(after(100), false, state), "it has not begun");
        pulse.begin();
        pulse.beat();
        assert!(!watched.hangs(after(101), false, state));
        assert!(!watched.hangs(after(103), false, state));
        assert!(!watched.hangs(after(104), false, |_| own()), "it runs, and got no CPU");
        assert!(!watched.hangs(after(105), true, state), "the watchdog was late");
        assert!(!watched.hangs(after(107), false, state));
        assert!(watched.hangs(after(108), false, state));
        pulse.beat();
        assert!(!watched.hangs(after(109), false, state));
        drop(sender);
        sleeper.join().unwrap();
    }
}
