//! How large packets through a tunnel may be: what its device takes, lowered by its carrier path.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use cipe_common::maps::{CarrierAddress, PrivateAddress, Tunnel as TunnelEntry};

use super::platform::{Platform, log_failure};
use super::tunnels::Tenant;
use crate::control::protocol::{Attach, Protocol};
use crate::engine::carrier::socks;
use crate::engine::tunnel::mtu::{KEYED_OVERHEAD, SEALED_OVERHEAD, TunnelMtu};
use crate::engine::worker::Command;
use crate::inner::headers::IpVersion;
use crate::kernel::bpf::carrier_address;
use crate::repeats::{Repeats, counted};

/// Octets of IPv4 and TCP headers without options; the program that clamps takes 20 more off for IPv6.
const TCP_HEADERS: usize = 40;

/// The notice for a carrier path that leaves no room for packets.
pub(super) const TOO_SMALL: &str = "MTU too small";

/// What the daemon of a tunnel is to be told of a changed MTU.
#[derive(Debug, Default)]
pub(super) struct MtuNotices {
    /// For the operator to look at.
    pub notices: Vec<String>,
    /// As it should be.
    pub news: Option<String>,
    /// The carrier path has just become too small for any packet: [`TOO_SMALL`] is to be told.
    pub is_too_small: bool,
}

/// The sizes of one tunnel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    /// The device's MTU, in octets.
    device: usize,
    /// The carrier's path MTU is ignored (`forcemtu`).
    forced: bool,
    /// The MSS of TCP connections is clamped (`mssclamp`).
    clamps: bool,
    nokey: bool,
    /// Packets leave sealed, or are to.
    sealed: bool,
    protocol: Protocol,
    /// The MTU in force.
    mtu: TunnelMtu,
    /// The operator was told that the device's MTU is above the carrier's.
    told: bool,
    /// When the tunnel was made.
    since: Instant,
    /// Changes of the carrier path's MTU, logged at a limited rate: anybody who can send ICMP can cause them.
    changes: Repeats,
}

impl Sizes {
    /// The sizes of a tunnel whose carrier path is not known yet.
    pub(super) fn new(attach: &Attach) -> Self {
        let device = attach.mtu as usize;
        Self {
            device,
            forced: attach.force_mtu,
            clamps: attach.mss_clamp,
            nokey: attach.key.is_none(),
            sealed: attach.sealed.as_ref().is_some_and(|sealed| !sealed.unsealed.sends || sealed.sends()),
            protocol: attach.protocol,
            mtu: TunnelMtu::of_device(device),
            told: false,
            since: Instant::now(),
            changes: Repeats::default(),
        }
    }

    /// The MTU in force.
    pub(super) fn mtu(&self) -> TunnelMtu {
        self.mtu
    }

    /// The programs' map entry of the tunnel, whose device has the address `mac` on the hub in slot `hub`, and whose datagrams go
    /// to `target`.
    pub(super) fn entry(&self, hub: usize, mac: [u8; 6], target: Option<SocketAddr>) -> TunnelEntry {
        let nokey = if self.nokey { TunnelEntry::NOKEY } else { 0 };
        // 0 means that there is no limit; where no packet passes, any other value will do.
        let mss = if self.clamps { self.mtu.of(IpVersion::V4).saturating_sub(TCP_HEADERS).max(1) } else { 0 };
        TunnelEntry {
            flags: TunnelEntry::ALIVE | nokey,
            mss: mss as u32,
            hub: hub as u32,
            // For IPv6 it may be more where the carrier fragments; the kernel decides that.
            mtu: self.mtu.of(IpVersion::V4) as u32,
            // The device of an Ethernet tunnel takes frames from any address; the pair that they come by identifies the tunnel.
            device: match self.protocol {
                Protocol::Ip => PrivateAddress::new(mac),
                Protocol::Ethernet => PrivateAddress::default(),
            },
            target: target.map_or(CarrierAddress::default(), carrier_address),
            shield: 0,
        }
    }
}

