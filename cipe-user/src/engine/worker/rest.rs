//! How a worker waits for packets: asleep, or for a short while awake where that pays.
//!
//! A sleeper costs nothing, but waking it costs an interrupt to another CPU and the way out of that CPU's idle state: on
//! bare metal some microseconds, in a virtual machine thirty or more, for the waker as well. So a worker that was woken
//! again soon after it fell asleep stays awake a little longer each time, up to a ceiling (`busypoll`), and one that sleeps
//! long goes to sleep at once. Between two looks it yields, so that whoever else wants the CPU has it.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

/// Events of one look.
const EVENTS: usize = 64;

/// The shortest time worth staying awake for.
const LEAST: Duration = Duration::from_micros(5);

/// The waiting of one worker.
pub struct Rest {
    ceiling: Duration,
    awake: Duration,
    ready: Vec<epoll::Event>,
}

impl Rest {
    /// Stays awake for `ceiling` at most; zero always sleeps at once.
    pub fn new(ceiling: Duration) -> Self {
        Self { ceiling, awake: Duration::ZERO, ready: Vec::with_capacity(EVENTS) }
    }

    /// Waits for events on `epoll`, at most `longest`; returns the data of those that came, perhaps none.
    ///
    /// # Errors
    /// What epoll says, but for an interrupted wait.
    pub fn wait(&mut self, epoll: &OwnedFd, longest: Duration) -> rustix::io::Result<impl Iterator<Item = u64>> {
        let began = Instant::now();
        let awake = self.awake.min(longest);
        while began.elapsed() < awake {
            self.look(epoll, Duration::ZERO)?;
            if !self.ready.is_empty() {
                return Ok(self.data());
            }
            rustix::thread::sched_yield();
        }
        let asleep = Instant::now();
        self.look(epoll, longest)?;
        self.adapt(asleep.elapsed());
        Ok(self.data())
    }

    fn data(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.ready.iter().map(|event| event.data.u64())
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
