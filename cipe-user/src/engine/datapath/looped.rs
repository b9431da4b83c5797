//! What has gone round through other tunnels ends here ([`super::rounds`]).

use cipe_common::Verdict;

use super::Datapath;
use super::packets::Outgoing;
use crate::engine::carrier::socks;
use crate::wire::packet::IV;

impl Datapath {
    /// Drops of `outgoing` from place `first` on what has gone round, and notes of the rest which tunnels' datagrams it holds.
    pub(super) fn stop_rounds(&mut self, first: usize, outgoing: &mut Vec<Outgoing>) {
        // Alone, a tunnel carries no other's; its own datagrams the program stops.
        if !self.targets.has_several() {
            return;
        }
        for out in outgoing.extract_if(first.., |out| self.goes_round(out)).collect::<Vec<_>>() {
            if let Some(tunnel) = self.tunnels.get(&out.tunnel) {
                tunnel.counters.count(Verdict::RouteLoop);
            }
            self.pool.put(out.frame);
        }
    }

    /// Takes up where the datagrams of a tunnel go now, if it is there.
    pub fn set_target(&mut self, number: u16) {
        self.targets.set(number, self.tunnels.get(&number).and_then(super::super::tunnel::Tunnel::target));
    }

    fn goes_round(&self, out: &mut Outgoing) -> bool {
        let Some(headers) = out.headers else { return false };
        let at = out.datagram.start + if out.slot.is_some() { IV } else { 0 };
        let payload = self.umem.chunk(&out.frame).get(at..at + out.octets).unwrap_or_default();
        let found = headers.packet(payload).and_then(|(packet, headers)| self.targets.find(packet, headers));
        let Some((carried, datagram)) = found else { return false };
        let is_relayed = self.tunnels.get(&carried).is_some_and(|tunnel| tunnel.socks);
        let Some(iv) = datagram.get(if is_relayed { socks::HEADER } else { 0 }..).and_then(<[u8]>::first_chunk) else {
            return false;
        };
        let mut inside = self.crew.rounds().inside(iv);
        if carried == out.tunnel || inside.contains(&out.tunnel) || inside.try_push(carried).is_err() {
            return true;
        }
        out.inside = Some(Box::new(inside));
        false
    }
}
