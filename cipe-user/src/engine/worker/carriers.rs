//! Adds and removes carrier devices while datagrams arrive. All datagrams of the old door are read before those of the
//! new one, so that the order within each flow is kept.

use super::{BATCH, NewCarrier, Source, Worker};
use crate::engine::carrier::XdpCarrier;
use crate::engine::tunnel::Egress;
use crate::kernel::zone;

/// Maximum frames in the fill ring of a carrier queue: 2 ms of packets at a million packets a second.
const MAX_CARRIER_FILL: u32 = 2048;

/// Maximum calls to empty the buffers of a door. What is still there after so many has arrived in the meantime.
const MAX_DRAIN_CALLS: usize = 1024;

impl Worker {
    pub(super) fn add_carrier(&mut self, slot: usize, NewCarrier { ifindex, sockets, traffic, live }: NewCarrier) {
        let others = self.carriers.iter().flatten().count();
        let fill = self.fill(4, others, sockets.len()).clamp(64, MAX_CARRIER_FILL);
        let ports = self.open_ports(sockets, Source::Carrier(slot), fill);
        if self.carriers.len() <= slot {
            self.carriers.resize_with(slot + 1, || None);
        }
        let carrier = XdpCarrier::new(ifindex, ports, traffic);
        self.carriers[slot] = Some(match live {
            Some(frames) => carrier.with_live_frames(frames),
            None => carrier,
        });
    }

    /// The device of a tunnel's link-local addresses has a new index: it was removed, and made again under the same
    /// name.
    pub(super) fn set_zone(&mut self, number: u16, zone: u32) {
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return };
        for address in &mut endpoint.addresses {
            self.datapath.remove_address(address);
            *address = zone::moved(*address, zone);
            self.datapath.add_address(*address, number);
        }
        if let Some(tunnel) = self.datapath.tunnels.get_mut(&number)
            && let Some(peer) = tunnel.peer
        {
            tunnel.set_peer(zone::moved(peer, zone));
        }
        self.datapath.set_target(number);
    }

    pub(super) fn begin_carrier(&mut self, slot: usize) {
        let Some(Some(carrier)) = self.carriers.get_mut(slot) else { return };
        let mut waiting = carrier.begin().into_iter().peekable();
        while waiting.peek().is_some() {
            self.arrivals.extend(waiting.by_ref().take(BATCH));
            self.take_in(None);
            self.flush();
        }
    }

    pub(super) fn remove_carrier(&mut self, slot: usize) {
        self.begin_carrier(slot);
        (0..MAX_DRAIN_CALLS).find(|_| {
            let more = self.inbound_carrier(slot);
            self.flush();
            !more
        });
        for tunnel in self.datapath.tunnels.values_mut() {
            if matches!(tunnel.egress, Egress::Carrier(path) if path.carrier == slot) {
                tunnel.egress = Egress::Socket;
            }
        }
        if let Some(carrier) = self.carriers.get_mut(slot).and_then(Option::take) {
            let ports = carrier.into_ports(&mut self.datapath.pool);
            self.close_ports(ports);
        }
    }

    pub(super) fn empty_sockets(&mut self) {
        let numbers = self.datapath.tunnels.values().map(|tunnel| tunnel.number);
        let numbers: Vec<u16> = numbers.filter(|number| self.is_home_of(*number)).collect();
        for number in numbers {
            (0..MAX_DRAIN_CALLS).find(|_| {
                let more = self.inbound_udp(number);
                self.flush();
                !more
            });
        }
    }

    /// Whether this worker is the one that reads the tunnel's UDP socket.
    pub(super) fn is_home_of(&self, number: u16) -> bool {
        usize::from(number) % self.crew.count() == self.number
    }
}
