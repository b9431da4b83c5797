//! The worker threads: their number, their CPUs, and the commands to them.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use cipe_common::maps::PRIVATE_QUEUES;
use rustix::thread::{CpuSet, sched_getaffinity};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::engine::datapath::Crew;
use crate::engine::report::Reports;
use crate::engine::watchdog::{WORKER_LIMIT, Watched};
use crate::engine::worker::{self, Command, Done, Handle};
use crate::kernel::nexthop::NextHops;
use crate::xsk::{Pool, Umem};

/// How long a worker may take to carry out a command, which it does between two batches.
const COMMAND_DEADLINE: Duration = Duration::from_secs(5);

/// Most workers.
pub(super) const MAX_WORKERS: usize = PRIVATE_QUEUES as usize - 1;

/// All workers of the engine, by number. Queue q of any device belongs to worker q modulo their count.
pub(super) struct Workers {
    handles: Vec<Handle>,
    crew: Arc<Crew>,
}

impl Workers {
    /// Starts `count` workers, which share the frames of `pool`. Several are pinned, each to a CPU of its own as far as
    /// there are enough; the scheduler places one alone. Returns also a receiver of the numbers of workers that have ended.
    ///
    /// # Errors
    /// As [`worker::start`].
    pub(super) fn start(
        count: usize,
        umem: &Umem,
        pool: Pool,
        reports: &Reports,
        next_hops: &NextHops,
    ) -> anyhow::Result<(Self, mpsc::Receiver<usize>)> {
        let cpus = allowed_cpus();
        let (ended, ends) = mpsc::channel(1);
        let crew = Arc::new(Crew::new(count).context("event descriptors")?);
        let mut handles = Vec::with_capacity(count);
        for (number, pool) in pool.split(count).into_iter().enumerate() {
            let cpu = if count > 1 { cpus.get(number % cpus.len().max(1)).copied() } else { None };
            let (alive, gone) = oneshot::channel();
            let place = worker::WorkerPlace { number, crew: crew.clone(), cpu, alive };
            handles.push(worker::start(place, umem.clone(), pool, reports.clone(), next_hops.clone())?);
            let ended = ended.clone();
            tokio::spawn(async move {
                // The worker never sends on it, but drops it at its end.
                let _ = gone.await;
                // It fails only when the manager has ended.
                let _ = ended.send(number).await;
            });
        }
        Ok((Self { handles, crew }, ends))
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.handles.len()
    }

    /// The workers, for the watchdog.
    pub(super) fn watched(&self) -> impl Iterator<Item = Watched> {
        (0..self.count())
            .map(|worker| Watched::new(format!("worker {worker}"), self.crew.pulse(worker).clone(), WORKER_LIMIT))
    }

    /// The number of packets that a worker has sealed or opened for other workers.
    pub(super) fn helped(&self, worker: usize) -> u64 {
        self.crew.helped(worker)
    }

    /// Sends each worker a command that is made for its number.
    pub(super) fn tell_all(&self, mut command: impl FnMut(usize) -> Command) {
        for (number, handle) in self.handles.iter().enumerate() {
            handle.send(command(number));
        }
    }

    /// The same, and returns their answers to come.
    pub(super) fn ask_all(&self, mut command: impl FnMut(usize, Done) -> Command) -> Answers {
        let (done, answers) = Answers::to_come();
        self.tell_all(|worker| command(worker, done.clone()));
        answers
    }

    /// Sends all workers but one a command.
    pub(super) fn tell_others(&self, but: usize, command: impl Fn() -> Command) {
        for (_, handle) in self.handles.iter().enumerate().filter(|(number, _)| *number != but) {
            handle.send(command());
        }
    }

    /// Sends a command to the tunnel's home worker, which has the tunnel's UDP socket.
    pub(super) fn tell_home(&self, tunnel: u16, command: Command) {
        self.handles[usize::from(tunnel) % self.handles.len()].send(command);
    }
}

/// The answers of workers to a command. Only jobs wait for them, never the manager's loop: a worker that hangs would stop all
/// tunnels.
pub(super) struct Answers {
    all_done: mpsc::Receiver<()>,
    deadline: Instant,
}

impl Answers {
    /// The answers to commands that carry a clone of the returned [`Done`]; the deadline counts from now.
    pub(super) fn to_come() -> (Done, Self) {
        let (done, all_done) = mpsc::channel(1);
        (done, Self { all_done, deadline: Instant::now() + COMMAND_DEADLINE })
    }

    /// Waits until all workers have done it; `false`, and a warning, if one has not within [`COMMAND_DEADLINE`].
    pub(super) async fn in_time(mut self) -> bool {
        let in_time = tokio::time::timeout_at(self.deadline, self.all_done.recv()).await.is_ok();
        if !in_time {
            let seconds = COMMAND_DEADLINE.as_secs();
            tracing::warn!("a worker has not done what it was told in {seconds} s: it gets no CPU, or hangs");
        }
        in_time
    }
}

/// Deals out `all`, one for each queue of a device, to `count` workers.
pub(super) fn share_of<T>(all: Vec<T>, count: usize) -> Vec<Vec<T>> {
    let mut shares: Vec<Vec<T>> = (0..count).map(|_| Vec::new()).collect();
    for (queue, one) in all.into_iter().enumerate() {
        shares[queue % count].push(one);
    }
    shares
}

/// Queues of a hub for `count` workers. Of several, native XDP leaves the first and generic XDP the last empty
/// (`cipe-ebpf/src/private.rs`).
pub(super) fn hub_queues(count: usize) -> u32 {
    if count == 1 { 1 } else { count as u32 + 1 }
}

/// The number of workers if none was asked for: one for each receive queue of the card that has most, and at most one for each CPU
/// that this process may use. More would only wait for each other's packets.
pub(super) fn suitable_count(receive_queues: u32) -> usize {
    (receive_queues as usize).min(allowed_cpus().len()).clamp(1, MAX_WORKERS)
}

/// The CPUs that this process may use: those of its cgroup's cpuset and its affinity (sched_getaffinity(2)).
fn allowed_cpus() -> Vec<usize> {
    match sched_getaffinity(None).context("the CPUs that may be used are not to be known") {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(error) => {
            tracing::debug!("{error:#}");
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_dealt_out_in_turn() {
        assert_eq!(share_of(vec![0, 1, 2, 3, 4], 2), [vec![0, 2, 4], vec![1, 3]]);
        assert_eq!(share_of(vec![0], 3), [vec![0], vec![], vec![]]);
    }

    #[test]
    fn there_are_as_many_workers_as_queues_and_cpus_and_at_least_one() {
        let cpus = allowed_cpus().len();
        assert!(cpus > 0);
        assert_eq!(suitable_count(0), 1);
        assert_eq!(suitable_count(1), 1);
        assert_eq!(suitable_count(1000), cpus.min(MAX_WORKERS));
    }
}
