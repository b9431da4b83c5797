//! Questions to the peer: do datagrams that were sent in a group arrive?

use std::time::Instant;

use super::Worker;
use crate::engine::carrier::Ask;

impl Worker {
    /// Sends a question to the peer of a tunnel.
    pub(super) fn ask_peer(&mut self, number: u16, ask: Ask) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        self.datapath.seal_question(number, ask, &mut outgoing);
        if let Some(endpoint) = self.endpoints.get_mut(&number) {
            endpoint.udp.set_asks(true);
        }
        self.transmit(&mut outgoing);
        self.outgoing = outgoing;
        if let Some(endpoint) = self.endpoints.get_mut(&number) {
            endpoint.udp.set_asks(false);
        }
    }

    /// Continues the open questions. A worker wakes often enough for that.
    pub(super) fn poll_questions(&mut self) {
        if self.asking.is_empty() {
            return;
        }
        let now = Instant::now();
        self.datapath.now = now;
        for number in std::mem::take(&mut self.asking) {
            let Some(endpoint) = self.endpoints.get_mut(&number) else { continue };
            let (ask, change) = endpoint.udp.poll_segmentation(now);
            let is_asking = endpoint.udp.segmentation().is_asking();
            if let Some(change) = change {
                self.datapath.note_change(number, change);
            }
            if let Some(ask) = ask {
                self.ask_peer(number, ask);
                self.flush();
            }
            if is_asking && !self.asking.contains(&number) {
                self.asking.push(number);
            }
        }
    }
}
