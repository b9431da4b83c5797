//! The end of a daemon: what it tells the peer and the engine, and what of the tunnel stays.

use std::future;
use std::time::Duration;

use super::{Daemon, run_script};
use crate::ciped::session::End;
use crate::control::protocol::Request;

/// Maximum time for a busy engine to read the last message.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(1);

impl Daemon {
    /// Ends the tunnel. If nobody has asked for that, the interface and the guard routes stay.
    pub(super) async fn stop(&mut self, ended: &End) {
        let device = self.facts.device.clone();
        match ended {
            End::Asked(reason) | End::Down(reason) | End::Again(reason) => tracing::info!("{device}: {reason}"),
            End::Failed(reason) => tracing::error!("{device}: {reason}"),
        }
        let (End::Asked(reason) | End::Down(reason) | End::Again(reason) | End::Failed(reason)) = ended;
        match &mut self.engine {
            Some(engine) => {
                if let Some(farewell) = self.session.farewell(reason, self.clock.now()) {
                    let sent = async {
                        engine.send(&farewell)?;
                        engine.flush().await
                    };
                    match tokio::time::timeout(FAREWELL_TIMEOUT, sent).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => tracing::warn!("{device}: no CT_KILL sent: {error}"),
                        Err(_) => tracing::warn!("{device}: no CT_KILL sent: the engine does not read"),
                    }
                }
            }
            None => tracing::warn!("{device}: no engine to remove the interface; the next engine removes it"),
        }
        self.keep_last().await;
        run_script(self.setup.options.ipdown.clone(), self.facts.clone(), future::pending()).await;
        self.log_statistics().await;
        let is_asked = matches!(ended, End::Asked(_));
        if is_asked || matches!(ended, End::Again(_)) {
            self.detach().await;
        }
        // Of a tunnel that is not detached, the interface stays and drops everything.
        self.engine = None;
        if let Some(guard) = self.guard.take().filter(|_| !matches!(ended, End::Again(_))) {
            guard.end(is_asked).await;
        }
        tracing::info!("{device}: down");
    }

    /// Has the engine remove the tunnel when the connection closes.
    async fn detach(&mut self) {
        let Some(engine) = &mut self.engine else { return };
        let sent = async {
            engine.send(&Request::Detach)?;
            engine.flush().await
        };
        if !matches!(tokio::time::timeout(FAREWELL_TIMEOUT, sent).await, Ok(Ok(()))) {
            let device = &self.facts.device;
            tracing::warn!("{device}: the engine does not read: the interface stays; `cipe down {device}` removes it");
        }
    }
}
