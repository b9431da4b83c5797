//! How a worker waits for packets: it sleeps, or busy-polls for a short time if that pays.
//!
//! A sleeping worker costs nothing, but a wake-up on another CPU costs an interrupt, and the time in which that CPU
//! leaves its idle state: some microseconds on bare metal, thirty or more in a virtual machine, also for the waker. So
//! a worker that is often woken soon after it fell asleep busy-polls longer each time, up to a limit (option
//! `busypoll`), and a worker that sleeps long stops busy-polling. It yields the CPU after each poll.
//!
//! A worker without busy-polling gathers instead: after a wake-up with many packets, but less than a full batch, it
//! pauses shortly, so that the next wake-up brings a fuller batch. Network cards moderate their interrupts in the same
//! way.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};
use rustix::thread::sched_yield;

use crate::engine::BATCH;

/// Maximum events of one poll.
const MAX_EVENTS: usize = 64;

/// Minimum useful time of busy-polling.
const MIN_BUSY_POLL: Duration = Duration::from_micros(5);

/// Minimum packets of a wake-up after which more are expected soon.
const MIN_GATHER_PACKETS: usize = 16;

/// Length of the pause. The kernel's timer slack adds 50 µs.
const GATHER_PAUSE: Duration = Duration::from_micros(20);

/// The idle strategy of one worker.
pub(super) struct Idle {
    ready: Vec<epoll::Event>,
    limit: Duration,
    busy_poll: Duration,
}

impl Idle {
    /// Creates one that does not busy-poll.
    pub(super) fn new() -> Self {
        Self { ready: Vec::with_capacity(MAX_EVENTS), limit: Duration::ZERO, busy_poll: Duration::ZERO }
    }

    /// Sets the maximum time of busy-polling; zero switches it off.
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
        self.busy_poll = self.busy_poll.min(limit);
    }

    /// Pauses if that is useful after a wake-up with `packets` packets.
    pub(super) fn gather(&self, packets: usize) {
        if self.gathers(packets) {
            std::thread::sleep(GATHER_PAUSE);
        }
    }

    fn gathers(&self, packets: usize) -> bool {
        self.limit.is_zero() && (MIN_GATHER_PACKETS..BATCH).contains(&packets)
    }

    /// Waits for events on `epoll`, at most `longest`. Returns their data; may return none.
    ///
    /// # Errors
    /// The error of epoll, except for an interrupted wait.
    pub(super) fn wait(&mut self, epoll: &OwnedFd, longest: Duration) -> rustix::io::Result<impl Iterator<Item = u64>> {
        if !self.finds_events(epoll, self.busy_poll.min(longest))? {
            let asleep = Instant::now();
            self.poll(epoll, longest)?;
            self.adapt(asleep.elapsed());
        }
        Ok(self.ready.iter().map(|event| event.data.u64()))
    }

    /// Polls for `time`. Returns whether there were any events.
    fn finds_events(&mut self, epoll: &OwnedFd, time: Duration) -> rustix::io::Result<bool> {
        if time.is_zero() {
            return Ok(false);
        }
        let began = Instant::now();
        while began.elapsed() < time {
            self.poll(epoll, Duration::ZERO)?;
            if !self.ready.is_empty() {
                return Ok(true);
            }
            sched_yield();
        }
        Ok(false)
    }

    fn poll(&mut self, epoll: &OwnedFd, longest: Duration) -> rustix::io::Result<()> {
        self.ready.clear();
        let longest = Timespec { tv_sec: longest.as_secs() as i64, tv_nsec: longest.subsec_nanos().into() };
        match epoll::wait(epoll, rustix::buffer::spare_capacity(&mut self.ready), Some(&longest)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Adapts the time of busy-polling to the length of a sleep.
    fn adapt(&mut self, slept: Duration) {
        if slept < self.limit {
            self.busy_poll = (self.busy_poll * 2).max(MIN_BUSY_POLL).min(self.limit);
        } else {
            self.busy_poll /= 2;
            if self.busy_poll < MIN_BUSY_POLL {
                self.busy_poll = Duration::ZERO;
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
        let mut idle = Idle::new();
        idle.adapt(Duration::from_micros(1));
        assert_eq!(idle.busy_poll, Duration::ZERO, "not without a limit");
        idle.set_limit(Duration::from_micros(50));
        (0..10).for_each(|_| idle.adapt(Duration::from_micros(1)));
        assert_eq!(idle.busy_poll, Duration::from_micros(50));
        (0..10).for_each(|_| idle.adapt(Duration::from_millis(1)));
        assert_eq!(idle.busy_poll, Duration::ZERO);
        idle.adapt(Duration::from_micros(1));
        idle.set_limit(Duration::ZERO);
        assert_eq!(idle.busy_poll, Duration::ZERO, "a lower limit applies at once");
    }

    #[test]
    fn only_a_part_of_a_batch_is_gathered_for_and_only_where_nobody_stays_awake() {
        let mut idle = Idle::new();
        assert_eq!(
            [0, 1, MIN_GATHER_PACKETS, BATCH - 1, BATCH].map(|n| idle.gathers(n)),
            [false, false, true, true, false]
        );
        idle.set_limit(Duration::from_micros(1));
        assert!(!idle.gathers(MIN_GATHER_PACKETS));
    }

    #[test]
    fn an_event_is_seen_awake_and_asleep() {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let event = eventfd(1, EventfdFlags::NONBLOCK).unwrap();
        epoll::add(&epoll, &event, epoll::EventData::new_u64(7), epoll::EventFlags::IN).unwrap();
        let mut idle = Idle::new();
        for limit in [0, 100] {
            idle.set_limit(Duration::from_millis(limit));
            idle.adapt(Duration::ZERO);
            assert_eq!(idle.wait(&epoll, Duration::from_secs(10)).unwrap().collect::<Vec<_>>(), [7]);
        }
        rustix::io::read(&event, &mut [0; 8]).unwrap();
        assert_eq!(idle.wait(&epoll, Duration::ZERO).unwrap().count(), 0, "nothing has come");
    }
}
