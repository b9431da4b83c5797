//! Log records of the programs: rare events, from a ring buffer.

use std::io;

use aya_log::EbpfLogger;
use log::Log;
use tokio::io::{Interest, unix::AsyncFd};

use super::Programs;

impl Programs {
    /// A task that passes the programs' log records to the `log` crate's logger (and so to tracing's). Spawn it on a
    /// tokio runtime with I/O; it ends only with an error. `None` on the second call.
    pub fn logs(&mut self) -> Option<impl Future<Output = io::Error> + Send + 'static> {
        self.logs_to(log::logger())
    }

    /// The same with another logger.
    pub(super) fn logs_to(
        &mut self,
        logger: impl Log + 'static,
    ) -> Option<impl Future<Output = io::Error> + Send + 'static> {
        let logger = EbpfLogger::init_with_logger(&mut self.ebpf, logger).ok()?;
        Some(async move {
            // SAFETY: the logger owns the ring buffer's descriptor, and neither replaces nor closes it before its drop.
            let mut logger = match unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) } {
                Ok(logger) => logger,
                Err(error) => return error.into(),
            };
            loop {
                match logger.readable_mut().await {
                    Ok(mut ready) => {
                        // Cleared first: records after this point make it ready again.
                        ready.clear_ready();
                        ready.get_inner_mut().flush();
                    }
                    Err(error) => return error,
                }
            }
        })
    }
}
