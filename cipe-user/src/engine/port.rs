//! AF_XDP sockets with the packets that wait for their transmit rings, and the turns that the queues of a device take.

use std::collections::VecDeque;

use crate::xsk::{Held, Kick, Packet, Pool, Socket};

/// One such socket.
pub(super) struct XskPort {
    socket: Socket,
    /// Frames to keep in the fill ring.
    fill: u32,
    /// The pool had no more frames for the fill ring. A ring that is empty receives nothing that would be an occasion to
    /// fill it.
    is_short: bool,
    pending: VecDeque<Packet>,
    /// Losses that were counted already.
    losses: u64,
    /// Packets handed to the kernel that it may not have sent yet.
    unsent: bool,
}

impl XskPort {
    /// Stocks the fill ring with `fill` frames, and wakes the driver for them.
    pub(super) fn new(socket: Socket, fill: u32, pool: &mut Pool) -> Self {
        let pending = VecDeque::with_capacity(super::BATCH);
        let mut port = Self { socket, fill, is_short: false, pending, losses: 0, unsent: false };
        port.restock(pool);
        port.socket.start();
        port
    }

    /// Takes what arrived, at most `max` packets, and restocks the fill ring.
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

    /// Queues one packet for [`XskPort::flush`], or gives it back when the ring has no room left.
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

    /// Hands the waiting packets to the kernel and takes back the frames that it is done with; whether it took all, and has
    /// the frames that it wants to receive into. Otherwise it is to be called again, without an event that would tell when.
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
                // The device is down or gone: no waiting helps, and the next packet tries again.
                self.unsent = false;
                tracing::debug!("{error}");
            }
        }
        self.socket.reclaim(pool);
        !self.unsent
    }

    /// Packets that the kernel dropped for want of a frame or of room in the receive ring, since the last call.
    pub(super) fn new_losses(&mut self) -> u64 {
        let Ok(statistics) = self.socket.statistics() else { return 0 };
        let losses = statistics.rx_ring_full + statistics.rx_dropped;
        losses - std::mem::replace(&mut self.losses, losses)
    }

    /// Closes the socket and takes its frames back, but for those that a zero-copy driver may still use.
    pub(super) fn close(mut self, pool: &mut Pool) -> Option<Held> {
        // What waits still goes out: a farewell, for one.
        self.flush(pool);
        for packet in self.pending {
            pool.put(packet.frame);
        }
        let closed = self.socket.close(pool);
        if closed.lost > 0 {
            tracing::debug!("{} frames stayed with the kernel", closed.lost);
        }
        closed.held
    }
}

/// Which of the queues of a device is asked first.
#[derive(Debug, Default)]
pub(super) struct Turns {
    first: usize,
}

/// Queues that can take turns, at most.
pub(super) const MOST_QUEUES: usize = u64::BITS as usize;

impl Turns {
    /// Takes up to `most` packets, or as many as there are queues, from `queues` queues by `take(queue, most)`, and returns
    /// how many, and whether there may be more. Each has an equal share first, then those that have more fill what the
    /// others left: none starves, and one alone fills a batch.
    pub(super) fn take(
        &mut self,
        queues: usize,
        most: usize,
        mut take: impl FnMut(usize, usize) -> usize,
    ) -> (usize, bool) {
        let queues = queues.min(MOST_QUEUES);
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
