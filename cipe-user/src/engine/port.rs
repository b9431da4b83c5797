//! An AF_XDP socket with the packets that wait for its transmit ring.

use std::collections::VecDeque;

use crate::xsk::{Kick, Packet, Pool, Socket};

/// One such socket.
pub struct Port {
    socket: Socket,
    /// Frames to keep in the fill ring.
    fill: u32,
    pending: VecDeque<Packet>,
    /// Losses that were counted already.
    losses: u64,
    /// Packets handed to the kernel that it may not have sent yet.
    unsent: bool,
}

impl Port {
    /// Stocks the fill ring with `fill` frames.
    pub fn new(mut socket: Socket, fill: u32, pool: &mut Pool) -> Self {
        socket.fill(pool, fill);
        Self { socket, fill, pending: VecDeque::with_capacity(super::BATCH), losses: 0, unsent: false }
    }

    /// Takes what arrived, at most `max` packets, and restocks the fill ring.
    pub fn receive(&mut self, packets: &mut Vec<Packet>, max: usize, pool: &mut Pool) -> usize {
        let received = self.socket.recv(packets, max);
        if received > 0 {
            self.socket.fill(pool, self.fill);
            self.socket.wake_rx();
        }
        received
    }

    /// Queues one packet for [`Port::flush`], or gives it back when the ring has no room left.
    pub fn transmit(&mut self, packet: Packet, pool: &mut Pool) -> Result<(), Packet> {
        if self.pending.len() >= self.socket.room() {
            self.flush(pool);
            if self.socket.room() == 0 {
                return Err(packet);
            }
        }
        self.pending.push_back(packet);
        Ok(())
    }

    /// Hands the waiting packets to the kernel and takes back the frames that it is done with; whether it took all.
    pub fn flush(&mut self, pool: &mut Pool) -> bool {
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
    pub fn new_losses(&mut self) -> u64 {
        let Ok(statistics) = self.socket.statistics() else { return 0 };
        let losses = statistics.rx_ring_full + statistics.rx_dropped;
        losses - std::mem::replace(&mut self.losses, losses)
    }

    /// Closes the socket and takes its frames back.
    pub fn close(mut self, pool: &mut Pool) {
        // What waits still goes out: a farewell, for one.
        self.flush(pool);
        for packet in self.pending {
            pool.put(packet.frame);
        }
        let closed = self.socket.close(pool);
        if closed.lost > 0 {
            tracing::debug!("{} frames stayed with the kernel", closed.lost);
        }
    }
}
