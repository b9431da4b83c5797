//! What the kernel tells of a thread that does not answer (proc_pid_stat(5)): whether it hangs, gets no CPU, or is being debugged.

use std::fs;
use std::time::Duration;

/// Milliseconds of a clock tick of /proc, the same on all architectures.
const TICK_MS: u64 = 10;
/// A thread that has run for this long without an answer does not lack CPU time.
const MIN_RUN: Duration = Duration::from_millis(500);

/// The state of a thread at some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadState {
    /// Its letter in /proc.
    letter: char,
    /// CPU time that it has used.
    used: Duration,
    /// Somebody debugs it.
    is_traced: bool,
}

/// Why a thread is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Silence {
    /// It is stopped, runs in a loop, or waits for what does not come.
    Hangs,
    /// It wants to run, and gets no CPU, or the kernel has not finished what it asked for.
    Starves,
    /// A debugger holds it, or may do so at any time.
    Traced,
}

impl ThreadState {
    /// The state of a thread now; `None`: there is no such thread.
    pub fn of(process: u32, thread: u32) -> Option<Self> {
        let read = |file: &str| fs::read_to_string(format!("/proc/{process}/task/{thread}/{file}")).ok();
        Self::parse(&read("stat")?, &read("status")?)
    }

    fn parse(stat: &str, status: &str) -> Option<Self> {
        // The name before it may contain anything.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let letter = fields.next()?.chars().next()?;
        let mut ticks = fields.skip(10).map(str::parse::<u64>);
        let ticks = ticks.next()?.ok()?.saturating_add(ticks.next()?.ok()?);
        let used = Duration::from_millis(ticks.saturating_mul(TICK_MS));
        let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        Some(Self { letter, used, is_traced: tracer.is_some_and(|tracer| tracer.trim() != "0") })
    }

    /// Why it was silent since an earlier state.
    pub fn silent_since(&self, earlier: &Self) -> Silence {
        match self.letter {
            _ if self.is_traced => Silence::Traced,
            'R' | 'D' if self.used.saturating_sub(earlier.used) < MIN_RUN => Silence::Starves,
            _ => Silence::Hangs,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(letter: char, ticks: u32) -> ThreadState {
        let stat = format!("7 (a) R (b) {letter} 1 7 7 0 -1 4194560 9 0 0 0 {ticks} 0 0 0 20 0 3 0 99 1 1 1");
        ThreadState::parse(&stat, "Name:\tx\nTracerPid:\t0\nUid:\t0\n").unwrap()
    }

    #[test]
    fn a_thread_that_hangs_is_told_apart_from_one_that_gets_no_cpu() {
        let before = state('S', 100);
        for (letter, ticks, expected) in [
            ('T', 100, Silence::Hangs),
            ('S', 100, Silence::Hangs),
            ('R', 400, Silence::Hangs),
            ('R', 110, Silence::Starves),
            ('D', 100, Silence::Starves),
        ] {
            assert_eq!(state(letter, ticks).silent_since(&before), expected, "{letter} {ticks}");
        }
        let traced = ThreadState { is_traced: true, ..state('t', 100) };
        assert_eq!(traced.silent_since(&before), Silence::Traced);
    }

    #[test]
    fn the_state_of_this_thread_is_known() {
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let state = ThreadState::of(std::process::id(), thread).unwrap();
        assert_eq!(state.letter, 'R');
        assert!(ThreadState::of(std::process::id(), 0).is_none());
    }
}
