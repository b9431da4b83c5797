//! Where the tunnels' carrier routes lead, also through other tunnels.

use std::net::SocketAddr;

use cipe_common::Verdict;

use super::loops::{PeerRoute, round_notice};
use super::tunnels::Tunnels;
use crate::kernel::nexthop::NextHop;

impl Tunnels {
    /// Where the route of a tunnel leads whose datagrams leave by the device of this ifindex.
    pub(super) fn leads(&self, number: u16, ifindex: u32) -> PeerRoute {
        let mut device = ifindex;
        // After more steps than there are tunnels, one was met twice: the loop is that of others, and is reported of them.
        for step in 0..=self.len() {
            match self.of_device(device) {
                None => return PeerRoute::Out,
                Some(through) if through == number => {
                    return if step == 0 { PeerRoute::Inward } else { PeerRoute::Round };
                }
                Some(through) => match self.get(through).and_then(|tenant| tenant.looked_up) {
                    Some(hop) => device = hop.ifindex,
                    None => return PeerRoute::Out,
                },
            }
        }
        PeerRoute::Out
    }

    /// Tunnels whose route leads elsewhere because that of another tunnel has changed: number, target and next hop.
    pub(super) fn changed_by_others(&self) -> Vec<(u16, SocketAddr, NextHop)> {
        let mut changed = Vec::new();
        for (number, tenant) in self.iter() {
            let Some(hop) = tenant.looked_up.filter(|hop| self.of_device(hop.ifindex).is_some()) else { continue };
            if let Some(target) = tenant.target().filter(|_| self.leads(number, hop.ifindex) != tenant.leads) {
                changed.push((number, target, hop));
            }
        }
        changed
    }

    /// Sets where a tunnel's route leads; returns the notice that it goes round, if that is new. A route into the tunnel itself is
    /// not reported until a datagram has come in by it. `counted`: its own datagrams that the programs have dropped so far.
    pub(super) fn set_leads(&mut self, number: u16, leads: PeerRoute, counted: u64) -> Option<String> {
        let tenant = self.get_mut(number)?;
        let before = std::mem::replace(&mut tenant.leads, leads);
        if before != leads {
            tenant.loops.restart(counted);
            tenant.rounds.restart(tenant.counters.of(Verdict::RouteLoop));
        }
        let target = tenant.target()?;
        (leads == PeerRoute::Round && before != leads).then(|| round_notice(target))
    }
}
