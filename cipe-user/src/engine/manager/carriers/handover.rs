//! The handover of a carrier device between the UDP sockets and AF_XDP. It keeps the order of each flow: all datagrams that came by
//! the one are read before those that come by the other.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use cipe_common::maps::CARRIER_QUEUES;
use rustix::thread::{MembarrierCommand, membarrier};
use tokio::sync::Mutex;

use super::carrier::Carrier;
use crate::engine::carrier::Traffic;
use crate::engine::manager::copying::{Copying, Got};
use crate::engine::manager::platform::Platform;
use crate::engine::manager::workers::share_of;
use crate::engine::worker::{Command, NewCarrier};
use crate::kernel::bpf::{AttachedMode, XdpMode};
use crate::kernel::links::{Card, CardKind};
use crate::kernel::{ethtool, netdev};
use crate::xsk::{Mode, MultiBuffer, SocketConfig};

/// Opens and closes devices, one at a time: while a device is closed, the workers hold back all UDP sockets.
pub(super) struct Handover {
    platform: Arc<Platform>,
    one_at_a_time: Mutex<()>,
}

impl Handover {
    /// For all carrier devices of an engine.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self { platform, one_at_a_time: Mutex::new(()) }
    }

    /// Whether live frames can be sent on a device. With several queues a veth queues live frames by CPU and a socket's datagrams by
    /// flow, so that a flow would be reordered.
    pub(super) fn may_send_live(&self, card: &Card) -> bool {
        let single = || card.receive_queues == 1 && ethtool::transmit_queues(card.ifindex) == Some(1);
        self.platform.sends_live && card.veth && single()
    }

    /// Opens AF_XDP sockets on a device; `given_up`: without zero copy, by which nothing came.
    ///
    /// # Errors
    /// The operation that was refused, in words for an operator; the UDP sockets go on serving the device.
    pub(super) async fn open(&self, card: Card, slot: usize, mode: XdpMode, given_up: bool) -> anyhow::Result<Carrier> {
        let _turn = self.one_at_a_time.lock().await;
        let platform = &self.platform;
        let ifindex = card.ifindex;
        if card.kind != CardKind::Ethernet {
            anyhow::bail!("{}: no Ethernet device, so AF_XDP cannot send on it", card.name);
        }
        let queues = card.receive_queues.clamp(1, CARRIER_QUEUES);
        let traffic = Arc::default();
        let mode = platform.programs().attach_carrier(ifindex, mode)?;
        let generic = mode != AttachedMode::Native;
        let may_live = self.may_send_live(&card) && !generic;
        let copying = Copying::of(&card, generic, platform.frame_size(), given_up);
        let got = match self.open_queues(ifindex, slot, queues, &traffic, may_live, copying.mode).await {
            Ok(got) => got,
            Err(error) => {
                platform.programs().detach_carrier(ifindex);
                return Err(error);
            }
        };
        let zero_copy = got.zero_copy == got.queues;
        let can_live = may_live && !zero_copy;
        let program = platform.netlink.attached(ifindex).await.map_or_else(
            |error| {
                tracing::debug!("{error}; that the program is detached will not be seen");
                None
            },
            |(program, _)| program,
        );
        Ok(Carrier {
            zero_copy,
            slot,
            note: format!("{}: {mode} XDP, {}, {queues} queue(s)", card.name, copying.note(got)),
            tunnels: BTreeSet::new(),
            program,
            name: card.name,
            generic,
            superframes: card.superframes,
            can_live,
            takes_live: can_live && netdev::takes_xdp_frames(ifindex),
            traffic,
            opened: Instant::now(),
            some_zero_copy: got.zero_copy > 0,
        })
    }

    /// Opens a socket on each queue of a device; returns the modes that the kernel granted.
    async fn open_queues(
        &self,
        ifindex: u32,
        slot: usize,
        queues: u32,
        traffic: &Arc<Traffic>,
        live: bool,
        mode: Mode,
    ) -> anyhow::Result<Got> {
        let Platform { workers, .. } = &*self.platform;
        let base = slot as u32 * CARRIER_QUEUES;
        let mut sockets = Vec::new();
        // A datagram for this host fits one frame. A packet in several frames is a superframe, which AF_XDP cannot take apart.
        let config = SocketConfig { mode, multi_buffer: MultiBuffer::Wanted, ..SocketConfig::default() };
        for queue in 0..queues {
            let socket = self.platform.bind_queue(ifindex, queue, config).await?;
            self.platform.programs().set_carrier_socket(base + queue, &socket)?;
            sockets.push(socket);
        }
        let got = Got::of(&sockets);
        let mut shares = share_of(sockets, workers.count());
        let mut lives = match live {
            true => {
                let programs = self.platform.programs();
                let handles = (0..workers.count() as u32).filter_map(|worker| programs.live_frames(worker));
                handles.collect::<Vec<_>>().into_iter()
            }
            false => Vec::new().into_iter(),
        };
        let share = |worker: usize, done| {
            let sockets = std::mem::take(&mut shares[worker]);
            let carrier = NewCarrier { ifindex, sockets, traffic: traffic.clone(), live: lives.next() };
            Command::AddCarrier(slot, Box::new(carrier), done)
        };
        // Until the workers have filled the rings, the program passes all datagrams to the UDP sockets: an empty ring drops them.
        let taken = workers.ask_all(share);
        let set = match taken.in_time().await {
            true => self.platform.programs().set_carrier_device(ifindex, base).map_err(anyhow::Error::from),
            false => Err(anyhow::anyhow!("the workers do not take the card: the machine is too busy, or one hangs")),
        };
        if let Err(error) = set {
            workers.ask_all(|_, done| Command::RemoveCarrier(slot, done)).in_time().await;
            return Err(error);
        }
        // The datagrams that were passed to the UDP sockets before are read first.
        programs_over().await;
        workers.ask_all(|_, done| Command::EmptySockets(done)).in_time().await;
        workers.tell_all(|_| Command::BeginCarrier(slot));
        Ok(got)
    }

    /// Gives a device back to the UDP sockets. If a tunnel uses it, its AF_XDP sockets are read out before any other socket.
    pub(super) async fn close(&self, ifindex: u32, slot: usize, is_used: bool) {
        let _turn = self.one_at_a_time.lock().await;
        let Platform { workers, .. } = &*self.platform;
        if is_used {
            workers.ask_all(|_, done| Command::HoldSockets(true, done)).in_time().await;
        }
        if let Err(error) = self.platform.programs().remove_carrier_device(ifindex) {
            tracing::debug!("{error}");
        }
        if is_used {
            programs_over().await;
        }
        workers.ask_all(|_, done| Command::RemoveCarrier(slot, done)).in_time().await;
        if is_used {
            workers.ask_all(|_, done| Command::HoldSockets(false, done)).in_time().await;
        }
        self.platform.programs().detach_carrier(ifindex);
    }
}

/// Waits until all program runs that have begun are over, and the kernel has delivered the packets that they passed: receiving is a
/// read-side section of RCU, and membarrier(2) waits for the end of all of those.
async fn programs_over() {
    let waited = tokio::task::spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
    if !matches!(waited, Ok(Ok(()))) {
        tracing::debug!("membarrier: {waited:?}; datagrams that come while a door changes may be reordered");
    }
}
