//! What the manager would have to wait for: workers that carry out commands, AF_XDP sockets, programs that are still running. Each
//! is a task of its own, whose end is an event of the manager's loop, so that a worker that hangs stops nobody else.

use std::time::Duration;

use anyhow::Context as _;
use tokio::task::JoinSet;

/// The jobs that are under way; `T` is how one may end.
pub(super) struct Jobs<T>(JoinSet<T>);

impl<T: Send + 'static> Jobs<T> {
    /// None yet.
    pub(super) fn new() -> Self {
        Self(JoinSet::new())
    }

    /// Starts one.
    pub(super) fn start(&mut self, job: impl Future<Output: Into<T>> + Send + 'static) {
        self.0.spawn(async { job.await.into() });
    }

    /// Waits until one ends, for ever if there is none. Cancel safe.
    ///
    /// # Errors
    /// It panicked.
    pub(super) async fn next(&mut self) -> anyhow::Result<T> {
        match self.0.join_next().await {
            Some(done) => done.context("a job of the control thread broke off; the system log says why"),
            None => std::future::pending().await,
        }
    }

    /// Waits until all have ended, but no longer than that; then breaks them off.
    pub(super) async fn end(mut self, longest: Duration) {
        let all = async { while self.0.join_next().await.is_some() {} };
        if tokio::time::timeout(longest, all).await.is_err() {
            tracing::warn!("{} jobs of the control thread are broken off", self.0.len());
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
    async fn a_job_that_hangs_is_broken_off_at_the_end() {
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
