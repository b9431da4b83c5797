//! The shields of tunnels: while datagrams come fast that no key opens, the programs drop them before they reach a socket. A shield
//! costs each genuine datagram the decryption of two blocks in the kernel, so it goes when the flood is over.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use cipe_common::Verdict;

use super::keys::Keyring;
use super::platform::{Platform, log_failure};
use super::shared::Shared;
use super::tunnels::Tenant;
use crate::control::protocol::Protocol;

/// How long few datagrams have to be dropped until a tunnel's shield goes.
const MIN_CALM_TIME: Duration = Duration::from_secs(10);

/// Datagrams dropped per second up to which a shield is not worth its cost.
const MAX_CALM_RATE: u64 = 500;

/// The shields that are set, by tunnel. Whether one is really there, the key ring knows.
#[derive(Default)]
pub(super) struct Shields {
    set: BTreeMap<u16, Drops>,
}

/// The datagrams that a shield drops.
#[derive(Clone, Copy, Debug)]
struct Drops {
    /// Since when they are few.
    calm_since: Instant,
    /// When they were counted last, and how many there had been.
    counted: Instant,
    total: u64,
}

impl Drops {
    fn new(now: Instant, total: u64) -> Self {
        Self { calm_since: now, counted: now, total }
    }

    /// Takes the number of dropped datagrams so far; returns whether they have been few for long enough.
    fn are_over(&mut self, total: u64, now: Instant) -> bool {
        let dropped = total.saturating_sub(self.total);
        let passed = now.duration_since(self.counted);
        if dropped as f64 > MAX_CALM_RATE as f64 * passed.as_secs_f64() {
            self.calm_since = now;
        }
        (self.counted, self.total) = (now, total);
        now.duration_since(self.calm_since) >= MIN_CALM_TIME
    }
}

impl Shields {
    /// Handles a worker's report that it gets many datagrams which no key of a tunnel opens.
    pub(super) fn flooded(&mut self, number: u16, now: Instant, shared: &mut Shared, keys: &mut Keyring) {
        // The programs do not know the datagrams that a SOCKS5 server relays.
        // An orphan drops everything.
        let may_have =
            |tenant: &&mut Tenant| tenant.socks.is_none() && tenant.orphaned.is_none() && !keys.is_shielded(number);
        let Some(tenant) = shared.tunnels.get_mut(number).filter(may_have) else { return };
        let Some(shield) = keys.shield(number, tenant.cipher.into(), tenant.protocol == Protocol::Ip) else {
            return tracing::debug!("{}: flooded, and all shields are in use", tenant.device.name);
        };
        tenant.shield = shield;
        log_failure(shared.platform.programs().set_tunnel(number.into(), tenant.entry()));
        attach(tenant, &shared.platform);
        self.set.insert(number, Drops::new(now, dropped(number, &shared.platform)));
        let message = "many datagrams come that no key opens; the programs drop them by their first and last blocks";
        shared.daemons.news(number, message.into());
    }

    /// Takes the shields of tunnels that are not flooded any more, and follows tunnels that have changed their doors or devices.
    pub(super) fn poll(&mut self, now: Instant, shared: &mut Shared, keys: &mut Keyring) {
        if self.set.is_empty() {
            return;
        }
        let Shared { tunnels, platform, daemons, .. } = shared;
        self.set.retain(|number, drops| {
            // The tunnel has gone, or another one has its number now.
            let Some(tenant) = tunnels.get_mut(*number).filter(|_| keys.is_shielded(*number)) else { return false };
            let is_over = drops.are_over(dropped(*number, platform), now);
            if is_over {
                tenant.shield = 0;
                log_failure(platform.programs().set_tunnel((*number).into(), tenant.entry()));
                keys.unshield(*number);
                daemons.news(*number, "few datagrams come that no key opens; the programs look at none of them".into());
            } else {
                attach(tenant, platform);
            }
            !is_over
        });
        let devices: Vec<u32> = self.set.keys().filter_map(|number| socket_device(tunnels.get(*number)?)).collect();
        platform.programs().detach_shields_except(|ifindex| devices.contains(&ifindex));
    }
}

/// The number of a tunnel's datagrams that the programs have dropped because no key opens them.
fn dropped(number: u16, platform: &Platform) -> u64 {
    platform.verdicts(number).map_or(0, |verdicts| verdicts[Verdict::BadCrc as usize])
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds until a shield goes that drops so many datagrams a second, up to an hour.
    fn seconds(rate: u64) -> Option<u64> {
        let start = Instant::now();
        let mut drops = Drops::new(start, 7);
        (1..3600).find(|second| drops.are_over(7 + rate * second, start + Duration::from_secs(*second)))
    }

    #[test]
    fn a_shield_goes_ten_seconds_after_the_flood_and_not_before() {
        for rate in [0, 1, MAX_CALM_RATE] {
            assert_eq!(seconds(rate), Some(10), "{rate}");
        }
        assert_eq!(seconds(MAX_CALM_RATE + 1), None);
    }

    #[test]
    fn the_time_begins_anew_when_the_flood_comes_again() {
        let start = Instant::now();
        let mut drops = Drops::new(start, 0);
        let total = |second: u64| if second < 7 { 0 } else { 10_000 };
        assert_eq!(
            (1..100).find(|second| drops.are_over(total(*second), start + Duration::from_secs(*second))),
            Some(17)
        );
    }
}
