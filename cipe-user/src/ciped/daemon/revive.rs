//! Starts a dead engine again and restores its tunnel.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Daemon, OperatorCommand};
use crate::ciped::attach::{Attached, Placement, attach};
use crate::ciped::session::End;
use crate::control::protocol::Request;
use crate::kernel::zone;

/// The first pause before a dead engine is started again; it doubles each time.
const MIN_BACK_OFF: Duration = Duration::from_millis(100);
/// The longest such pause.
const MAX_BACK_OFF: Duration = Duration::from_secs(10);

impl Daemon {
    /// Starts the engine again and attaches, with growing pauses, until this works or the operator stops the daemon.
    pub(super) async fn revive(&mut self, commands: &mut mpsc::Receiver<OperatorCommand>) -> Option<End> {
        let device = self.facts.device.clone();
        tracing::error!("{device}: the engine has gone; the interface drops all traffic until it is back");
        let mut back_off = MIN_BACK_OFF;
        loop {
            // Keys that are too old by now are not for the next engine.
            let steps = self.session.tick_sealing(self.clock.now());
            if let Some(end) = self.carry_out(steps).await {
                return Some(end);
            }
            let place = self.place();
            // If it cannot, it says so.
            let resumes_sealed = place.sealed.as_ref().is_some_and(|sealed| sealed.resume.is_some());
            let attached = attach(&self.setup, place);
            tokio::select! {
                biased;
                command = commands.recv() => if let Some(end) = self.without_engine(command) { return Some(end) },
                outcome = attached => match outcome {
                    Ok(Attached { engine, me, resumed, heartbeat, ledger, .. }) => {
                        if me != self.facts.me {
                            tracing::info!("{device}: changing my address: {}", zone::Shown(me));
                            self.facts.me = me;
                        }
                        self.ledger = ledger;
                        if resumed || resumes_sealed {
                            tracing::info!("{device}: the engine is back, and goes on under the same keys");
                        } else {
                            tracing::info!("{device}: the engine is back; keys are exchanged again");
                        }
                        if !resumed {
                            self.session.start_over();
                            self.keys.clear();
                        }
                        self.engine = Some(engine);
                        self.heartbeat = heartbeat;
                        self.guard_again(&device);
                        if self.relay.is_some() {
                            self.send(&Request::SetRelay { relay: self.relay_at });
                        }
                        return None;
                    }
                    Err(error) => tracing::warn!("{device}: {error}; next attempt in {back_off:?}"),
                },
            }
            let pause = Instant::now() + back_off;
            loop {
                tokio::select! {
                    biased;
                    command = commands.recv() => if let Some(end) = self.without_engine(command) { return Some(end) },
                    () = tokio::time::sleep_until(pause) => break,
                }
            }
            back_off = (back_off * 2).min(MAX_BACK_OFF);
        }
    }

    /// The next engine may have made the interface again.
    fn guard_again(&mut self, device: &str) {
        if let Some(guard) = &mut self.guard
            && let Err(error) = guard.follow(device)
        {
            tracing::error!("{device}: new routes get no guard routes: {error:#}");
        }
    }

    /// Returns the current addresses of the tunnel, for the next engine. Keeps a port that the system chose, because
    /// the peer knows it.
    fn place(&self) -> Placement {
        let configured = self.setup.options.me.address;
        let port = if configured.port() == 0 { self.facts.me.port() } else { configured.port() };
        // The device of a link-local address may have a new index since the start.
        let zone = zone::of(self.facts.me).or(zone::of(configured)).unwrap_or_default();
        let me = zone::socket_address(configured.ip(), port, zone);
        let device = Some(self.facts.device.clone());
        Placement {
            device,
            me,
            peer: self.peer,
            send_packets: self.session.send_packets(),
            static_data: self.session.static_data(),
            sealed: self.session.attach_sealed(self.clock.now()),
            resume: self.keys.for_next_engine(),
            ledger: self.ledger.clone(),
        }
    }

    fn without_engine(&mut self, command: Option<OperatorCommand>) -> Option<End> {
        match command {
            Some(OperatorCommand::Reload) => {
                self.reload();
                None
            }
            Some(OperatorCommand::Stop) | None => Some(End::Asked("asked to stop".to_owned())),
        }
    }
}
