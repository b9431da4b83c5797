//! How tunnels end. This file is a part of the manager, not a room, because a tunnel leaves all rooms in a fixed order, in which no
//! packet leaves in clear:
//!
//! 1. [`Manager::disconnect`] takes a tunnel out of the rooms: from then on its device drops all packets.
//! 2. A job, [`Departure::take_down`], waits until the workers have closed its sockets, and removes its device.
//! 3. [`Manager::departed`] frees its number, name and port, and then attaches the tunnels that wait for those.

use std::sync::Arc;

use super::Manager;
use super::jobs::Outcome;
use super::platform::{Platform, log_failure};
use super::tunnel_devices::set_ethernet_devices;
use super::tunnels::Tenant;
use super::workers::Answers;
use crate::control::protocol::{Event, Protocol};
use crate::engine::worker::Command;
use crate::kernel::device::Device;
use crate::kernel::hub::{Framing, Hub};

/// Tunnels that end together, and what of theirs is to be removed.
#[derive(Default)]
pub(super) struct Departure {
    tunnels: Vec<Departing>,
    /// The devices of the tunnels stay, and so do their places on the hubs.
    keeps_devices: bool,
    /// Devices that are no tunnel's.
    unused: Vec<Device>,
    /// Slots of the hubs that they leave, each as often as it is left. They leave after their devices are removed: so the last
    /// one that leaves finds a hub without devices.
    left: Vec<usize>,
    /// Hubs without a tunnel of this engine. A hub that has devices of daemons that have not connected to this engine yet is kept.
    hubs: Vec<(usize, Hub)>,
    /// Slots of the hubs that are kept.
    kept: Vec<usize>,
    /// The connection whose attach was refused, and why: it is told when all is removed.
    refused: Option<(u64, anyhow::Error)>,
}

/// A tunnel that ends.
struct Departing {
    number: u16,
    tenant: Tenant,
    /// The indexes of an Ethernet tunnel's own pair.
    ends: Option<[u32; 2]>,
}

/// What was made for a tunnel whose attach is refused.
pub(super) enum Begun {
    /// The tunnel, which is not up.
    Tunnel(u16),
    /// It has entered the hub in this slot, perhaps with a device.
    Device(usize, Option<Device>),
}

impl Departure {
    /// Removes all of it, when the workers have closed the tunnels' sockets.
    async fn take_down(mut self, platform: Arc<Platform>, closed: Answers) -> Outcome {
        closed.in_time().await;
        for Departing { tenant, .. } in self.tunnels.iter().filter(|departing| departing.tenant.socks.is_none()) {
            log_failure(platform.programs().remove_carrier_address(tenant.listens));
        }
        let of_tunnels = self.tunnels.iter().filter(|_| !self.keeps_devices).map(|departing| &departing.tenant.device);
        let devices: Vec<&Device> = of_tunnels.chain(&self.unused).collect();
        log_failure(platform.netlink.remove_all(&devices).await);
        for Departing { tenant, ends, .. } in &self.tunnels {
            match (tenant.protocol, ends) {
                (Protocol::Ip, _) => log_failure(platform.programs().remove_private_address(tenant.device.mac)),
                (Protocol::Ethernet, Some(ends)) => log_failure(platform.programs().remove_ethernet_device(*ends)),
                (Protocol::Ethernet, None) => {}
            }
        }
        let mut removed = Vec::new();
        for (slot, hub) in std::mem::take(&mut self.hubs) {
            let is_in_use = platform.netlink.is_in_use(&hub).await.unwrap_or_else(|error| {
                tracing::warn!("{}: stays: {error}", hub.name);
                true
            });
            if is_in_use {
                self.kept.push(slot);
                continue;
            }
            platform.workers.ask_all(|_, done| Command::RemoveHub(slot, done)).in_time().await;
            match platform.netlink.remove_hub(&hub).await {
                Ok(()) => platform.programs().detach_private(hub.index),
                Err(error) => tracing::warn!("while removing a hub: {error}"),
            }
            removed.push((slot, hub));
        }
        self.hubs = removed;
        Outcome::Departed(self)
    }
}

impl Manager {
    /// Removes tunnels and all that they had.
    pub(super) fn detach_all(&mut self, numbers: &[u16]) {
        self.detach(numbers, None);
    }

    /// Removes what was made for a tunnel whose attach is refused, and then tells the daemon why.
    pub(super) fn take_back(&mut self, begun: Begun, connection: u64, error: anyhow::Error) {
        let refused = Some((connection, error));
        match begun {
            Begun::Tunnel(number) => self.detach(&[number], refused),
            Begun::Device(slot, unused) => {
                let (_, nothing) = Answers::to_come();
                let unused = unused.into_iter().collect();
                self.depart(Departure { unused, left: vec![slot], refused, ..Departure::default() }, nothing);
            }
        }
    }

    /// Removes a tunnel, but not its device, which keeps its place on its hub.
    pub(super) fn detach_but_device(&mut self, number: u16) {
        self.remove_tunnels(&[number], Departure { keeps_devices: true, ..Departure::default() });
    }