impl Tenant {
    /// Gives the tunnel the MTU that an operator has set on its device, in octets; returns the message for the daemon's log, or
    /// `None` if the device had that MTU. Packets that the engine's frames have no room for stay too big.
    pub(super) fn set_device_mtu(&mut self, number: u16, device: usize, platform: &Platform) -> Option<MtuNotices> {
        if self.sizes.device == device {
            return None;
        }
        let largest = platform.largest_mtu(self.protocol);
        self.sizes.device = device;
        self.sizes.told = false;
        self.sizes.mtu = TunnelMtu::of_device(device.min(largest));
        let path = self.looked_up.map(|hop| hop.mtu as usize).zip(self.target());
        let by_path = path.map(|(path, target)| self.set_path_mtu(number, path, target.ip(), platform));
        let mtu = self.sizes.mtu;
        log_failure(platform.programs().set_tunnel(number.into(), self.entry()));
        platform.workers.tell_all(|_| Command::SetDeviceMtu(number, device, mtu));
        let too_large = (device > largest).then(|| {
            format!(
                "the interface's MTU is {device} now, and this engine was started for up to {largest}; larger packets are refused \
                 or cut"
            )
        });
        let MtuNotices { mut notices, is_too_small, .. } = by_path.unwrap_or_default();
        let news = too_large.is_none().then(|| format!("the interface's MTU is {device} now"));
        notices.extend(too_large);
        Some(MtuNotices { notices, news, is_too_small })
    }

    /// Takes note of whether packets leave sealed, which leaves less room in a datagram, and tells the workers. Returns what the daemon
    /// is to be told.
    pub(super) fn set_sealed(&mut self, number: u16, sealed: bool, platform: &Platform) -> MtuNotices {
        if std::mem::replace(&mut self.sizes.sealed, sealed) == sealed {
            return MtuNotices::default();
        }
        let path = self.looked_up.map(|hop| hop.mtu as usize).zip(self.target());
        let notices = path.map(|(path, target)| self.set_path_mtu(number, path, target.ip(), platform));
        let (device, mtu) = (self.sizes.device, self.sizes.mtu);
        platform.workers.tell_all(|_| Command::SetDeviceMtu(number, device, mtu));
        notices.unwrap_or_default()
    }

    /// Gives the tunnel the MTU of its carrier path to `peer`, in octets; the caller tells the workers.
    pub(super) fn set_path_mtu(&mut self, number: u16, path: usize, peer: IpAddr, platform: &Platform) -> MtuNotices {
        let mut notices = MtuNotices::default();
        let largest = platform.largest_mtu(self.protocol);
        let sizes = &mut self.sizes;
        if sizes.forced {
            return notices;
        }
        let header = if self.socks.is_some() { socks::HEADER } else { 0 } + sizes.protocol.header();
        let overhead = if sizes.sealed { SEALED_OVERHEAD } else { KEYED_OVERHEAD };
        let mtu = TunnelMtu::of_path(sizes.device.min(largest), path.saturating_sub(header), peer, overhead);
        if std::mem::replace(&mut sizes.mtu, mtu) == mtu {
            return notices;
        }
        let (device, octets) = (sizes.device, mtu.of(IpVersion::V4));
        // Once per device MTU: paths change often, the option does not.
        let is_above = octets < device && mtu != TunnelMtu::NONE && !std::mem::replace(&mut sizes.told, true);
        if let Some(total) = sizes.changes.once_more(sizes.since.elapsed()) {
            let line = format!("{}: takes {octets} octets, the carrier path {path}", self.device.name);
            tracing::info!("{}", counted(&line, total));
        }
        if let Err(error) = platform.programs().set_tunnel(number.into(), self.entry()) {
            notices.notices.push(format!("the MSS stays as it was: {error}"));
        }
        if is_above {
            notices.notices.push(format!(
                "mtu {device} is above what the carrier's MTU of {path} leaves, {octets}; larger packets are refused or cut; set \
                 `mtu {octets}`"
            ));
        }
        notices.is_too_small = mtu == TunnelMtu::NONE;
        notices
    }
}
