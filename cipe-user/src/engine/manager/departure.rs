//! Tunnels that end, and what goes with them, in the order that lets no packet out unsealed.

use std::sync::Arc;

use super::platform::{Platform, log_failure};
use super::tunnels::Tenant;
use super::workers::Answers;
use super::{Manager, Outcome};
use crate::control::protocol::{Event, Protocol};
use crate::engine::worker::Command;
use crate::kernel::device::Device;
use crate::kernel::hub::{Framing, Hub};

/// What goes.
#[derive(Default)]
pub(super) struct Departure {
    /// Tunnels, with the ends of an Ethernet tunnel's own pair.
    tunnels: Vec<(u16, Tenant, Option<[u32; 2]>)>,
    /// A device that did not become a tunnel's.
    unused: Option<Device>,
    /// Slots of the hubs that they leave, each as often as it is left. Not before the devices are gone: the last one to leave finds
    /// its hub without any.
    left: Vec<usize>,
    /// Hubs that have no tunnel of this engine any more. One that still carries devices, of daemons that have not come to this
    /// engine yet, stays.
    hubs: Vec<(usize, Hub)>,
    /// Slots of those that stay.
    staying: Vec<usize>,
    /// The connection that asked for it in vain, and why: it is told when nothing of it is left.
    refused: Option<(u64, anyhow::Error)>,
}

impl Departure {
    /// Takes it down when the workers have let go of the tunnels.
    async fn take_down(mut self, platform: Arc<Platform>, let_go: Answers) -> Outcome {
        let_go.in_time().await;
        for (_, tenant, _) in self.tunnels.iter().filter(|(_, tenant, _)| tenant.socks.is_none()) {
            log_failure(platform.programs().remove_carrier_address(tenant.listens));
        }
        let devices: Vec<&Device> =
            self.tunnels.iter().map(|(_, tenant, _)| &tenant.device).chain(&self.unused).collect();
        log_failure(platform.netlink.remove_all(&devices).await);
        for (_, tenant, ends) in &self.tunnels {
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
                self.staying.push(slot);
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

/// What there is of a tunnel that does not come to be.
pub(super) enum Begun {
    /// All but that it is alive.
    Tunnel(u16),
    /// It has entered the hub in this slot, perhaps with a device.
    Device(usize, Option<Device>),
}

impl Manager {
    /// Removes tunnels and everything that they had.
    pub(super) fn detach_all(&mut self, numbers: &[u16]) {
        self.detach(numbers, None);
    }

    /// Takes back what was begun for a tunnel that does not come to be, and then says why.
    pub(super) fn take_back(&mut self, begun: Begun, connection: u64, error: anyhow::Error) {
        let refused = Some((connection, error));
        match begun {
            Begun::Tunnel(number) => self.detach(&[number], refused),
            Begun::Device(slot, unused) => {
                let (_, nothing) = Answers::to_come();
                self.depart(Departure { unused, left: vec![slot], refused, ..Departure::default() }, nothing);
            }
        }
    }

    fn detach(&mut self, numbers: &[u16], refused: Option<(u64, anyhow::Error)>) {
        let (done, let_go) = Answers::to_come();
        let mut departure = Departure { refused, ..Departure::default() };
        for number in numbers {
            let Some(tenant) = self.disconnect(*number) else { continue };
            self.platform.workers.tell_all(|_| Command::RemoveTunnel(*number, done.clone()));
            let ends = self.hubs.ends(tenant.hub).filter(|_| tenant.protocol == Protocol::Ethernet);
            departure.left.push(tenant.hub);
            departure.tunnels.push((*number, tenant, ends));
        }
        if !departure.tunnels.is_empty() {
            self.depart(departure, let_go);
        }
    }

    fn depart(&mut self, departure: Departure, let_go: Answers) {
        self.departing += 1;
        self.jobs.start(departure.take_down(self.platform.clone(), let_go));
    }

    /// Forgets what is taken down, and lets those in who have waited for names and ports to be free.
    pub(super) async fn departed(&mut self, Departure { tunnels, left, hubs, staying, refused, .. }: Departure) {
        self.departing -= 1;
        staying.into_iter().for_each(|slot| self.hubs.keep(slot));
        for (slot, _) in &hubs {
            self.hubs.remove(*slot);
        }
        if hubs.iter().any(|(_, hub)| hub.framing == Framing::Ethernet) {
            self.set_ethernet_devices();
        }
        for (number, ..) in &tunnels {
            self.keys.clear_tunnel(*number);
        }
        // With them the ports are free.
        drop(tunnels);
        let empty: Vec<_> = left.into_iter().filter_map(|slot| Some((slot, self.hubs.leave(slot)?))).collect();
        if !empty.is_empty() {
            let (_, nothing) = Answers::to_come();
            return self.depart(Departure { hubs: empty, refused, ..Departure::default() }, nothing);
        }
        if let Some((connection, error)) = refused {
            self.daemons.say(connection, Event::Failed { message: format!("{error:#}") });
        }
        while self.departing == 0
            && let Some((connection, request)) = self.waiting.pop_front()
        {
            self.carry_out(connection, request).await;
        }
    }

    /// Takes a tunnel out of service; its device stays and drops everything.
    fn disconnect(&mut self, number: u16) -> Option<Tenant> {
        let tenant = self.tunnels.remove(number)?;
        if tenant.lan.is_some() {
            self.leave_lan(number);
        }
        self.set_busy_poll();
        self.daemons.part(number);
        log_failure(self.platform.programs().clear_tunnel(number.into()));
        if let Some(follower) = &tenant.follower {
            follower.abort();
        }
        if let Some(carrier) = tenant.carrier {
            self.carriers.release(carrier, number, &mut self.jobs);
        }
        Some(tenant)
    }

    /// Ends all tunnels. Their daemons live on, or they would have gone before, and so do their devices.
    pub(super) async fn close(mut self) {
        let (done, let_go) = Answers::to_come();
        let numbers = self.tunnels.numbers(|_| true);
        for number in &numbers {
            if let Some(tenant) = self.disconnect(*number) {
                self.platform.workers.tell_all(|_| Command::RemoveTunnel(*number, done.clone()));
                tracing::info!("{}: drops all traffic until another engine takes it over", tenant.device.name);
            }
        }
        drop(done);
        let_go.in_time().await;
        numbers.into_iter().for_each(|number| self.keys.clear_tunnel(number));
        self.jobs.end(LONGEST_END).await;
    }
}

/// How long the engine's end may take when the workers have let go of its tunnels.
const LONGEST_END: std::time::Duration = std::time::Duration::from_secs(5);
