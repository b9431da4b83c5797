//! What the rooms of the manager share: the tunnels, the daemons' connections, and the jobs under way. Each room gets it as an
//! argument; what only one room needs is a field of that room.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::connections::Daemons;
use super::jobs::{Jobs, Outcome};
use super::platform::Platform;
use super::tunnels::Tunnels;
use crate::engine::tunnel::Egress;
use crate::engine::worker::Command;

/// The shared state.
pub(super) struct Shared {
    pub platform: Arc<Platform>,
    pub jobs: Jobs<Outcome>,
    pub tunnels: Tunnels,
    pub daemons: Daemons,
    /// The busy-poll time that the workers have.
    busy_poll: Duration,
}

impl Shared {
    /// No tunnel, no connection and no job yet.
    pub(super) fn new(platform: Arc<Platform>, daemons: Daemons) -> Self {
        Self { platform, jobs: Jobs::new(), tunnels: Tunnels::default(), daemons, busy_poll: Duration::ZERO }
    }

    /// Sets the workers' busy-poll time to the longest that a tunnel asks for.
    pub(super) fn update_busy_poll(&mut self) {
        let longest = self.tunnels.busy_poll();
        if std::mem::replace(&mut self.busy_poll, longest) != longest {
            self.platform.workers.tell_all(|_| Command::BusyPoll(longest));
        }
    }

    /// Has the workers send a tunnel's datagrams to `peer` by this egress. They ignore it if the tunnel has another peer by then.
    pub(super) fn set_egress(&self, number: u16, peer: SocketAddr, egress: Egress) {
        if let Some(tenant) = self.tunnels.get(number) {
            self.platform.workers.tell_all(|_| Command::SetEgress(number, peer.ip(), egress, tenant.sizes.mtu()));
        }
    }
}
