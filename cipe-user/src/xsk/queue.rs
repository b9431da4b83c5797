//! The four rings of one device queue, and the frames that the kernel holds through them. Makes no system calls, so
//! tests use it with plain memory and simulate the kernel.

use std::collections::VecDeque;

use rustix::net::xdp::{XdpDesc, XdpDescOptions};

use super::frames::{Frame, FrameSet, Packet, Pool};
use super::ring::{Consumer, Memory, Producer};
use super::umem::Layout;

/// Maximum descriptors of a packet that the kernel transmits: an skb has 17 fragments (`MAX_SKB_FRAGS`) in the default
/// configuration, and the kernel drops a packet that needs more.
const MAX_PACKET_DESCRIPTORS: usize = 17;

/// Counts of invalid descriptors. All are zero in a healthy system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Anomalies {
    /// Received descriptors outside the UMEM, or of chunks that were not given to the kernel.
    pub receive: u64,
    /// Completions of chunks that were not given to the kernel.
    pub completion: u64,
    /// Packets given to `send` that the kernel would have refused: empty, beyond their chunk, or in too many pieces.
    pub send: u64,
}

/// The rings, and the owners of their frames. `D` is the memory of descriptor rings, `A` of address rings.
pub(super) struct Queue<D, A> {
    layout: Layout,
    multi_buffer: bool,
    receive: Option<Consumer<D>>,
    transmit: Option<Producer<D>>,
    fill: Producer<A>,
    completion: Consumer<A>,
    /// Frames given to the kernel to receive into.
    filled: FrameSet,
    /// Frames given to the kernel to transmit from.
    sending: FrameSet,
    /// Frames of dropped packets, until the next call with a pool.
    stray: Vec<Frame>,
    /// The packet that `recv` is assembling; empty between calls.
    parts: Vec<Packet>,
    pub(super) anomalies: Anomalies,
}

impl<D: Memory<Slot = XdpDesc>, A: Memory<Slot = u64>> Queue<D, A> {
    pub(super) fn new(
        layout: Layout,
        multi_buffer: bool,
        receive: Option<D>,
        transmit: Option<D>,
        fill: A,
        completion: A,
    ) -> Self {
        Self {
            layout,
            multi_buffer,
            receive: receive.map(Consumer::new),
            transmit: transmit.map(Producer::new),
            fill: Producer::new(fill),
            completion: Consumer::new(completion),
            filled: FrameSet::new(layout),
            sending: FrameSet::new(layout),
            stray: Vec::new(),
            parts: Vec::new(),
            anomalies: Anomalies::default(),
        }
    }

    pub(super) fn fill(&mut self, pool: &mut Pool, want: u32) -> usize {
        assert_eq!(pool.layout(), self.layout, "a socket was used with another UMEM's pool");
        let missing = want.saturating_sub(self.fill.pending()).min(self.fill.free(want));
        let mut filled = 0;
        for _ in 0..missing {
            let Some(frame) = self.stray.pop().or_else(|| pool.take()) else { break };
            let pushed = self.fill.push(self.filled.put(frame));
            debug_assert!(pushed, "`missing` slots were free");
            filled += 1;
        }
        if filled > 0 {
            self.fill.submit();
        }
        filled
    }

    pub(super) fn recv(&mut self, out: &mut impl Extend<Packet>, max: usize) -> usize {
        let Some(ring) = self.receive.as_mut().filter(|_| max > 0) else { return 0 };
        let available = ring.available();
        let more = |n| ring.peek(n).options.contains(XdpDescOptions::XDP_PKT_CONTD);
        // Takes whole packets only: up to the first descriptor at or behind `max` that ends a packet.
        let mut whole = 0;
        for n in 0..available {
            if whole as usize >= max {
                break;
            }
            if !more(n) {
                whole = n + 1;
            }
        }
        if whole == 0 && available == ring.slots() {
            // A packet without an end fills the ring, so its end can never arrive.
            whole = available;
        }
        let mut received = 0;
        let mut good = true;
        for n in 0..whole {
            let descriptor = ring.peek(n);
            let more = descriptor.options.contains(XdpDescOptions::XDP_PKT_CONTD);
            match self.filled.take(descriptor.addr) {
                Some((frame, offset)) => {
                    good &= fits(self.layout, offset, descriptor.len);
                    self.parts.push(Packet { frame, offset, len: descriptor.len, more });
                }
                None => good = false,
            }
            if more && n + 1 < whole {
                continue;
            }
            if good && !more {
                received += self.parts.len();
                out.extend(self.parts.drain(..));
            } else {
                self.anomalies.receive += 1;
                self.stray.extend(self.parts.drain(..).map(|part| part.frame));
            }
            good = true;
        }
        if whole > 0 {
            ring.release(whole);
        }
        received
    }

