//! How large packets through a tunnel may be: what its device takes, lowered by its carrier path.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use cipe_common::maps::{CarrierAddress, PrivateAddress, Tunnel as TunnelEntry};

use super::Manager;
use super::platform::log_failure;
use crate::control::protocol::{Attach, Protocol};
use crate::engine::carrier::socks;
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::engine::worker::Command;
use crate::inner::headers::IpVersion;
use crate::kernel::bpf::carrier_address;
use crate::repeats::{Repeats, counted};

/// Octets of IPv4 and TCP headers without options; the program that clamps takes 20 more off for IPv6.
const TCP_HEADERS: usize = 40;

/// What is said where the carrier path leaves nothing for packets.
pub(super) const TOO_SMALL: &str = "MTU too small";

/// The sizes of one tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    device: usize,
    /// The carrier's path MTU does not count (`forcemtu`).
    forced: bool,
    clamps: bool,
    nokey: bool,
    protocol: Protocol,
    /// What is in force.
    mtu: TunnelMtu,
    /// The operator knows that the device takes more than the carrier.
    told: bool,
    since: Instant,
    /// Changes of the carrier path's MTU, which whoever can send ICMP brings about.
    changes: Repeats,
}

impl Sizes {
    /// Those of a tunnel whose carrier path is not known yet.
    pub(super) fn new(attach: &Attach) -> Self {
        let device = attach.mtu as usize;
        Self {
            device,
            forced: attach.force_mtu,
            clamps: attach.mss_clamp,
            nokey: attach.key.is_none(),
            protocol: attach.protocol,
            mtu: TunnelMtu::of_device(device),
            told: false,
            since: Instant::now(),
            changes: Repeats::default(),
        }
    }

    /// What is in force.
    pub(super) fn mtu(&self) -> TunnelMtu {
        self.mtu
    }

    /// What the programs must know of the tunnel, whose device has the address `mac` and stands on the hub in this slot, and
    /// whose datagrams go to `target`.
    pub(super) fn entry(&self, hub: usize, mac: [u8; 6], target: Option<SocketAddr>) -> TunnelEntry {
        let nokey = if self.nokey { TunnelEntry::NOKEY } else { 0 };
        // 0 would say that there is no limit; where nothing passes, any other will do.
        let mss = if self.clamps { self.mtu.of(IpVersion::V4).saturating_sub(TCP_HEADERS).max(1) } else { 0 };
        TunnelEntry {
            flags: TunnelEntry::ALIVE | nokey,
            mss: mss as u32,
            hub: hub as u32,
            // IPv6 may take more where the carrier cuts; that is the kernel's way to say.
            mtu: self.mtu.of(IpVersion::V4) as u32,
            // The device of an Ethernet tunnel takes frames from anybody; its pair says whose they are.
            device: match self.protocol {
                Protocol::Ip => PrivateAddress::new(mac),
                Protocol::Ethernet => PrivateAddress::default(),
            },
            target: target.map_or(CarrierAddress::default(), carrier_address),
        }
    }
}

impl Manager {
    /// Takes up the MTU that an operator has given to a tunnel's device, in octets. What the engine's frames have no room for stays
    /// too big.
    pub(super) fn set_device_mtu(&mut self, number: u16, device: usize) {
        let Some(tenant) = self.tunnels.get_mut(number).filter(|tenant| tenant.sizes.device != device) else { return };
        let largest = self.platform.largest_mtu(tenant.protocol);
        tenant.sizes.device = device;
        tenant.sizes.told = false;
        tenant.sizes.mtu = TunnelMtu::of_device(device.min(largest));
        let path = tenant.looked_up.map(|hop| hop.mtu as usize).zip(tenant.target());
        let too_small = path.is_some_and(|(path, target)| self.set_path_mtu(number, path, target.ip()));
        let Some(tenant) = self.tunnels.get(number) else { return };
        let mtu = tenant.sizes.mtu;
        log_failure(self.platform.programs().set_tunnel(number.into(), tenant.entry()));
        self.platform.workers.tell_all(|_| Command::SetDeviceMtu(number, device, mtu));
        match device > largest {
            true => self.daemons.notice(
                number,
                format!(
                    "the interface's MTU is {device} now, and this engine was started for up to {largest}; larger packets are refused \
                     or cut"
                ),
            ),
            false => self.daemons.news(number, format!("the interface's MTU is {device} now")),
        }
        if too_small {
            self.daemons.notice(number, TOO_SMALL.to_owned());
        }
    }

    /// Takes up the MTU of a tunnel's carrier path to `peer`, in octets; the worker must be told, too. Returns whether it has
    /// just become too small for anything.
    pub(super) fn set_path_mtu(&mut self, number: u16, path: usize, peer: IpAddr) -> bool {
        let Some(tenant) = self.tunnels.get_mut(number) else { return false };
        let largest = self.platform.largest_mtu(tenant.protocol);
        let sizes = &mut tenant.sizes;
        if sizes.forced {
            return false;
        }
        let header = if tenant.socks.is_some() { socks::HEADER } else { 0 } + sizes.protocol.header();
        let mtu = TunnelMtu::of_path(sizes.device.min(largest), path.saturating_sub(header), peer);
        if std::mem::replace(&mut sizes.mtu, mtu) == mtu {
            return false;
        }
        let (device, octets) = (sizes.device, mtu.of(IpVersion::V4));
        // Once: paths change, options do not.
        let is_above = octets < device && mtu != TunnelMtu::NONE && !std::mem::replace(&mut sizes.told, true);
        let entry = tenant.entry();
        if let Some(total) = tenant.sizes.changes.once_more(tenant.sizes.since.elapsed()) {
            let line = format!("{}: takes {octets} octets, the carrier path {path}", tenant.device.name);
            tracing::info!("{}", counted(&line, total));
        }
        if let Err(error) = self.platform.programs().set_tunnel(number.into(), entry) {
            self.daemons.notice(number, format!("the MSS stays as it was: {error}"));
        }
        if is_above {
            let text = format!(
                "mtu {device} is above what the carrier's MTU of {path} leaves, {octets}; larger packets are refused or cut; set \
                 `mtu {octets}`"
            );
            self.daemons.notice(number, text);
        }
        mtu == TunnelMtu::NONE
    }
}
