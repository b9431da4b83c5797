//! Orphans: tunnels whose daemons have gone without a word, because they were killed, crashed, or gave up. An orphan has no keys and
//! drops all packets, until a daemon attaches the same tunnel, or an operator ends it. This file is a part of the manager, not a room.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use super::Manager;
use super::platform::log_failure;
use super::tunnel_devices::ELSEWHERE;
use crate::control::protocol::{Attach, Event, Protocol};
use crate::engine::worker::Command;
use crate::kernel::device::Device;
use crate::kernel::hub::Waiting;

/// Devices of orphans that wait for daemons whose attach is deferred, with the slots of their hubs, by connection.
pub(super) type KeptDevices = HashMap<u64, (usize, Device)>;

impl Manager {
    /// Handles the end of a connection; returns its tunnel if that ends with it.
    pub(super) fn closed(&mut self, connection: u64) -> Option<u16> {
        let (number, detaches) = self.shared.daemons.remove(connection)?;
        let tenant = self.shared.tunnels.get(number)?;
        if detaches || !tenant.stays || !tenant.is_open || tenant.is_gone {
            return Some(number);
        }
        self.orphan(number);
        None
    }

    fn orphan(&mut self, number: u16) {
        self.idle(number);
        let Some(tenant) = self.shared.tunnels.get_mut(number) else { return };
        (tenant.orphaned, tenant.busy_poll) = (Some(Instant::now()), Duration::ZERO);
        if let Some(sealed) = &tenant.sealed {
            sealed.clear();
        }
        let (listens, is_relayed) = (tenant.listens, tenant.socks.is_some());
        tracing::warn!(
            "{name}: its daemon has gone without a word; all packets are dropped until it is back, or `cipe down {name}`",
            name = tenant.device.name
        );
        self.shared.update_busy_poll();
        self.keys.clear_tunnel(number);
        if !is_relayed {
            // Datagrams then reach the UDP socket, where they are counted.
            log_failure(self.shared.platform.programs().remove_carrier_address(listens));
        }
        self.shared.platform.workers.tell_all(|_| Command::Orphan(number));
    }

    /// Removes the orphan that an attach is for, or whose carrier port it needs; returns whether there is one. The attach is to be
    /// deferred then. The device of the attach's own tunnel is kept for it.
    pub(super) fn make_way(&mut self, connection: u64, attach: &Attach) -> bool {
        let orphans = || self.shared.tunnels.iter().filter(|(_, tenant)| tenant.orphaned.is_some());
        let own = orphans().find(|(_, tenant)| tenant.is_meant_by(attach));
        let Some((number, tenant)) = own.or_else(|| orphans().find(|(_, tenant)| tenant.has_port_of(attach))) else {
            return false;
        };
        let (slot, device) = (tenant.hub, tenant.device.clone());
        let is_kept = own.is_some()
            && tenant.protocol == attach.protocol
            && device.index != ELSEWHERE
            && (attach.protocol == Protocol::Ethernet || self.hubs.suits(slot, attach.xdp_mode));
        if is_kept {
            tracing::info!("{}: its daemon is back", device.name);
            self.kept.insert(connection, (slot, device));
            self.detach_but_device(number);
        } else {
            tracing::warn!("{}: removed for another tunnel; its guard routes stay", device.name);
            self.detach_all(&[number]);
        }
        true
    }

    /// Removes the devices that the engine before this one left, and whose daemons have ended before they attached here; returns
    /// whether there are any. Guard routes stay in their place.
    pub(super) fn sweep(&mut self) -> bool {
        if self.waiting.is_empty() || self.is_busy() {
            return false;
        }
        let (tunnels, kept) = (&self.shared.tunnels, &self.kept);
        self.waiting.retain(|waiting| {
            let index = waiting.device.index;
            tunnels.of_device(index).is_none() && kept.values().all(|(_, device)| device.index != index)
        });
        let swept: Vec<Waiting> = self.waiting.extract_if(.., |waiting| waiting.is_leftover()).collect();
        if swept.is_empty() {
            return false;
        }
        for Waiting { device, .. } in &swept {
            tracing::info!("{}: its daemon died with the last engine; removed", device.name);
        }
        let slots: BTreeSet<usize> = swept.iter().filter_map(|waiting| self.hubs.of_device(waiting.hub)).collect();
        self.remove_unused(swept.into_iter().map(|waiting| waiting.device).collect(), slots);
        true
    }

    /// Ends the tunnels that an operator calls by this name: orphans at once, others by their daemons.
    pub(super) fn end_called(&mut self, connection: u64, name: &str) {
        let (mut orphans, mut devices) = (Vec::new(), Vec::new());
        for (number, tenant) in self.shared.tunnels.iter().filter(|(_, tenant)| tenant.is_called(name)) {
            devices.push(tenant.device.name.clone());
            match tenant.orphaned {
                Some(_) => orphans.push(number),
                None => _ = self.shared.daemons.tell(number, Event::Stop),
            }
        }
        self.detach_all(&orphans);
        self.shared.daemons.send(connection, Event::Ending { devices });
    }
}
