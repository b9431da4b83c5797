//! An AF_XDP socket with the packets that wait for its transmit ring.

use std::collections::VecDeque;

use crate::xsk::{Kick, Packet, Pool, Socket};

/// Frames that wait in a fill ring for packets to come.
const FILL: u32 = 1024;

pub struct Port {
    socket: Socket,
    pending: VecDeque<Packet>,
    /// Packets handed to the kernel that it may not have sent yet.
    unsent: bool,
}

impl Port {
    pub fn new(mut socket: Socket, pool: &mut Pool) -> Self {
        socket.fill(pool, FILL);
        Self { socket, pending: VecDeque::with_capacity(super::BATCH), unsent: false }
    }

    /// Takes what arrived, at most `max` packets, and restocks the fill ring.
    pub fn receive(&mut self, packets: &mut Vec<Packet>, max: usize, pool: &mut Pool) -> usize {
        let received = self.socket.recv(packets, max);
        if received > 0 {
            self.socket.fill(pool, FILL);
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

    /// Hands the waiting packets to the kernel and takes back the frames that it is done with.
    pub fn flush(&mut self, pool: &mut Pool) {
        if self.pending.is_empty() && !self.unsent {
            return;
        }
        self.socket.send(&mut self.pending);
        self.unsent = true;
        match self.socket.kick() {
            Ok(kick) => self.unsent = kick == Kick::Again,
            Err(error) => tracing::debug!("{error}"),
        }
        self.socket.reclaim(pool);
    }

    /// Closes the socket and takes its frames back.
    pub fn close(self, pool: &mut Pool) {
        for packet in self.pending {
            pool.put(packet.frame);
        }
        let closed = self.socket.close(pool);
        if closed.lost > 0 {
            tracing::debug!("{} frames stayed with the kernel", closed.lost);
        }
    }
}
