//! AF_XDP sockets with queued packets, and the round robin between the queues of a device.

use std::collections::VecDeque;

use crate::xsk::{Held, Kick, Packet, Pool, Socket};

/// An AF_XDP socket.
pub(super) struct XskPort {
    socket: Socket,
    /// Frames to keep in the fill ring.
    fill: u32,
    /// Whether the pool had too few frames for the fill ring. An empty fill ring receives nothing, so no event would
    /// cause a refill.
    is_short: bool,
    pending: VecDeque<Packet>,
    /// Losses that are already counted.
    losses: u64,
    /// Whether there are packets that the kernel may not have sent yet.
    unsent: bool,
}

impl XskPort {
    /// Fills the fill ring with `fill` frames, and wakes the driver.
    pub(super) fn new(socket: Socket, fill: u32, pool: &mut Pool) -> Self {
        let pending = VecDeque::with_capacity(super::BATCH);
        let mut port = Self { socket, fill, is_short: false, pending, losses: 0, unsent: false };
        port.restock(pool);
        port.socket.start();
        port
    }

    /// Receives at most `max` packets, and refills the fill ring.
    pub(super) fn receive(&mut self, packets: &mut Vec<Packet>, max: usize, pool: &mut Pool) -> usize {
        let received = self.socket.recv(packets, max);
        if received > 0 {
            self.restock(pool);
        }
        received
    }

    fn restock(&mut self, pool: &mut Pool) {
        self.socket.fill(pool, self.fill);
        self.socket.wake_rx();
        self.is_short = pool.free() == 0;
    }

    /// Queues one packet for [`XskPort::flush`]; returns it if the ring is full.
    pub(super) fn transmit(&mut self, packet: Packet, pool: &mut Pool) -> Result<(), Packet> {
        if self.pending.len() >= self.socket.room() {
            self.flush(pool);
            if self.socket.room() == 0 {
                return Err(packet);
            }
        }
        self.pending.push_back(packet);
        Ok(())
    }

    /// Sends the queued packets, and takes completed frames back. Returns whether the kernel took all packets and the
    /// fill ring has all the frames that it needs. If not, call it again; no event reports when.
    pub(super) fn flush(&mut self, pool: &mut Pool) -> bool {
        let took_all = self.send(pool);
        if self.is_short {
            self.restock(pool);
        }
        took_all && !self.is_short
    }

    fn send(&mut self, pool: &mut Pool) -> bool {
        if self.pending.is_empty() && !self.unsent {
            if self.socket.in_kernel() > self.fill as usize {
                self.socket.reclaim(pool);
            }
            return true;
        }
        self.socket.send(&mut self.pending);
        self.unsent = true;
        match self.socket.kick() {
            Ok(kick) => self.unsent = kick == Kick::Again,
            Err(error) => {
                // The device is down or gone. Do not wait; the next packet tries again.
                self.unsent = false;
                tracing::debug!("{error}");
            }
        }
        self.socket.reclaim(pool);
        !self.unsent
    }

    /// Returns the number of packets that the kernel dropped since the last call, because the fill ring was empty or
    /// the receive ring full.
    pub(super) fn new_losses(&mut self) -> u64 {
        let Ok(statistics) = self.socket.statistics() else { return 0 };
        let losses = statistics.rx_ring_full + statistics.rx_dropped;
        losses - std::mem::replace(&mut self.losses, losses)
    }

    /// Closes the socket and takes its frames back, except those that a zero-copy driver may still use.
    pub(super) fn close(mut self, pool: &mut Pool) -> Option<Held> {
        // Send the queued packets first, such as a last message.
        self.flush(pool);
        for packet in self.pending {
            pool.put(packet.frame);
        }
        let closed = self.socket.close(pool);
        if closed.lost > 0 {
            tracing::debug!("{} frames are lost to the kernel", closed.lost);
        }
        closed.held
    }
}

/// The next first queue of a device in round robin.
#[derive(Debug, Default)]
pub(super) struct Turns {
    first: usize,
}

/// Maximum number of queues in round robin.
pub(super) const MAX_QUEUES: usize = u64::BITS as usize;

impl Turns {
    /// Receives up to `most` packets, or as many as there are queues, from `queues` queues by `take(queue, most)`.
    /// Returns their number, and whether there may be more. Each queue first gets an equal share; then queues with more
    /// packets get the rest. So no queue starves, and a single busy queue can fill a batch.
    pub(super) fn take(
        &mut self,
        queues: usize,
        most: usize,
        mut take: impl FnMut(usize, usize) -> usize,
    ) -> (usize, bool) {
        let queues = queues.min(MAX_QUEUES);
        if queues == 0 {
            return (0, false);
        }
        self.first = (self.first + 1) % queues;
        let order = (self.first..queues).chain(0..self.first);
        let share = (most / queues).max(1);
        let (mut taken, mut have_more) = (0, 0_u64);
        for queue in order.clone() {
            let got = take(queue, share);
            taken += got;
            have_more |= u64::from(got >= share) << queue;
        }
        for queue in order {
            let left = most.saturating_sub(taken);
            if left == 0 || have_more & 1 << queue == 0 {
                continue;
            }
            let got = take(queue, left);
            taken += got;
            if got < left {
                have_more &= !(1 << queue);
            }
        }
        (taken, have_more != 0)
    }
}

#[cfg(test)]
mod tests;
