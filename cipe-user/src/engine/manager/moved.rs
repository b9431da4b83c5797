//! Tunnel devices that an operator has renamed, or moved to another network namespace, as is done with other tunnels' devices:
//! the carrier stays here, and what stands on the tunnel there sees nothing of it. A macvlan goes on with its hub wherever it is.

use std::time::{Duration, Instant};

use cipe_common::maps::EthernetDevice;

use super::Manager;
use super::platform::log_failure;
use crate::control::protocol::{Event, Protocol};
use crate::engine::carrier::outer::Hop;
use crate::engine::worker::Command;

/// How often devices in other network namespaces are looked for: their end is told to nobody here.
const LOOK: Duration = Duration::from_secs(5);

/// Index of a device that is in another network namespace, where others may have the one that it had here. No device has it.
pub(super) const ELSEWHERE: u32 = 0;

/// When devices in other network namespaces are looked for next.
#[derive(Default)]
pub(super) struct Moved {
    looked: Option<Instant>,
}

impl Moved {
    /// Whether it is time for another look.
    fn is_due(&mut self, now: Instant) -> bool {
        let is_due = self.looked.is_none_or(|looked| now.duration_since(looked) >= LOOK);
        if is_due {
            self.looked = Some(now);
        }
        is_due
    }
}

impl Manager {
    /// Takes note of a tunnel device's new name.
    pub(super) fn renamed(&mut self, ifindex: u32, name: &str) {
        let Some(number) = self.tunnels.of_device(ifindex) else { return };
        if let Some(tenant) = self.tunnels.get_mut(number) {
            tenant.device.name = name.to_owned();
            self.daemons.tell(number, Event::Renamed { device: name.to_owned() });
        }
    }

    /// Takes up that a tunnel's device has another address.
    pub(super) fn set_private_address(&mut self, number: u16, mac: [u8; 6]) {
        let Some(tenant) = self.tunnels.get_mut(number).filter(|tenant| tenant.device.mac != mac) else { return };
        let Some(hub) = self.hubs.get(tenant.hub) else { return };
        let old = std::mem::replace(&mut tenant.device.mac, mac);
        if self.hubs.is_ethernet(tenant.hub) {
            return;
        }
        let mut programs = self.platform.programs();
        log_failure(programs.remove_private_address(old));
        log_failure(programs.set_private_address(mac, number.into()));
        log_failure(programs.set_tunnel(number.into(), tenant.entry()));
        let hop = Hop { source: hub.hidden_mac, destination: mac };
        self.platform.workers.tell_all(|_| Command::SetPrivateHop(number, hop));
    }

    /// A tunnel's device is down, or is no longer in this network namespace. One that was moved goes on where it is.
    pub(super) async fn device_left(&mut self, number: u16, deleted: bool) {
        let Some(device) = self.tunnels.get(number).map(|tenant| tenant.device.clone()) else { return };
        // The kernel takes a device down before it moves it; that it has gone is told next.
        let is_going = !deleted && device.index != ELSEWHERE && self.platform.netlink.card(device.index).await.is_err();
        if is_going {
            return;
        }
        let index = if deleted { self.platform.netlink.index_elsewhere(&device).await } else { None };
        let Some(index) = index else {
            self.daemons.tell(number, Event::DeviceDown);
            return;
        };
        self.tunnels.forget_device(device.index);
        let Some(tenant) = self.tunnels.get_mut(number) else { return };
        tenant.device.index = ELSEWHERE;
        let (hub, is_ethernet) = (tenant.hub, tenant.protocol == Protocol::Ethernet);
        tenant.notes.push("in another network namespace".to_owned());
        if is_ethernet {
            self.move_end(hub, index);
        }
        self.daemons.news(
            number,
            "moved to another network namespace, where it goes on; take it up there and set its addresses and routes"
                .to_owned(),
        );
    }

    /// Looks for the devices in other network namespaces, and ends the tunnels of those that have gone.
    pub(super) async fn tend_moved(&mut self, now: Instant) {
        if !self.moved.is_due(now) {
            return;
        }
        let moved = self.tunnels.iter().filter(|(_, tenant)| tenant.device.index == ELSEWHERE);
        let moved: Vec<_> = moved.map(|(number, tenant)| (number, tenant.device.clone())).collect();
        for (number, device) in moved {
            let index = self.platform.netlink.index_elsewhere(&device).await;
            match (index, self.tunnels.get(number).map(|tenant| (tenant.protocol, tenant.hub))) {
                (None, _) => self.daemons.tell(number, Event::DeviceDown),
                // It may have been moved once more.
                (Some(index), Some((Protocol::Ethernet, hub))) => self.move_end(hub, index),
                (Some(_), _) => {}
            }
        }
    }

    /// The visible end of an Ethernet tunnel's pair has this index in its new namespace, by which the program there knows whose it
    /// is.
    fn move_end(&mut self, slot: usize, index: u32) {
        let before = self.hubs.ends(slot);
        self.hubs.set_moved(slot, index);
        let Some((before, ends)) = before.zip(self.hubs.ends(slot)).filter(|(before, ends)| before != ends) else {
            return;
        };
        // The hidden end stays known meanwhile.
        for left in before.into_iter().filter(|left| !ends.contains(left)) {
            log_failure(self.platform.programs().remove_ethernet_device([left; 2]));
        }
        self.set_ethernet_devices();
    }

    /// Tells the programs of all pairs of Ethernet tunnels again: an index that one has given up may be another's, too.
    pub(super) fn set_ethernet_devices(&mut self) {
        for (number, tenant) in self.tunnels.iter().filter(|(_, tenant)| tenant.protocol == Protocol::Ethernet) {
            if let Some(ends) = self.hubs.ends(tenant.hub) {
                let device = EthernetDevice { tunnel: number.into(), hub: tenant.hub as u32 };
                log_failure(self.platform.programs().set_ethernet_device(ends, device));
            }
        }
    }
}
