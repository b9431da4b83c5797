//! Drops packets that are in a loop through other tunnels ([`super::rounds`]).

use cipe_common::Verdict;

use super::Datapath;
use super::packets::{Outgoing, identity};
use crate::engine::carrier::socks;

impl Datapath {
    /// Drops looped packets of `outgoing`, from index `first` on. Records for the others which tunnels' datagrams they hold.
    pub(super) fn drop_looped(&mut self, first: usize, outgoing: &mut Vec<Outgoing>) {
        // A single tunnel carries no datagrams of others, and the TC program drops its own.
        if !self.targets.has_several() {
            return;
        }
        for out in outgoing.extract_if(first.., |out| self.is_looped(out)).collect::<Vec<_>>() {
            if let Some(tunnel) = self.tunnels.get(&out.tunnel) {
                tunnel.counters.count(Verdict::RouteLoop);
            }
            self.pool.put(out.frame);
        }
    }

    /// Updates the address that the datagrams of a tunnel are sent to. A removed tunnel has none.
    pub fn set_target(&mut self, number: u16) {
        self.targets.set(number, self.tunnels.get(&number).and_then(super::super::tunnel::Tunnel::target));
    }

    /// Returns whether a packet is in a loop. If not, sets `inside` of `out` when it holds a tunnel's datagram.
    fn is_looped(&self, out: &mut Outgoing) -> bool {
        let Some(headers) = out.headers else { return false };
        let at = out.datagram.start + out.form.headroom();
        let payload = self.umem.chunk(&out.frame).get(at..at + out.octets).unwrap_or_default();
        let found = headers.packet(payload).and_then(|(packet, headers)| self.targets.find(packet, headers));
        let Some((carried, datagram)) = found else { return false };
        let is_relayed = self.tunnels.get(&carried).is_some_and(|tunnel| tunnel.socks);
        let datagram = datagram.get(if is_relayed { socks::HEADER } else { 0 }..).unwrap_or_default();
        let Some(identity) = identity(datagram) else { return false };
        let mut inside = self.crew.rounds().inside(&identity);
        if carried == out.tunnel || inside.contains(&out.tunnel) || inside.try_push(carried).is_err() {
            return true;
        }
        out.inside = Some(Box::new(inside));
        false
    }
}
