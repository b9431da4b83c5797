//! The means of all rooms and jobs: netlink, the eBPF programs, the workers, and the memory of their frames.

use std::sync::{Mutex, MutexGuard};

use anyhow::Context as _;
use cipe_common::Verdict;

use super::workers::Workers;
use crate::control::protocol::Protocol;
use crate::engine::{frames, locked};
use crate::kernel::bpf::Programs;
use crate::kernel::features::Feature;
use crate::kernel::netlink::Netlink;
use crate::xsk::{MultiBuffer, Socket, SocketConfig, Umem};

/// Shared by the rooms and by the jobs that they start.
pub(super) struct Platform {
    // Dropped first, so that no program hands a packet to a worker that has ended.
    programs: Mutex<Programs>,
    pub netlink: Netlink,
    pub workers: Workers,
    umem: Umem,
    /// Live frames can be sent from the frames' memory.
    pub sends_live: bool,
    /// Features that the kernel lacks.
    pub lacks: Vec<Feature>,
}

impl Platform {
    /// `sends_live`: the memory of the frames is a map's.
    pub(super) fn new(
        programs: Programs,
        netlink: Netlink,
        workers: Workers,
        (umem, sends_live): (Umem, bool),
        lacks: Vec<Feature>,
    ) -> Self {
        Self { programs: Mutex::new(programs), netlink, workers, umem, sends_live, lacks }
    }

    /// The programs and their maps; never held while something is waited for.
    pub(super) fn programs(&self) -> MutexGuard<'_, Programs> {
        locked(&self.programs)
    }

    /// The programs' counts of a tunnel's dropped packets, by verdict; `None` if they cannot be read, which is logged.
    pub(super) fn verdicts(&self, number: u16) -> Option<[u64; Verdict::COUNT]> {
        self.programs().verdicts(number.into()).inspect_err(|error| tracing::warn!("{error}")).ok()
    }

    /// The size of a frame, in octets.
    pub(super) fn frame_size(&self) -> u32 {
        self.umem.frame_size()
    }

    /// The largest MTU of a tunnel of this protocol that the frames have room for, in octets.
    pub(super) fn largest_mtu(&self, protocol: Protocol) -> usize {
        frames::largest_mtu(self.frame_size()) as usize - protocol.header()
    }

    /// Does in advance what takes longest in [binding](Self::bind_queue) a socket of this configuration.
    pub(super) fn prepare_queue(&self, config: SocketConfig) {
        self.umem.prepare(&self.possible(config));
    }

    fn possible(&self, mut config: SocketConfig) -> SocketConfig {
        if self.lacks.contains(&Feature::MultiBuffer) {
            config.multi_buffer = MultiBuffer::No;
        }
        config
    }

    /// Binds an AF_XDP socket on a thread of its own: it may wait 2 s for a queue that is busy.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub(super) async fn bind_queue(&self, ifindex: u32, queue: u32, config: SocketConfig) -> anyhow::Result<Socket> {
        let (umem, config) = (self.umem.clone(), self.possible(config));
        let bound = tokio::task::spawn_blocking(move || Socket::bind(&umem, ifindex, queue, config));
        Ok(bound.await.context("binding an AF_XDP socket was broken off")??)
    }
}

/// Logs a failure that does not stop what is under way.
pub(super) fn log_failure<E: std::fmt::Display>(result: Result<(), E>) {
    if let Err(error) = result {
        tracing::warn!("{error}");
    }
}
