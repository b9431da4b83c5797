//! The routing tables of short cuts, for the programs and for the workers: which prefix leads to which tunnel or card.

use std::collections::HashMap;
use std::sync::Arc;

use cipe_common::maps::{LanRoute, MAX_LAN_ROUTES, NO_TUNNEL};

use super::super::connections::Daemons;
use super::super::platform::log_failure;
use super::super::tunnels::Tunnels;
use super::card::LanCard;
use super::{Lans, Taker, Takers};
use crate::engine::lan::{LanPort, LanTable, ShortCutTarget};
use crate::engine::worker::Command;
use crate::kernel::forwarding::{self, Prefix, PrefixMap, PrefixTarget};

impl Lans {
    /// The tunnels that may use short cuts now.
    pub(super) fn takers_now(&self, tunnels: &Tunnels) -> Takers {
        let ruled = self.picture.ruled;
        let members = self.open.iter().flat_map(|(ifindex, lan)| lan.tunnels.iter().map(move |n| (*ifindex, lan, *n)));
        let taker = |(ifindex, lan, number): (u32, &LanCard, u16)| {
            let device = &tunnels.get(number)?.device;
            // By name, as in /proc/sys/net.
            let is_on = |v6| forwarding::is_on(&lan.card.name, v6) && forwarding::is_on(&device.name, v6);
            let forwards = [false, true].map(|v6| !ruled[usize::from(v6)] && is_on(v6));
            Some((device.index, Taker { number, lan: ifindex, forwards }))
        };
        members.filter_map(taker).collect()
    }

    /// Makes the tables of short cuts anew, for the programs and for the workers, and tells daemons what has changed for them.
    pub(in crate::engine::manager) fn renew(&mut self, tunnels: &Tunnels, daemons: &Daemons) {
        if self.pictures.is_none() {
            return;
        }
        let takers = self.takers_now(tunnels);
        let target = |prefix: &Prefix, leads: &PrefixTarget| match leads {
            PrefixTarget::Out(out) => match takers.get(&out.ifindex) {
                Some(taker) if taker.forwards[usize::from(prefix.address.is_ipv6())] => {
                    ShortCutTarget::Tunnel { tunnel: taker.number, lan: taker.lan }
                }
                None if self.open.contains_key(&out.ifindex) => {
                    ShortCutTarget::Lan { lan: out.ifindex, gateway: out.gateway, mtu: out.mtu.map(|mtu| mtu as usize) }
                }
                _ => ShortCutTarget::Kernel,
            },
            PrefixTarget::Elsewhere => ShortCutTarget::Kernel,
        };
        let routes = self.picture.routes.clone();
        let targets: PrefixMap<ShortCutTarget> =
            routes.iter().map(|(prefix, leads)| (*prefix, target(prefix, leads))).collect();
        let targets = without_redundant(&targets);
        let wanted: HashMap<Prefix, LanRoute> =
            targets.iter().map(|(prefix, target)| (*prefix, entry(target))).collect();
        let fits = wanted.len() <= MAX_LAN_ROUTES as usize;
        let (targets, wanted) = if fits { (targets, wanted) } else { (PrefixMap::default(), HashMap::new()) };
        self.install(wanted);
        self.tell_hindrances(&takers, fits, daemons);
        self.takers = takers;

        let ports = self.open.iter().map(|(ifindex, lan)| {
            let port = LanPort { slot: lan.slot, mac: lan.card.mac.unwrap_or_default(), mtu: lan.card.mtu as usize };
            (*ifindex, port)
        });
        let near = self.picture.neighbours.iter().filter(|((ifindex, _), _)| self.open.contains_key(ifindex));
        let table = LanTable::new(targets, ports.collect(), near.map(|(key, near)| (*key, near.mac)));
        table.keep_used(&self.table);
        self.table = Arc::new(table);
        self.platform.workers.tell_all(|_| Command::SetExits(self.table.clone()));
    }

    /// Updates the programs' table: first the routes that keep packets off the short cut, then those that lead onto it.
    fn install(&mut self, wanted: HashMap<Prefix, LanRoute>) {
        let installed = &mut self.installed;
        let mut news: Vec<_> = wanted
            .iter()
            .filter(|(prefix, route)| installed.get(*prefix) != Some(*route))
            .map(|(p, r)| (*p, *r))
            .collect();
        news.sort_unstable_by_key(|(_, route)| route.lan != 0);
        let gone: Vec<Prefix> = installed.keys().filter(|prefix| !wanted.contains_key(*prefix)).copied().collect();
        let mut programs = self.platform.programs();
        for (prefix, route) in news {
            log_failure(programs.set_lan_route(prefix, route));
        }
        for prefix in gone {
            log_failure(programs.remove_lan_route(prefix));
        }
        *installed = wanted;
    }

    /// Tells daemons why their tunnels' packets take no short cut, when that changes.
    fn tell_hindrances(&mut self, takers: &Takers, fits: bool, daemons: &Daemons) {
        let ruled = self.picture.ruled;
        let mut news = Vec::new();
        for Taker { number, forwards, .. } in takers.values() {
            let text = match (fits, forwards, ruled) {
                (false, ..) => Some(format!("not taken: more than {MAX_LAN_ROUTES} routes")),
                (_, [true, _] | [_, true], _) => None,
                (_, _, [true, _]) => Some("not taken: routing rules decide (ip rule)".to_owned()),
                _ => Some("not taken: forwarding is off (net.ipv4.ip_forward)".to_owned()),
            };
            let before = match &text {
                Some(text) => self.hindrances.insert(*number, text.clone()),
                None => self.hindrances.remove(number),
            };
            if before != text {
                news.push((*number, text.unwrap_or_else(|| "taken".to_owned())));
            }
        }
        for (number, text) in news {
            daemons.notice(number, format!("short cut: {text}"));
        }
    }
}

/// Leaves out routes that change nothing: those to the kernel that lie in no other route.
fn without_redundant(targets: &PrefixMap<ShortCutTarget>) -> PrefixMap<ShortCutTarget> {
    let matters = |(prefix, target): &(&Prefix, &ShortCutTarget)| {
        **target != ShortCutTarget::Kernel || targets.around(**prefix).any(|around| *around != ShortCutTarget::Kernel)
    };
    targets.iter().filter(matters).map(|(prefix, target)| (*prefix, *target)).collect()
}

fn entry(target: &ShortCutTarget) -> LanRoute {
    match target {
        ShortCutTarget::Tunnel { tunnel, lan } => LanRoute { lan: *lan, tunnel: u32::from(*tunnel) },
        ShortCutTarget::Lan { lan, .. } => LanRoute { lan: *lan, tunnel: NO_TUNNEL },
        ShortCutTarget::Kernel => LanRoute { lan: 0, tunnel: NO_TUNNEL },
    }
}
