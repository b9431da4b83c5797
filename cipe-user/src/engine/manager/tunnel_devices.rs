//! Changes of tunnel devices by an operator: a new name, address or MTU, and a move to another network namespace. After a move the
//! carrier stays in this namespace, and the tunnel goes on: a macvlan keeps its hub in any namespace.

use std::time::{Duration, Instant};

use cipe_common::maps::EthernetDevice;

use super::hubs::Hubs;
use super::platform::log_failure;
use super::poll::PollTimer;
use super::shared::Shared;
use super::sizes::TOO_SMALL;
use crate::control::protocol::{Event, Protocol};
use crate::engine::carrier::outer::Hop;
use crate::engine::worker::Command;

/// Interval between two polls of the devices in other network namespaces: the kernel does not notify this one of their end.
const POLL_INTERVAL: Duration = Duration::from_secs(5);

/// Index of a device that is in another network namespace, where another device may have the index that it had here. No device
/// has this one.
pub(super) const ELSEWHERE: u32 = 0;

/// Watches the tunnel devices that are in other network namespaces. Changes of the others come as events, to the functions below.
pub(super) struct TunnelDevices {
    poll: PollTimer,
}

impl TunnelDevices {
    /// Polls from now on.
    pub(super) fn new() -> Self {
        Self { poll: PollTimer::new(POLL_INTERVAL) }
    }

    /// Polls the devices in other network namespaces, and tells the daemons of those that have gone. Returns the orphans that end.
    pub(super) async fn poll(&mut self, now: Instant, shared: &mut Shared, hubs: &mut Hubs) -> Vec<u16> {
        let mut orphans = Vec::new();
        if !self.poll.is_due(now) {
            return orphans;
        }
        let moved = shared.tunnels.iter().filter(|(_, tenant)| tenant.device.index == ELSEWHERE);
        let moved: Vec<_> = moved.map(|(number, tenant)| (number, tenant.device.clone())).collect();
        for (number, device) in moved {
            let index = shared.platform.netlink.index_elsewhere(&device).await;
            match (index, shared.tunnels.get(number).map(|tenant| (tenant.protocol, tenant.hub))) {
                (Ok(None), _) => orphans.extend(ended(number, true, shared, hubs).await),
                // It may have been moved once more.
                (Ok(Some(index)), Some((Protocol::Ethernet, hub))) => move_end(hub, index, shared, hubs),
                (Ok(Some(_)), _) => {}
                // Where it is shows in the next poll.
                (Err(error), _) => tracing::warn!("{error}"),
            }
        }
        orphans
    }
}

/// Notes a tunnel device's new name, and tells the daemon.
pub(super) fn renamed(ifindex: u32, name: &str, shared: &mut Shared) {
    let Some(number) = shared.tunnels.of_device(ifindex) else { return };
    if let Some(tenant) = shared.tunnels.get_mut(number) {
        tenant.device.name = name.to_owned();
        shared.daemons.tell(number, Event::Renamed { device: name.to_owned() });
    }
}

/// Gives the programs and the workers the new MAC address of a tunnel's device.
pub(super) fn set_address(number: u16, mac: [u8; 6], shared: &mut Shared, hubs: &Hubs) {
    let Some(tenant) = shared.tunnels.get_mut(number).filter(|tenant| tenant.device.mac != mac) else { return };
    let Some(hub) = hubs.get(tenant.hub) else { return };
    let old = std::mem::replace(&mut tenant.device.mac, mac);
    if hubs.is_ethernet(tenant.hub) {
        return;
    }
    let mut programs = shared.platform.programs();
    log_failure(programs.remove_private_address(old));
    log_failure(programs.set_private_address(mac, number.into()));
    log_failure(programs.set_tunnel(number.into(), tenant.entry()));
    let hop = Hop { source: hub.hidden_mac, destination: mac };
    shared.platform.workers.tell_all(|_| Command::SetPrivateHop(number, hop));
}

/// Applies the MTU that an operator has given to a tunnel's device, in octets.
pub(super) fn set_mtu(number: u16, mtu: usize, shared: &mut Shared) {
    let Shared { tunnels, daemons, platform, .. } = shared;
    let change = tunnels.get_mut(number).and_then(|tenant| tenant.set_device_mtu(number, mtu, platform));
    let Some(change) = change else { return };
    change.notices.into_iter().for_each(|notice| daemons.notice(number, notice));
    change.news.into_iter().for_each(|news| daemons.news(number, news));
    if change.is_too_small {
        daemons.notice(number, TOO_SMALL.to_owned());
    }
}