    /// Removes devices that no tunnel has, and their hubs, if nothing else is on them.
    pub(super) fn remove_unused(&mut self, unused: Vec<Device>, slots: impl IntoIterator<Item = usize>) {
        let hubs = slots.into_iter().filter_map(|slot| Some((slot, self.hubs.vacate(slot)?))).collect();
        let (_, nothing) = Answers::to_come();
        self.depart(Departure { unused, hubs, ..Departure::default() }, nothing);
    }

    fn detach(&mut self, numbers: &[u16], refused: Option<(u64, anyhow::Error)>) {
        self.remove_tunnels(numbers, Departure { refused, ..Departure::default() });
    }

    fn remove_tunnels(&mut self, numbers: &[u16], mut departure: Departure) {
        let (done, closed) = Answers::to_come();
        for number in numbers.iter().copied() {
            let Some(tenant) = self.disconnect(number) else { continue };
            self.shared.platform.workers.tell_all(|_| Command::RemoveTunnel(number, done.clone()));
            let ends = self.hubs.ends(tenant.hub).filter(|_| tenant.protocol == Protocol::Ethernet);
            if !departure.keeps_devices {
                departure.left.push(tenant.hub);
            }
            departure.tunnels.push(Departing { number, tenant, ends });
        }
        if !departure.tunnels.is_empty() || departure.refused.is_some() {
            self.depart(departure, closed);
        }
    }

    fn depart(&mut self, departure: Departure, closed: Answers) {
        self.departing += 1;
        self.shared.jobs.start(departure.take_down(self.shared.platform.clone(), closed));
    }

    /// Forgets what is removed, and attaches the tunnels that wait for names and ports to be free.
    pub(super) async fn departed(&mut self, departure: Departure) {
        let Departure { tunnels, left, hubs, kept, refused, .. } = departure;
        self.departing -= 1;
        kept.into_iter().for_each(|slot| self.hubs.keep(slot));
        for (slot, hub) in &hubs {
            self.hubs.remove(*slot);
            self.shared.daemons.tell_successor(vec![Event::HubGone { hidden: hub.hidden_index }]);
        }
        if hubs.iter().any(|(_, hub)| hub.framing == Framing::Ethernet) {
            set_ethernet_devices(&self.shared, &self.hubs);
        }
        for departing in &tunnels {
            self.keys.clear_tunnel(departing.number);
        }
        // This closes their sockets, so that the ports are free.
        drop(tunnels);
        let empty: Vec<_> = left.into_iter().filter_map(|slot| Some((slot, self.hubs.leave(slot)?))).collect();
        if !empty.is_empty() {
            let (_, nothing) = Answers::to_come();
            return self.depart(Departure { hubs: empty, refused, ..Departure::default() }, nothing);
        }
        if let Some((connection, error)) = refused {
            self.shared.daemons.send(connection, Event::Failed { message: format!("{error:#}") });
        }
        self.carry_out_deferred().await;
    }

    /// Takes a tunnel out of all rooms; its device stays and drops all packets.
    fn disconnect(&mut self, number: u16) -> Option<Tenant> {
        self.idle(number);
        let tenant = self.shared.tunnels.remove(number);
        self.shared.update_busy_poll();
        tenant
    }

    /// Takes a tunnel out of the rooms where its packets pass.
    pub(super) fn idle(&mut self, number: u16) {
        let Some(tenant) = self.shared.tunnels.get_mut(number) else { return };
        let (lan, carrier, follower) = (tenant.lan.take(), tenant.carrier.take(), tenant.follower.take());
        (tenant.hop, tenant.door) = (None, None);
        if lan.is_some() {
            self.lans.leave(number, &self.shared);
        }
        self.shared.daemons.unassign(number);
        log_failure(self.shared.platform.programs().clear_tunnel(number.into()));
        if let Some(follower) = follower {
            follower.abort();
        }
        if let Some(carrier) = carrier {
            self.doors.release(carrier, number, &mut self.shared);
        }
    }

    /// Ends the engine. The daemons of the tunnels that are left live on, and so do their devices, which drop all packets.
    pub(super) async fn close(mut self) {
        let (done, closed) = Answers::to_come();
        let numbers = self.shared.tunnels.numbers(|_| true);
        for number in &numbers {
            if let Some(tenant) = self.disconnect(*number) {
                self.shared.platform.workers.tell_all(|_| Command::RemoveTunnel(*number, done.clone()));
                tracing::info!("{}: drops all traffic until another engine takes it over", tenant.device.name);
            }
        }
        drop(done);
        closed.in_time().await;
        numbers.into_iter().for_each(|number| self.keys.clear_tunnel(number));
        self.shared.jobs.end(MAX_JOBS_END).await;
    }
}

/// How long the jobs under way may take at the engine's end.
const MAX_JOBS_END: std::time::Duration = std::time::Duration::from_secs(5);
