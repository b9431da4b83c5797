//! Tunnel devices that an operator has renamed, or moved to another network namespace, as is done with other tunnels' devices:
//! the carrier stays here, and what stands on the tunnel there sees nothing of it. A macvlan goes on with its hub wherever it is.

use std::time::{Duration, Instant};

use cipe_common::maps::EthernetDevice;

use super::Manager;
use super::attach::log_failure;
use crate::control::protocol::{Event, Protocol};

/// How often devices in other network namespaces are looked for: their end is told to nobody here.
const LOOK: Duration = Duration::from_secs(5);

/// Index of a device that is in another network namespace, where others may have the one that it had here. No device has it.
pub(super) const ELSEWHERE: u32 = 0;

impl Manager {
    /// Takes note of a tunnel device's new name.
    pub(super) fn renamed(&mut self, ifindex: u32, name: &str) {
        let Some(number) = self.devices.get(&ifindex).copied() else { return };
        if let Some(tenant) = self.tenants.get_mut(&number) {
            tenant.device.name = name.to_owned();
            self.tell(number, Event::Renamed { device: name.to_owned() });
        }
    }

    /// A tunnel's device is down, or is no longer in this network namespace. One that was moved goes on where it is.
    pub(super) async fn device_left(&mut self, number: u16, deleted: bool) {
        let Some(device) = self.tenants.get(&number).map(|tenant| tenant.device.clone()) else { return };
        // The kernel takes a device down before it moves it; that it has gone is told next.
        let is_going = !deleted && device.index != ELSEWHERE && self.netlink.card(device.index).await.is_err();
        if is_going {
            return;
        }
        let index = if deleted { self.netlink.index_elsewhere(&device).await } else { None };
        let Some(index) = index else {
            self.tell(number, Event::DeviceDown);
            return;
        };
        self.devices.remove(&device.index);
        let Some(tenant) = self.tenants.get_mut(&number) else { return };
        tenant.device.index = ELSEWHERE;
        let (hub, is_ethernet) = (tenant.hub, tenant.protocol == Protocol::Ethernet);
        tenant.notes.push("in another network namespace".to_owned());
        if is_ethernet {
            self.move_end(hub, index);
        }
        self.news(
            number,
            "moved to another network namespace, where it goes on; take it up there and set its addresses and routes"
                .to_owned(),
        );
    }

    /// Looks for the devices in other network namespaces, and ends the tunnels of those that have gone.
    pub(super) async fn tend_moved(&mut self, now: Instant) {
        if self.next_look > now {
            return;
        }
        self.next_look = now + LOOK;
        let moved = self.tenants.iter().filter(|(_, tenant)| tenant.device.index == ELSEWHERE);
        let moved: Vec<_> = moved.map(|(number, tenant)| (*number, tenant.device.clone())).collect();
        for (number, device) in moved {
            let index = self.netlink.index_elsewhere(&device).await;
            match (index, self.tenants.get(&number).map(|tenant| (tenant.protocol, tenant.hub))) {
                (None, _) => self.tell(number, Event::DeviceDown),
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
            log_failure(self.programs.remove_ethernet_device([left; 2]));
        }
        self.set_ethernet_devices();
    }

    /// Tells the programs of all pairs of Ethernet tunnels again: an index that one has given up may be another's, too.
    pub(super) fn set_ethernet_devices(&mut self) {
        for (number, tenant) in self.tenants.iter().filter(|(_, tenant)| tenant.protocol == Protocol::Ethernet) {
            if let Some(ends) = self.hubs.ends(tenant.hub) {
                let device = EthernetDevice { tunnel: (*number).into(), hub: tenant.hub as u32 };
                log_failure(self.programs.set_ethernet_device(ends, device));
            }
        }
    }
}
