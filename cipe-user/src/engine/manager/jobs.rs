//! Jobs: what waits for workers, for AF_XDP sockets, or for programs that are still running. Each is a task of its own, and its end
//! is an event of the manager's loop, so that a worker that hangs does not stop other tunnels.

use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;

use super::departure::Departure;
use super::{carriers, hubs, lan};

/// The result of a job.
pub(super) enum Outcome {
    /// A hub is open, for the tunnel that is being attached, or cannot be opened.
    Hub(hubs::Opened),
    /// All workers have taken the tunnel that this connection attaches, or not in time.
    Taken { number: u16, connection: u64, in_time: bool },
    /// Tunnels and what belonged to them are removed.
    Departed(Departure),
    /// A carrier device is open or closed for AF_XDP, or cannot be opened.
    Carrier(carriers::Ended),
    /// A LAN card is open for short cuts, or cannot be opened.
    Lan(lan::Opened),
    /// The losses of these tunnels are counted, for the status that this connection asked for.
    Counted { connection: u64, numbers: Vec<u16> },
}

impl From<hubs::Opened> for Outcome {
    fn from(opened: hubs::Opened) -> Self {
        Self::Hub(opened)
    }
}

impl From<carriers::Ended> for Outcome {
    fn from(ended: carriers::Ended) -> Self {
        Self::Carrier(ended)
    }
}

impl From<lan::Opened> for Outcome {
    fn from(opened: lan::Opened) -> Self {
        Self::Lan(opened)
    }
}

/// The jobs that are under way, each with a result of type `T`.
pub(super) struct Jobs<T>(JoinSet<T>);

impl<T: Send + 'static> Jobs<T> {
    /// No job yet.
    pub(super) fn new() -> Self {
        Self(JoinSet::new())
    }

    /// Starts a job.
    pub(super) fn start(&mut self, job: impl Future<Output: Into<T>> + Send + 'static) {
        self.0.spawn(async { job.await.into() });
    }

    /// Waits until a job ends, for ever if there is none. Cancel safe.
    ///
    /// # Errors
    /// The job panicked.
    pub(super) async fn next(&mut self) -> anyhow::Result<T> {
        match self.0.join_next().await {
            Some(done) => done.context("a job of the control thread broke off; the system log says why"),
            None => std::future::pending().await,
        }
    }

    /// Waits until all jobs have ended, `longest` at most, and cancels the rest.
    pub(super) async fn end(mut self, longest: Duration) {
        let all = async { while self.0.join_next().await.is_some() {} };
        if tokio::time::timeout(longest, all).await.is_err() {
            tracing::warn!("{} jobs of the control thread are cancelled", self.0.len());
        }
        self.0.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn the_end_of_a_job_is_an_event_and_a_panic_an_error() {
        let mut jobs = Jobs::<u32>::new();
        jobs.start(async { 7_u16 });
        assert_eq!(jobs.next().await.unwrap(), 7);
        jobs.start(std::future::poll_fn(|_| -> std::task::Poll<u32> { panic!("broken on purpose") }));
        assert!(jobs.next().await.is_err());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_job_that_hangs_is_cancelled_at_the_end() {
        let (dropped, gone) = tokio::sync::oneshot::channel::<()>();
        let mut jobs = Jobs::<u32>::new();
        jobs.start(async move {
            let _dropped = dropped;
            std::future::pending::<u32>().await
        });
        jobs.end(Duration::from_millis(1)).await;
        assert!(gone.await.is_err());
    }
}
