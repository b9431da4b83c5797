//! Moves datagrams between the doors and the datapath.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::Instant;

use cipe_common::Verdict;

use super::Worker;
use super::device::Private;
use crate::engine::BATCH;
use crate::engine::carrier::{Authentic, Door, Room, socks};
use crate::engine::datapath::{ControlMessage, OWN};

/// Maximum datagrams received at once if other workers can decrypt some of them.
const MAX_SHARED: usize = 4 * BATCH;

impl Worker {
    /// Receives one batch from a carrier device. Returns whether there may be more.
    pub(super) fn inbound_carrier(&mut self, slot: usize) -> bool {
        // More than one batch only if other workers can help to decrypt it.
        let most = if self.crew.has_help(self.number) { MAX_SHARED } else { BATCH };
        let Some(Some(carrier)) = self.carriers.get_mut(slot) else { return false };
        let (umem, pool) = (&self.datapath.umem, &mut self.datapath.pool);
        let mut room = Room { umem, pool, inbox: &mut self.inbox, stats: &mut self.stats };
        let more = carrier.receive(most, &mut room, &mut self.arrivals);
        let by_card = self.take_in(None).by_card;
        if let Some(Some(carrier)) = self.carriers.get(slot) {
            carrier.count_authentic(by_card);
        }
        more.unwrap_or(false)
    }

    /// Receives one batch from a tunnel's own UDP socket: superframes, fragments, other devices, carriers without
    /// AF_XDP. Returns whether there may be more.
    pub(super) fn inbound_udp(&mut self, number: u16) -> bool {
        if self.sockets_held {
            return false;
        }
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return false };
        let (umem, pool) = (&self.datapath.umem, &mut self.datapath.pool);
        let mut room = Room { umem, pool, inbox: &mut self.inbox, stats: &mut self.stats };
        match endpoint.udp.receive(BATCH, &mut room, &mut self.arrivals) {
            Ok(more) => {
                let authentic = self.take_in(Some(number));
                self.stats.receive(&authentic);
                self.report_door_hint(number);
                more
            }
            // There is only the error of an earlier datagram.
            Err(error) => {
                if error.kind() != std::io::ErrorKind::WouldBlock {
                    tracing::debug!("tunnel {number}: {error}");
                }
                self.read_errors(number);
                false
            }
        }
    }

    /// Decrypts and delivers the received datagrams. A datagram without an address of its own is for the tunnel
    /// `of_socket`. Returns those that were decrypted.
    pub(super) fn take_in(&mut self, of_socket: Option<u16>) -> Authentic {
        self.moved += self.datapath.open(&mut self.arrivals, of_socket);
        self.datapath.deliver(&mut Private { hubs: &mut self.hubs, lans: &mut self.lans });
        self.send_challenges();
        self.datapath.take_authentic()
    }

    /// Sends the questions to addresses where peers may be now, and answers with cookies.
    pub(super) fn send_challenges(&mut self) {
        if self.datapath.has_challenges() {
            let mut outgoing = std::mem::take(&mut self.outgoing);
            self.datapath.seal_challenges(&mut outgoing);
            self.transmit(&mut outgoing);
            self.outgoing = outgoing;
        }
    }

    /// Sends the sealed datagrams, or queues them if they are paced, and sends the ICMP errors.
    pub(super) fn send_outgoing(&mut self) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        self.moved += outgoing.len();
        self.queue_paced(&mut outgoing);
        self.transmit(&mut outgoing);
        self.outgoing = outgoing;
        for message in self.datapath.too_big.take() {
            self.icmp.send(&message);
        }
    }

    /// Sends the frames that had to wait, if they may leave now.
    pub(super) fn send_held(&mut self) {
        if self.datapath.has_held() {
            self.datapath.now = Instant::now();
            self.datapath.release_held(&mut self.outgoing);
            self.send_outgoing();
        }
    }

    /// Seals and sends a message of the daemon.
    pub(super) fn send_control(&mut self, number: u16, message: &ControlMessage) {
        // The current keys may be used: this is not in the middle of a batch.
        self.datapath.now = Instant::now();
        self.datapath.seal_message(number, message, &mut self.outgoing);
        self.send_messages();
    }

    /// Sends messages, which do not wait for more.
    pub(super) fn send_messages(&mut self) {
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
            // Never bypass the server.
            (true, ..) => None,
        };
        tunnel.counters.count(match sent {
            Some(true) => Verdict::ControlSent,
            Some(false) | None => Verdict::ControlUnsent,
        });
    }
}
