//! Pings both ways during an event. They show when traffic flows again, and they are the clock: nothing sleeps.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::ping::{self, HEADERS, Plan, Report};
use crate::topology::{Side, Topology};
use crate::{SOON, process};

/// Time between two pings of a side.
const INTERVAL: Duration = Duration::from_millis(4);
/// Longest time that an answer may take; after that it counts as lost.
const TIMEOUT: Duration = Duration::from_millis(500);
/// Most pings of one event: more than an hour of them.
const MOST: usize = 1_000_000;
/// Octets of the largest ping. It passes with the smallest MTU of a soak, too.
const LARGEST: usize = 900;

/// Counts the pings of side A.
pub(super) struct Clock(Receiver<()>);

impl Clock {
    /// Waits for this number of pings from now on.
    ///
    /// # Errors
    /// The pings have ended or do not come.
    pub(super) fn ticks(&self, count: usize) -> Result<()> {
        self.0.try_iter().for_each(drop);
        let deadline = Instant::now() + process::patient(SOON) + INTERVAL * count as u32;
        for _ in 0..count {
            let left = deadline.saturating_duration_since(Instant::now());
            self.0.recv_timeout(left).context("the pings go on")?;
        }
        Ok(())
    }

    /// Lets pings pass for that time.
    ///
    /// # Errors
    /// As [`Self::ticks`].
    pub(super) fn wait(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        while Instant::now() < end {
            self.ticks(1)?;
        }
        Ok(())
    }
}

/// Pings from both sides while `act` runs; returns what it returned, and the reports of the pings from A and from B.
///
/// # Errors
/// A raw socket cannot be opened.
pub(super) fn under_pings<T>(net: &Topology, act: impl FnOnce(&Clock) -> T) -> Result<(T, [Report; 2])> {
    let stop = AtomicBool::new(false);
    let (sent, ticks) = mpsc::channel();
    std::thread::scope(|scope| {
        let stop = &stop;
        let pinging = [Side::A, Side::B].map(|side| {
            let sent = (side == Side::A).then(|| sent.clone());
            let sizes = (0..MOST).map(|number| HEADERS + number * 37 % (LARGEST - HEADERS)).collect();
            let plan = Plan { window: 10_000, interval: INTERVAL, timeout: TIMEOUT, ..Plan::sizes(sizes) };
            scope.spawn(move || {
                ping::run_while(net.lan(side), side.other().host(), &plan, || {
                    if let Some(sent) = &sent {
                        // Nobody listens at the end.
                        let _ = sent.send(());
                    }
                    !stop.load(Relaxed)
                })
            })
        });
        drop(sent);
        let result = act(&Clock(ticks));
        stop.store(true, Relaxed);
        let [a, b] = pinging.map(|thread| thread.join().expect("pinging does not panic"));
        Ok((result, [a?, b?]))
    })
}

/// Waits until a ping from either side is answered.
///
/// # Errors
/// None is within [`SOON`].
pub(super) fn wait_for_answers(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let answered = ping::wait_for_answer(net.lan(side), side.other().host(), Duration::from_millis(20), SOON)?;
        ensure!(answered, "no ping from {} was answered within {:?}", side.letter(), process::patient(SOON));
    }
    Ok(())
}
