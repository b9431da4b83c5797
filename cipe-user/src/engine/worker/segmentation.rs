//! Questions to the peer whether datagrams that left in a group arrive, and what is told of the answers.

use std::time::Instant;

use cipe_common::maps::Slot;

use super::outbound::OWN;
use super::packets::Outgoing;
use super::{FRESH, Report, Reports, Worker};
use crate::control::protocol::Event;
use crate::engine::carrier::{Ask, Change};
use crate::inner::headers::Version;
use crate::wire::message::Message;
use crate::wire::packet::Type;

/// Datagrams of a group that asks.
const GROUP: usize = 3;

/// Octets of a message for a peer that is not known to be ours: within what its own messages have.
const SMALL: usize = 160;

impl Worker {
    /// Asks the peer of a tunnel. Without a dynamic key nothing is asked, and the question counts as unanswered.
    pub(super) fn ask_peer(&mut self, number: u16, ask: Ask) {
        let (mark, count) = match ask {
            Ask::Group(mark) => (mark, GROUP),
            Ask::Alone(mark) => (mark, 1),
        };
        let Some(endpoint) = self.endpoints.get_mut(&number) else { return };
        let tunnel = &mut endpoint.tunnel;
        tunnel.keys.refresh(self.now);
        if tunnel.keys.sending() != Some(Slot::Send) {
            return;
        }
        // As large as what it is about, which is what a card or a host below may not be able to cut.
        let octets = if tunnel.is_ours { tunnel.mtu.of(Version::V4).max(SMALL) } else { SMALL };
        tunnel.udp.set_asks(true);
        for _ in 0..count {
            let Some(mut frame) = self.pool.take() else { break };
            let mut message = Message::Ping(&mark).build(unix_time(), self.random.generator());
            message.resize(octets, 0);
            self.umem.chunk_mut(&mut frame)[FRESH..FRESH + octets].copy_from_slice(&message);
            self.outgoing.push(Outgoing::new(number, frame, FRESH, octets, Type::Control, Some(Slot::Send), OWN));
        }
        self.send_outgoing();
        if let Some(endpoint) = self.endpoints.get_mut(&number) {
            endpoint.tunnel.udp.set_asks(false);
        }
    }

    /// Goes on with the questions that are open. The longest wait of a worker is short enough for that.
    pub(super) fn tend_questions(&mut self) {
        if self.asking.is_empty() {
            return;
        }
        self.now = Instant::now();
        for number in std::mem::take(&mut self.asking) {
            let Some(endpoint) = self.endpoints.get_mut(&number) else { continue };
            let (ask, change) = endpoint.tunnel.udp.tend_segmentation(self.now);
            let is_asking = endpoint.tunnel.udp.segmentation().is_asking();
            if let Some(change) = change {
                tell_of_segmentation(&self.reports, number, change);
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

    /// Takes up a message if it answers such a question; whether it does.
    pub(super) fn is_answer(&self, number: u16, message: &[u8]) -> bool {
        let Some(endpoint) = self.endpoints.get(&number) else { return false };
        let Ok(Message::Pong(data)) = Message::parse(message) else { return false };
        let Some(change) = endpoint.tunnel.udp.segmentation().answered(data, self.now) else { return false };
        if let Some(change) = change {
            tell_of_segmentation(&self.reports, number, change);
        }
        true
    }
}

/// Seconds since 1970.
fn unix_time() -> u32 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs() as u32)
}

/// For the log. If the queue is full, the status has it still.
pub(super) fn tell_of_segmentation(reports: &Reports, number: u16, change: Change) {
    let (message, well) = match change {
        Change::Refused(errno, wait) => {
            let (errno, wait) = (errno.desc(), wait.as_secs());
            (format!("the kernel refuses UDP_SEGMENT ({errno}): single datagrams, tried again in {wait} s"), false)
        }
        Change::Lost(wait) => {
            let what = "what leaves by UDP_SEGMENT does not arrive, and single datagrams do";
            let wait = wait.as_secs();
            let cure = "the card or its driver cannot cut UDP (ethtool -K DEVICE tx-udp-segmentation off)";
            (format!("{what}: single datagrams, tried again in {wait} s; {cure}"), false)
        }
        Change::Works => ("what leaves by UDP_SEGMENT arrives again".to_owned(), true),
    };
    let _ = reports.try_send((number, Report::Event(Event::Notice { message, well })));
}
