//! The shields of tunnels: while datagrams come fast that no key opens, the programs drop them before they reach a socket. A shield
//! costs each genuine datagram the decryption of two blocks in the kernel, so it goes when the flood is over.

use std::collections::BTreeSet;
use std::time::Instant;

use cipe_common::Verdict;

use super::connections::Daemons;
use super::flood::{Change, Flood};
use super::keys::Keyring;
use super::platform::{Platform, log_failure};
use super::shared::Shared;
use super::tunnels::Tenant;
use crate::control::protocol::Protocol;
use crate::repeats::counted;

/// The tunnels with a flood, now or lately. Whether a shield is really there, the key ring knows.
#[derive(Default)]
pub(super) struct Shields {
    flooded: BTreeSet<u16>,
}

impl Shields {
    /// Handles a worker's report that it gets many datagrams which no key of a tunnel opens.
    pub(super) fn flooded(&mut self, number: u16, now: Instant, shared: &mut Shared, keys: &mut Keyring) {
        // An orphan drops everything.
        let Some(tenant) = shared.tunnels.get_mut(number).filter(|tenant| tenant.orphaned.is_none()) else { return };
        let flood = tenant.flood.get_or_insert_with(|| Flood::new(now));
        if let Some(floods) = flood.reported(now) {
            let message = "many datagrams come that no key opens; they are dropped by their first and last blocks";
            tell(&shared.daemons, number, message, floods);
        }
        self.flooded.insert(number);
        // The programs do not know the datagrams that a SOCKS5 server relays.
        if tenant.socks.is_some() || !flood.needs_shield(now) {
            return;
        }
        let Some(shield) = keys.shield(number, tenant.cipher.into(), tenant.protocol == Protocol::Ip) else {
            return tracing::debug!("{}: flooded, and all shields are in use", tenant.device.name);
        };
        flood.shielded(dropped(number, &shared.platform), now);
        tenant.shield = shield;
        log_failure(shared.platform.programs().set_tunnel(number.into(), tenant.entry()));
        attach(tenant, &shared.platform);
    }

    /// Takes the shields that are not worth their cost any more, and follows tunnels that have changed their doors or devices.
    pub(super) fn poll(&mut self, now: Instant, shared: &mut Shared, keys: &mut Keyring) {
        if self.flooded.is_empty() {
            return;
        }
        let Shared { tunnels, platform, daemons, .. } = shared;
        self.flooded.retain(|number| {
            // The tunnel has gone, or another one has its number now.
            let Some(tenant) = tunnels.get_mut(*number).filter(|tenant| tenant.orphaned.is_none()) else {
                return false;
            };
            let Some(flood) = &mut tenant.flood else { return false };
            let change = flood.poll(dropped(*number, platform), now);
            let (has_shield, floods) = (flood.has_shield(), flood.number());
            if has_shield {
                attach(tenant, platform);
            } else if keys.is_shielded(*number) {
                tenant.shield = 0;
                log_failure(platform.programs().set_tunnel((*number).into(), tenant.entry()));
                keys.unshield(*number);
            }
            match change {
                Change::None | Change::Unshield => {}
                Change::Over => tell(daemons, *number, "few datagrams come that no key opens", floods),
                Change::Forgotten => tenant.flood = None,
            }
            tenant.flood.is_some()
        });
        let shielded = self.flooded.iter().filter_map(|number| tunnels.get(*number)).filter(|tenant| tenant.shield > 0);
        let devices: Vec<u32> = shielded.filter_map(socket_device).collect();
        platform.programs().detach_shields_except(|ifindex| devices.contains(&ifindex));
    }
}

/// Tells a tunnel's daemon of the beginning or the end of the 1st, 2nd, 4th, 8th and so on of its floods.
fn tell(daemons: &Daemons, number: u16, what: &str, floods: u64) {
    if floods.is_power_of_two() {
        daemons.news(number, counted(what, floods));
    }
}

/// The number of a tunnel's datagrams that the programs have dropped because no key opens them, or because they are in clear.
fn dropped(number: u16, platform: &Platform) -> u64 {
    let of = [Verdict::BadCrc, Verdict::ClearControl];
    platform.verdicts(number).map_or(0, |verdicts| of.iter().map(|verdict| verdicts[*verdict as usize]).sum())
}

/// The device by which the datagrams of a tunnel with a UDP socket come.
fn socket_device(tenant: &Tenant) -> Option<u32> {
    // A device without link-layer addresses has no Ethernet headers, which the program expects.
    let hop = tenant.hop.filter(|hop| tenant.carrier.is_none() && hop.source_mac.is_some())?;
    Some(hop.ifindex)
}

/// Attaches the program for UDP sockets where a tunnel needs it. Without it, the worker drops the datagrams.
fn attach(tenant: &Tenant, platform: &Platform) {
    if let Some(ifindex) = socket_device(tenant)
        && let Err(error) = platform.programs().attach_shield(ifindex)
    {
        tracing::debug!("{error}");
    }
}
