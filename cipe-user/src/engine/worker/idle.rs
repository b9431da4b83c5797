//! How a worker waits for packets: asleep, or for a short while awake where that pays.
//!
//! A sleeper costs nothing, but to wake it on another CPU costs an interrupt there and that CPU's way out of idling: on bare
//! metal some microseconds, in a virtual machine thirty or more, for whoever wakes it as well. So a worker that was woken
//! again soon after it fell asleep stays awake a little longer each time, up to a ceiling (option `busypoll`), and one that
//! sleeps long goes to sleep at once. Between two looks it yields, so that whoever else wants the CPU has it.
//!
//! A worker that never stays awake gathers instead: after a waking that brought many packets, but no full batch, it rests for
//! a moment before it asks for more, as network cards moderate their interrupts, and the next waking brings a fuller batch.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::thread::sched_yield;

use crate::engine::BATCH;

/// Events of one look.
const EVENTS: usize = 64;

/// The shortest time worth staying awake for.
const LEAST: Duration = Duration::from_micros(5);

/// Packets of one waking that tell of more to come soon.
const MANY: usize = 16;

/// How long to gather. The kernel's timer slack adds 50 µs.
const GATHER: Duration = Duration::from_micros(20);

/// The waiting of one worker.
pub(super) struct Rest {
    ready: Vec<epoll::Event>,
    ceiling: Duration,
    awake: Duration,
}

impl Rest {
    /// One that always sleeps at once.
    pub(super) fn new() -> Self {
        Self { ready: Vec::with_capacity(EVENTS), ceiling: Duration::ZERO, awake: Duration::ZERO }
    }

    /// Sets the longest time to stay awake for; zero always sleeps at once.
    pub(super) fn stay_awake(&mut self, ceiling: Duration) {
        self.ceiling = ceiling;
        self.awake = self.awake.min(ceiling);
    }

    /// Rests for a moment if that is worth it after a waking that brought `packets`.
    pub(super) fn gather(&self, packets: usize) {
        if self.gathers(packets) {
            std::thread::sleep(GATHER);
        }
    }

    fn gathers(&self, packets: usize) -> bool {
        self.ceiling.is_zero() && (MANY..BATCH).contains(&packets)
    }

    /// Waits for events on `epoll`, at most `longest`; returns the data of those that came, perhaps none.
    ///
    /// # Errors
    /// What epoll says, but for an interrupted wait.
    pub(super) fn wait(&mut self, epoll: &OwnedFd, longest: Duration) -> rustix::io::Result<impl Iterator<Item = u64>> {
        if !self.has_seen_some(epoll, self.awake.min(longest))? {
            let asleep = Instant::now();
            self.look(epoll, longest)?;
            self.adapt(asleep.elapsed());
        }
        Ok(self.ready.iter().map(|event| event.data.u64()))
    }

    /// Looks out for events for a time; whether there were any.
    fn has_seen_some(&mut self, epoll: &OwnedFd, time: Duration) -> rustix::io::Result<bool> {
        if time.is_zero() {
            return Ok(false);
        }
        let began = Instant::now();
        while began.elapsed() < time {
            self.look(epoll, Duration::ZERO)?;
            if !self.ready.is_empty() {
                return Ok(true);
            }
            sched_yield();
        }
        Ok(false)
    }

    fn look(&mut self, epoll: &OwnedFd, longest: Duration) -> rustix::io::Result<()> {
        self.ready.clear();
        let longest = Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: longest.subsec_nanos().into() };
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut self.ready), Some(&longest)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Draws the lesson from a sleep.
    fn adapt(&mut self, slept: Duration) {
        if slept < self.ceiling {
            self.awake = (self.awake * 2).max(LEAST).min(self.ceiling);
        } else {
            self.awake /= 2;
            if self.awake < LEAST {
                self.awake = Duration::ZERO;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    #[test]
    fn short_sleeps_lengthen_the_wait_awake_to_its_ceiling_and_long_ones_end_it() {
        let mut rest = Rest::new();
        rest.adapt(Duration::from_micros(1));
        assert_eq!(rest.awake, Duration::ZERO, "not without a ceiling");
        rest.stay_awake(Duration::from_micros(50));
        (0..10).for_each(|_| rest.adapt(Duration::from_micros(1)));
        assert_eq!(rest.awake, Duration::from_micros(50));
        (0..10).for_each(|_| rest.adapt(Duration::from_millis(1)));
        assert_eq!(rest.awake, Duration::ZERO);
        rest.adapt(Duration::from_micros(1));
        rest.stay_awake(Duration::ZERO);
        assert_eq!(rest.awake, Duration::ZERO, "a ceiling that is lowered holds at once");
    }

    #[test]
    fn only_a_part_of_a_batch_is_gathered_for_and_only_where_nobody_stays_awake() {
        let mut rest = Rest::new();
        assert_eq!([0, 1, MANY, BATCH - 1, BATCH].map(|n| rest.gathers(n)), [false, false, true, true, false]);
        rest.stay_awake(Duration::from_micros(1));
        assert!(!rest.gathers(MANY));
    }

    #[test]
    fn an_event_is_seen_awake_and_asleep() {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let event = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
        epoll::add(&epoll, &event, epoll::EventData::new_u64(7), epoll::EventFlags::IN).unwrap();
        let mut rest = Rest::new();
        for ceiling in [0, 100] {
            rest.stay_awake(Duration::from_millis(ceiling));
            rest.adapt(Duration::ZERO);
            assert_eq!(rest.wait(&epoll, Duration::from_secs(10)).unwrap().collect::<Vec<_>>(), [7]);
        }
        rustix::io::read(&event, &mut [0; 8]).unwrap();
        assert_eq!(rest.wait(&epoll, Duration::ZERO).unwrap().count(), 0, "nothing has come");
    }
}
