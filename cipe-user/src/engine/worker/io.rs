//! Between the carrier's doors and the datapath.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use cipe_common::Verdict;

use super::Worker;
use super::device::Private;
use crate::engine::BATCH;
use crate::engine::carrier::{Door, Room, socks};
use crate::engine::datapath::{ControlMessage, OWN};

/// Datagrams taken in at once where other workers can open some of them.
const SHARED: usize = 4 * BATCH;

impl Worker {
    /// Takes one batch from a carrier device; returns whether there may be more.
    pub(super) fn inbound_carrier(&mut self, slot: usize) -> bool {
        // More than one batch only where there are others to open it.
        let most = if self.crew.has_help(self.number) { SHARED } else { BATCH };
        let Some(Some(carrier)) = self.carriers.get_mut(slot) else { return false };
        let (umem, pool) = (&self.datapath.umem, &mut self.datapath.pool);
        let mut room = Room { umem, pool, inbox: &mut self.inbox, sight: &mut self.sight };
        let more = carrier.receive(most, &mut room, &mut self.arrivals);
        self.take_in(None);
        more.unwrap_or(false)
    }

    /// Takes one batch from a tunnel's own UDP socket: superframes, fragments, other devices, carriers without AF_XDP.
    /// Returns whether there may be more.
    pub(super) fn inbound_udp(&mut self, number: u16) -> bool {
        if self.sockets_held {
            return false;
        }
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return false };
        let (umem, pool) = (&self.datapath.umem, &mut self.datapath.pool);
        let mut room = Room { umem, pool, inbox: &mut self.inbox, sight: &mut self.sight };
        match endpoint.udp.receive(BATCH, &mut room, &mut self.arrivals) {
            Ok(more) => {
                self.tell_of_single_frames(number);
                self.take_in(Some(number));
                more
            }
            // Nothing there but the error of an earlier datagram.
            Err(error) => {
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    tracing::debug!("tunnel {number}: {error}");
                }
                self.read_errors(number);
                false
            }
        }
    }

    /// Opens what has arrived and delivers it. What bears no address of its own is for the tunnel `of_socket`.
    pub(super) fn take_in(&mut self, of_socket: Option<u16>) {
        self.moved += self.datapath.open(&mut self.arrivals, of_socket);
        self.datapath.deliver(&mut Private { hubs: &mut self.hubs, lans: &mut self.lans });
    }

    /// Sends what is sealed, now or when its time comes, and what senders are told.
    pub(super) fn send_outgoing(&mut self) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        self.moved += outgoing.len();
        self.hold_back(&mut outgoing);
        self.ship(&mut outgoing);
        self.outgoing = outgoing;
        for message in self.datapath.too_big.take() {
            self.icmp.send(&message);
        }
    }

    /// Seals and sends a message of the daemon's.
    pub(super) fn send_control(&mut self, number: u16, message: &ControlMessage) {
        // The keys as they are now: this is not in the middle of a batch.
        self.datapath.now = Instant::now();
        self.datapath.seal_message(number, message, &mut self.outgoing);
        self.send_outgoing();
        self.flush();
    }

    /// Sends a datagram in clear.
    pub(super) fn send_clear(&mut self, number: u16, to: SocketAddr, datagram: &[u8]) {
        let (Some(endpoint), Some(tunnel)) = (self.endpoints.get(&number), self.datapath.tunnels.get(&number)) else {
            return;
        };
        let sent = match (tunnel.socks, tunnel.relay, socks::header(to)) {
            (false, ..) => Some(endpoint.udp.send_one(to, OWN, &[IoSlice::new(datagram)])),
            (true, Some(relay), Some(header)) => {
                Some(endpoint.udp.send_one(relay, OWN, &[IoSlice::new(&header), IoSlice::new(datagram)]))
            }
            // Never past the server.
            (true, ..) => None,
        };
        tunnel.counters.count(match sent {
            Some(true) => Verdict::ControlSent,
            Some(false) => Verdict::CarrierFull,
            None => Verdict::NoRoute,
        });
    }
}
