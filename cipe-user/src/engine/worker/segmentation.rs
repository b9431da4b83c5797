//! Questions to the peer whether datagrams that left in a group arrive.

use std::time::Instant;

use super::Worker;
use crate::engine::carrier::Ask;

impl Worker {
    /// Asks the peer of a tunnel.
    pub(super) fn ask_peer(&mut self, number: u16, ask: Ask) {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        self.datapath.seal_question(number, ask, &mut outgoing);
        if let Some(endpoint) = self.endpoints.get_mut(&number) {
            endpoint.udp.set_asks(true);
        }
        self.ship(&mut outgoing);
        self.outgoing = outgoing;
        if let Some(endpoint) = self.endpoints.get_mut(&number) {
            endpoint.udp.set_asks(false);
        }
    }

    /// Goes on with the questions that are open. The longest wait of a worker is short enough for that.
    pub(super) fn tend_questions(&mut self) {
        if self.asking.is_empty() {
            return;
        }
        let now = Instant::now();
        self.datapath.now = now;
        for number in std::mem::take(&mut self.asking) {
            let Some(endpoint) = self.endpoints.get_mut(&number) else { continue };
            let (ask, change) = endpoint.udp.tend_segmentation(now);
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