    pub(super) fn send(&mut self, packets: &mut VecDeque<Packet>) -> usize {
        let Some(ring) = &mut self.transmit else { return 0 };
        let limit = if self.multi_buffer { MAX_PACKET_DESCRIPTORS.min(ring.slots() as usize) } else { 1 };
        let mut sent = 0;
        while let Some(end) = packets.iter().position(|part| !part.more) {
            let parts = end + 1;
            let good =
                parts <= limit && packets.range(..parts).all(|p| p.len > 0 && fits(self.layout, p.offset, p.len));
            if !good {
                self.anomalies.send += 1;
                self.stray.extend(packets.drain(..parts).map(|part| part.frame));
                continue;
            }
            if (ring.free(parts as u32) as usize) < parts {
                break;
            }
            for Packet { frame, offset, len, more } in packets.drain(..parts) {
                let options = if more { XdpDescOptions::XDP_PKT_CONTD } else { XdpDescOptions::empty() };
                let addr = self.sending.put(frame) + u64::from(offset);
                let pushed = ring.push(XdpDesc { addr, len, options });
                debug_assert!(pushed, "`parts` slots were free");
            }
            sent += parts;
        }
        if sent > 0 {
            ring.submit();
        }
        sent
    }

    pub(super) fn reclaim(&mut self, pool: &mut Pool) -> usize {
        let available = self.completion.available();
        let mut reclaimed = self.stray.len();
        self.stray.drain(..).for_each(|frame| pool.put(frame));
        for n in 0..available {
            match self.sending.take(self.completion.peek(n)) {
                Some((frame, _)) => {
                    pool.put(frame);
                    reclaimed += 1;
                }
                None => self.anomalies.completion += 1,
            }
        }
        if available > 0 {
            self.completion.release(available);
        }
        reclaimed
    }

    /// Returns the number of transmit descriptors that the kernel has not picked up.
    pub(super) fn unsent(&mut self) -> u32 {
        self.transmit.as_mut().map_or(0, Producer::pending)
    }

    /// Free slots of the transmit ring.
    pub(super) fn room(&mut self) -> usize {
        self.transmit.as_mut().map_or(0, |ring| ring.free(ring.slots()) as usize)
    }

    pub(super) fn transmit_sleeps(&self) -> bool {
        self.transmit.as_ref().is_some_and(Producer::needs_wakeup)
    }

    pub(super) fn fill_sleeps(&self) -> bool {
        self.fill.needs_wakeup()
    }

    pub(super) fn in_kernel(&self) -> usize {
        self.filled.len() + self.sending.len() + self.stray.len()
    }

    /// Returns the number of transmit frames that are not completed.
    pub(super) fn sending(&self) -> usize {
        self.sending.len()
    }

    /// Removes the rings and returns all frames: a zero-copy driver, or another owner of the socket, may still use each
    /// of them.
    pub(super) fn abandon(mut self) -> Vec<Frame> {
        drop((self.receive, self.transmit, self.fill, self.completion));
        self.stray.into_iter().chain(self.filled.take_all()).chain(self.sending.take_all()).collect()
    }

    /// Removes the rings and returns the frames that the kernel may still use: the transmit frames that it has picked
    /// up and not completed. A closed socket receives nothing, so there are no receive frames among them.
    ///
    /// `socket` is the only descriptor of the socket. It is closed after the rings are read for the last time, and
    /// before their frames are used again.
    pub(super) fn dismantle(mut self, pool: &mut Pool, socket: impl Sized) -> FrameSet {
        let unsent: Vec<u64> =
            self.transmit.iter_mut().flat_map(|ring| ring.unconsumed().map(|d| d.addr).collect::<Vec<_>>()).collect();
        drop((self.receive, self.transmit, self.fill, self.completion));
        drop(socket);
        for address in unsent {
            if let Some((frame, _)) = self.sending.take(address) {
                pool.put(frame);
            }
        }
        self.stray.into_iter().chain(self.filled.take_all()).for_each(|frame| pool.put(frame));
        self.sending
    }
}

/// Whether `len` octets from `offset` on are inside a chunk.
fn fits(layout: Layout, offset: u32, len: u32) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= layout.frame_size)
}