/// A tunnel's device is down, or no longer in this network namespace. A tunnel whose device was moved goes on; the daemon of
/// any other is told that its device is down. Returns the tunnel if it is an orphan that ends.
pub(super) async fn left(number: u16, deleted: bool, shared: &mut Shared, hubs: &mut Hubs) -> Option<u16> {
    let device = shared.tunnels.get(number)?.device.clone();
    let netlink = &shared.platform.netlink;
    // The kernel takes a device down before it moves it; the event of its deletion here comes next.
    if !deleted
        && device.index != ELSEWHERE
        && netlink.card(device.index).await.is_err_and(|error| error.is_no_device())
    {
        return None;
    }
    let index = match deleted {
        true => netlink.index_elsewhere(&device).await.unwrap_or_else(|error| {
            tracing::warn!("{error}");
            None
        }),
        false => None,
    };
    let Some(index) = index else {
        return ended(number, deleted, shared, hubs).await;
    };
    shared.tunnels.forget_device(device.index);
    let tenant = shared.tunnels.get_mut(number)?;
    tenant.device.index = ELSEWHERE;
    let (hub, is_ethernet) = (tenant.hub, tenant.protocol == Protocol::Ethernet);
    tenant.notes.push("in another network namespace".to_owned());
    if is_ethernet {
        move_end(hub, index, shared, hubs);
    }
    shared.daemons.news(
        number,
        "moved to another network namespace, where it goes on; take it up there and set its addresses and routes"
            .to_owned(),
    );
    None
}

/// An end of a hub is down, or no longer in this network namespace. Nobody ends a tunnel by its hub: a hub that is down is set
/// up again, and the tunnels of one that has gone start over. Returns the orphans that end.
pub(super) async fn hub_left(
    (slot, ifindex): (usize, u32),
    deleted: bool,
    shared: &mut Shared,
    hubs: &mut Hubs,
) -> Vec<u16> {
    if !deleted && let Ok(card) = shared.platform.netlink.card(ifindex).await {
        match shared.platform.netlink.set_up_again(ifindex).await {
            Ok(()) => {
                tracing::warn!("{}: somebody has set it down; it is set up again", card.name);
                return Vec::new();
            }
            Err(error) => tracing::warn!("{}: {error}", card.name),
        }
    }
    let numbers = shared.tunnels.numbers(|tenant| tenant.hub == slot);
    hubs.lose(slot, deleted, !numbers.is_empty());
    // The kernel takes a device down before it deletes or moves it; the event of that comes next.
    if !deleted && shared.platform.netlink.card(ifindex).await.is_err_and(|error| error.is_no_device()) {
        return Vec::new();
    }
    let mut orphans = Vec::new();
    for number in numbers {
        // An Ethernet tunnel's pair is its device: its end is that of the device, wherever that was.
        orphans.extend(match hubs.is_ethernet(slot) {
            true => ended(number, deleted, shared, hubs).await,
            false => lost(number, shared),
        });
    }
    orphans
}

/// An operator has taken a tunnel's device down or deleted it, or its hub, with which the device goes. Tells the daemon; returns the
/// tunnel if it is an orphan that ends.
async fn ended(number: u16, deleted: bool, shared: &mut Shared, hubs: &Hubs) -> Option<u16> {
    let tenant = shared.tunnels.get_mut(number)?;
    let hub = hubs.get(tenant.hub).filter(|_| tenant.protocol == Protocol::Ip).map(|hub| hub.index);
    if let Some(hub) = hub.filter(|_| deleted)
        && shared.platform.netlink.card(hub).await.is_err_and(|error| error.is_no_device())
    {
        return lost(number, shared);
    }
    tenant.is_gone = deleted;
    let is_orphan = tenant.orphaned.is_some();
    shared.daemons.tell(number, Event::DeviceDown);
    (is_orphan && deleted).then_some(number)
}

/// A tunnel's device has gone with its hub, or is of no use without it. Tells the daemon; returns the tunnel if it is an orphan, which
/// ends.
fn lost(number: u16, shared: &mut Shared) -> Option<u16> {
    let tenant = shared.tunnels.get_mut(number)?;
    tenant.is_gone = true;
    let (is_orphan, stays) = (tenant.orphaned.is_some(), tenant.stays);
    shared.daemons.tell(number, if stays { Event::DeviceLost } else { Event::DeviceDown });
    is_orphan.then_some(number)
}

/// Gives the visible end of an Ethernet tunnel's pair its index in the new namespace, by which the program there finds the tunnel.
fn move_end(slot: usize, index: u32, shared: &Shared, hubs: &mut Hubs) {
    let before = hubs.ends(slot);
    hubs.set_moved(slot, index);
    let Some((before, ends)) = before.zip(hubs.ends(slot)).filter(|(before, ends)| before != ends) else { return };
    // The entry of the hidden end stays all the time.
    for left in before.into_iter().filter(|left| !ends.contains(left)) {
        log_failure(shared.platform.programs().remove_ethernet_device([left; 2]));
    }
    set_ethernet_devices(shared, hubs);
}

/// Writes the map entries of all Ethernet tunnels' pairs anew: an index that one pair has given up may be another's, too.
pub(super) fn set_ethernet_devices(shared: &Shared, hubs: &Hubs) {
    for (number, tenant) in shared.tunnels.iter().filter(|(_, tenant)| tenant.protocol == Protocol::Ethernet) {
        if let Some(ends) = hubs.ends(tenant.hub) {
            let device = EthernetDevice { tunnel: number.into(), hub: tenant.hub as u32 };
            log_failure(shared.platform.programs().set_ethernet_device(ends, device));
        }
    }
}
