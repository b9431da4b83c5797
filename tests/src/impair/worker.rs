//! The relay's thread: what it holds, and when it lets it go.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};

use super::{HEADERS, Impairment, RECENT_DATAGRAMS, Rate, Shared, State};

/// Most datagrams read in a row from one side.
const BURST: usize = 64;

/// One direction.
pub(super) struct Lane {
    pub(super) rng: StdRng,
    pub(super) held: VecDeque<Held>,
    /// When a line with a rate limit has sent all that it has accepted.
    pub(super) free: Instant,
}

impl Lane {
    /// Returns when a datagram of `octets` octets that arrives now leaves the line; `None`: the queue has no room for it.
    pub(super) fn leaves(&mut self, octets: usize, rate: Option<Rate>, now: Instant) -> Option<Instant> {
        let Some(Rate { octets: a_second, queue }) = rate else { return Some(now) };
        let begins = self.free.max(now);
        if begins - now > queue {
            return None;
        }
        self.free = begins + Duration::from_secs(1) * (octets + HEADERS) as u32 / a_second;
        Some(self.free)
    }
}

/// A waiting datagram.
pub(super) struct Held {
    datagram: Vec<u8>,
    damaged: bool,
    /// Number of datagrams that must still overtake it.
    overtaken_by: usize,
    /// Earliest time to forward it.
    ready: Instant,
}

impl Held {
    fn at_once(datagram: Vec<u8>) -> Self {
        Self { datagram, damaged: false, overtaken_by: 0, ready: Instant::now() }
    }

    /// Latest time to forward it.
    fn due(&self) -> Instant {
        if self.overtaken_by > 0 { self.ready + Impairment::PATIENCE } else { self.ready }
    }
}

pub(super) struct Worker {
    pub(super) sockets: [UdpSocket; 2],
    pub(super) ends: [SocketAddr; 2],
    pub(super) lanes: [Lane; 2],
    pub(super) shared: Arc<Shared>,
    pub(super) wake: Arc<OwnedFd>,
}

impl Worker {
    pub(super) fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.wait()?;
            if let Some((side, socket)) = self.shared.lock().moved.take() {
                self.sockets[side] = socket;
            }
            self.inject();
            for side in [0, 1] {
                for _ in 0..BURST {
                    match self.sockets[side].recv_from(&mut buffer) {
                        Ok((length, from)) => {
                            self.ends[side] = from;
                            self.take(side, buffer[..length].to_vec());
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // An ICMP error about an end that does not exist.
                        Err(_) => {}
                    }
                }
            }
            [0, 1].into_iter().for_each(|side| self.release(side));
        }
        Ok(())
    }

    fn inject(&mut self) {
        let injected = std::mem::take(&mut self.shared.lock().injected);
        for (side, datagram) in injected {
            self.lanes[side].held.push_back(Held::at_once(datagram));
        }
    }

    fn wait(&self) -> io::Result<()> {
        let mut count = [0; 8];
        let due = self.lanes.iter().flat_map(|lane| &lane.held).map(Held::due).min();
        let timeout = due.and_then(|due| Timespec::try_from(due.saturating_duration_since(Instant::now())).ok());
        let fds = [self.sockets[0].as_fd(), self.sockets[1].as_fd(), self.wake.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = rustix::io::read(&self.wake, &mut count);
        Ok(())
    }

    /// Decides the fate of a datagram from `side`.
    fn take(&mut self, side: usize, mut datagram: Vec<u8>) {
        let mut state = self.shared.lock();
        let impairment = state.impairment;
        let recent = &mut state.recent[side];
        recent.push_back(datagram.clone());
        if recent.len() > RECENT_DATAGRAMS {
            recent.pop_front();
        }
        state.passed[side].received += 1;
        let lane = &mut self.lanes[side];
        if let Some(attack) = &mut state.attack {
            let instead = attack(side, datagram);
            state.passed[side].lost += u64::from(instead.is_empty());
            for (side, datagram) in instead {
                self.lanes[side].held.push_back(Held::at_once(datagram));
            }
            state.waiting = waiting(&self.lanes, &state);
            return;
        }
        let passed = &mut state.passed[side];
        for held in &mut lane.held {
            held.overtaken_by = held.overtaken_by.saturating_sub(1);
        }
        let fate = impairment.fate(&mut lane.rng);
        if fate.lost {
            passed.lost += 1;
            return;
        }
        let Some(left) = lane.leaves(datagram.len(), impairment.rate, Instant::now()) else {
            passed.lost += 1;
            return;
        };
        let damaged = fate.damaged.is_some() && !datagram.is_empty();
        if let Some(bit) = fate.damaged.filter(|_| damaged) {
            let bit = bit as usize % (datagram.len() * 8);
            datagram[bit / 8] ^= 1 << (bit % 8);
        }
        passed.doubled += u64::from(fate.doubled && !damaged);
        passed.overtaken += u64::from(fate.overtaken_by > 0);
        let ready = left + impairment.delay;
        for _ in 0..=usize::from(fate.doubled) {
            let datagram = datagram.clone();
            lane.held.push_back(Held { datagram, damaged, overtaken_by: fate.overtaken_by, ready });
        }
        state.waiting = waiting(&self.lanes, &state);
    }

    /// Forwards datagrams from `side` that are due, in the order of arrival, except those that wait to be overtaken.
    fn release(&mut self, side: usize) {
        let now = Instant::now();
        let other = 1 - side;
        let mut at = 0;
        while let Some(held) = self.lanes[side].held.get(at) {
            if held.due() > now {
                at += 1;
                continue;
            }
            let Some(held) = self.lanes[side].held.remove(at) else { break };
            let sent = self.sockets[other].send_to(&held.datagram, self.ends[other]);
            let mut state = self.shared.lock();
            state.waiting = state.waiting.saturating_sub(1);
            let passed = &mut state.passed[side];
            match sent {
                Ok(_) => {
                    passed.sent += 1;
                    passed.damaged += u64::from(held.damaged);
                }
                Err(_) => passed.refused += 1,
            }
        }
    }
}

/// Datagrams that are still to be forwarded.
fn waiting(lanes: &[Lane; 2], state: &State) -> usize {
    lanes.iter().map(|lane| lane.held.len()).sum::<usize>() + state.injected.len()
}
