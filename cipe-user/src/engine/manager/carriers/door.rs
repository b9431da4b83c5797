//! How a carrier device passes between the UDP sockets and AF_XDP so that no flow overtakes itself: what has come by the one is
//! read before what comes by the other.

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

/// Opens and closes devices, one after the other: workers hold back all UDP sockets for one that closes.
pub(super) struct Doors {
    platform: Arc<Platform>,
    turn: Mutex<()>,
}

impl Doors {
    /// All doors of an engine.
    pub(super) fn new(platform: Arc<Platform>) -> Self {
        Self { platform, turn: Mutex::new(()) }
    }

    /// Whether a device can be sent live frames. Of several queues a veth picks that of the CPU for them and one by the flow
    /// for what a socket sends, so that they would overtake each other.
    pub(super) fn may_send_live(&self, card: &Card) -> bool {
        let single = || card.receive_queues == 1 && ethtool::transmit_queues(card.ifindex) == Some(1);
        self.platform.sends_live && card.veth && single()
    }

    /// Has AF_XDP serve a device; `given_up`: nothing came by its zero copy.
    ///
    /// # Errors
    /// What is refused on it, in words for an operator; it stays with the UDP sockets.
    pub(super) async fn open(&self, card: Card, slot: usize, mode: XdpMode, given_up: bool) -> anyhow::Result<Carrier> {
        let _turn = self.turn.lock().await;
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

    /// Opens the queues of a device; what was got.
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
        // A datagram of ours fits a frame. What needs several is a superframe, of which nothing can be made.
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
                let mut programs = self.platform.programs();
                (0..workers.count() as u32)
                    .map(|worker| programs.live_frames(worker))
                    .collect::<Result<Vec<_>, _>>()?
                    .into_iter()
            }
            false => Vec::new().into_iter(),
        };
        let share = |worker: usize, done| {
            let sockets = std::mem::take(&mut shares[worker]);
            let carrier = NewCarrier { ifindex, sockets, traffic: traffic.clone(), live: lives.next() };
            Command::AddCarrier(slot, Box::new(carrier), done)
        };
        // Until then the program passes everything to the UDP sockets; a ring without frames would lose it.
        let taken = workers.ask_all(share);
        let set = match taken.in_time().await {
            true => self.platform.programs().set_carrier_device(ifindex, base).map_err(anyhow::Error::from),
            false => Err(anyhow::anyhow!("the workers do not take the card: the machine is too busy, or one hangs")),
        };
        if let Err(error) = set {
            workers.ask_all(|_, done| Command::RemoveCarrier(slot, done)).in_time().await;
            return Err(error);
        }
        // What was passed on before is to be read before.
        programs_over().await;
        workers.ask_all(|_, done| Command::EmptySockets(done)).in_time().await;
        workers.tell_all(|_| Command::BeginCarrier(slot));
        Ok(got)
    }

    /// Gives a device back to the UDP sockets; what its AF_XDP sockets have got is read before anything else, if a tunnel uses it.
    pub(super) async fn close(&self, ifindex: u32, slot: usize, is_used: bool) {
        let _turn = self.turn.lock().await;
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

/// Waits until no program runs any more that began before, and the kernel has handed on what such a one has passed:
/// receiving is a read-side section of RCU, and membarrier(2) waits for the end of all of those.
async fn programs_over() {
    let waited = tokio::task::spawn_blocking(|| membarrier(MembarrierCommand::Global)).await;
    if !matches!(waited, Ok(Ok(()))) {
        tracing::debug!("membarrier: {waited:?}; what comes while a door changes may be overtaken");
    }
}
