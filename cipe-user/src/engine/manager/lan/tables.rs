//! The tables that short cuts are decided by: which prefixes lead where, for the programs and for the workers.

use std::collections::HashMap;
use std::sync::Arc;

use cipe_common::maps::{LanRoute, MAX_LAN_ROUTES, NO_TUNNEL};

use super::super::platform::log_failure;
use super::super::tunnels::Tunnels;
use super::super::{Daemons, Manager};
use super::card::LanCard;
use super::{Lans, Taker, Takers};
use crate::engine::lan::{LanPort, LanTable, ShortCutTarget};
use crate::engine::worker::Command;
use crate::kernel::forwarding::{self, Prefix, PrefixMap, PrefixTarget};

impl Manager {
    /// Makes the tables of short cuts anew and hands out what has changed.
    pub(in crate::engine::manager) fn renew_lans(&mut self) {
        self.lans.renew(&self.tunnels, &self.daemons);
    }
}

impl Lans {
    /// Who may take short cuts now.
    pub(super) fn takers_now(&self, tunnels: &Tunnels) -> Takers {
        let ruled = self.picture.ruled;
        let members = self.open.iter().flat_map(|(ifindex, lan)| lan.tunnels.iter().map(move |n| (*ifindex, lan, *n)));
        let taker = |(ifindex, lan, number): (u32, &LanCard, u16)| {
            let device = &tunnels.get(number)?.device;
            // By name: that is how /proc knows them.
            let is_on = |v6| forwarding::is_on(&lan.card.name, v6) && forwarding::is_on(&device.name, v6);
            let forwards = [false, true].map(|v6| !ruled[usize::from(v6)] && is_on(v6));
            Some((device.index, Taker { number, lan: ifindex, forwards }))
        };
        members.filter_map(taker).collect()
    }

    /// Makes the tables anew and hands out what has changed.
    fn renew(&mut self, tunnels: &Tunnels, daemons: &Daemons) {
        if self.pictures.is_none() {
            return;
        }
        let takers = self.takers_now(tunnels);
        let way = |prefix: &Prefix, leads: &PrefixTarget| match leads {
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
        let ways: PrefixMap<ShortCutTarget> =
            routes.iter().map(|(prefix, leads)| (*prefix, way(prefix, leads))).collect();
        let ways = without_idle(&ways);
        let wanted: HashMap<Prefix, LanRoute> = ways.iter().map(|(prefix, way)| (*prefix, entry(way))).collect();
        let fits = wanted.len() <= MAX_LAN_ROUTES as usize;
        let (ways, wanted) = if fits { (ways, wanted) } else { (PrefixMap::default(), HashMap::new()) };
        self.install(wanted);
        self.tell_hindrances(&takers, fits, daemons);
        self.takers = takers;

        let ports = self.open.iter().map(|(ifindex, lan)| {
            let port = LanPort { slot: lan.slot, mac: lan.card.mac.unwrap_or_default(), mtu: lan.card.mtu as usize };
            (*ifindex, port)
        });
        let near = self.picture.neighbours.iter().filter(|((ifindex, _), _)| self.open.contains_key(ifindex));
        let table = LanTable::new(ways, ports.collect(), near.map(|(key, near)| (*key, near.mac)));
        table.keep_used(&self.table);
        self.table = Arc::new(table);
        self.platform.workers.tell_all(|_| Command::SetExits(self.table.clone()));
    }

    /// Brings the programs' table up to date: first what keeps packets off the short cut, then what leads onto it.
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

    /// Tells daemons what hinders their short cuts, when that changes.
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

/// Leaves out what tells the same as its absence: ways of the kernel's outside any other.
fn without_idle(ways: &PrefixMap<ShortCutTarget>) -> PrefixMap<ShortCutTarget> {
    let matters = |(prefix, way): &(&Prefix, &ShortCutTarget)| {
        **way != ShortCutTarget::Kernel || ways.around(**prefix).any(|around| *around != ShortCutTarget::Kernel)
    };
    ways.iter().filter(matters).map(|(prefix, way)| (*prefix, *way)).collect()
}

fn entry(way: &ShortCutTarget) -> LanRoute {
    match way {
        ShortCutTarget::Tunnel { tunnel, lan } => LanRoute { lan: *lan, tunnel: u32::from(*tunnel) },
        ShortCutTarget::Lan { lan, .. } => LanRoute { lan: *lan, tunnel: NO_TUNNEL },
        ShortCutTarget::Kernel => LanRoute { lan: 0, tunnel: NO_TUNNEL },
    }
}
