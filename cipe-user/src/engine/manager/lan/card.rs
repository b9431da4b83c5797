//! How a LAN card gets AF_XDP sockets for its short cut, and loses them.

use std::collections::BTreeSet;

use cipe_common::maps::{LAN_QUEUES, Lan as LanEntry};

use crate::engine::manager::copying::{Copying, Got};
use crate::engine::manager::platform::{Platform, log_failure};
use crate::engine::manager::workers::share_of;
use crate::engine::worker::Command;
use crate::kernel::bpf::{AttachedMode, XdpMode};
use crate::kernel::links::Card;
use crate::xsk::{Injector, MultiBuffer, SocketConfig};

/// A LAN card with a short cut.
pub(crate) struct LanCard {
    pub card: Card,
    /// Index in the worker's table, and of its first socket in the map when multiplied by [`LAN_QUEUES`].
    pub slot: usize,
    pub flags: u32,
    /// The tunnels that use it.
    pub tunnels: BTreeSet<u16>,
    /// The modes got, for people.
    pub note: String,
}

impl LanCard {
    /// Its entry in the programs' map.
    pub(crate) fn entry(&self) -> LanEntry {
        LanEntry {
            sockets: self.slot as u32 * LAN_QUEUES,
            flags: self.flags,
            mac: self.card.mac.unwrap_or_default(),
            ..LanEntry::default()
        }
    }
}

/// Opens AF_XDP sockets on a card.
///
/// # Errors
/// The operation that was refused; nothing stays open.
pub(super) async fn open(platform: &Platform, card: Card, slot: usize, mode: XdpMode) -> anyhow::Result<LanCard> {
    let (ifindex, name) = (card.ifindex, card.name.clone());
    let mode = platform.programs().attach_lan(ifindex, mode)?;
    let flags = if matches!(mode, AttachedMode::Generic { .. }) { LanEntry::GENERIC } else { 0 };
    let queues = card.receive_queues.clamp(1, LAN_QUEUES);
    let copying = Copying::of(&card, flags == LanEntry::GENERIC, platform.frame_size(), false);
    let copying = match open_queues(platform, ifindex, slot, queues, copying).await {
        Ok(copying) => copying,
        Err(error) => {
            platform.programs().detach_lan(ifindex);
            return Err(error);
        }
    };
    let note = format!("{name}: short cut, {mode} XDP, {copying}, {queues} queue(s)");
    let lan = LanCard { card, slot, flags, tunnels: BTreeSet::new(), note };
    let set = platform.programs().set_lan_device(ifindex, lan.entry());
    if let Err(error) = set {
        shut(platform, ifindex, slot);
        return Err(error.into());
    }
    Ok(lan)
}

/// Opens a socket on each queue of a card; returns the copy mode that the kernel granted, for people.
async fn open_queues(
    platform: &Platform,
    ifindex: u32,
    slot: usize,
    queues: u32,
    copying: Copying,
) -> anyhow::Result<String> {
    let mut sockets = Vec::new();
    // A packet in several frames is larger than a tunnel takes, and the program does not redirect it.
    let multi_buffer = MultiBuffer::Wanted;
    let config = SocketConfig { mode: copying.mode, multi_buffer, ..SocketConfig::default() };
    for queue in 0..queues {
        let socket = platform.bind_queue(ifindex, queue, config).await?;
        platform.programs().set_lan_socket(slot as u32 * LAN_QUEUES + queue, &socket)?;
        sockets.push(socket);
    }
    let got = Got::of(&sockets);
    let zero_copy = got.zero_copy == got.queues;
    let count = platform.workers.count();
    let injectors = (0..count).map(|_| Injector::open(ifindex)).collect::<Result<Vec<_>, _>>()?;
    let mut shares = share_of(sockets, count).into_iter().zip(injectors);
    // Until the workers have filled the rings, the program redirects nothing: an empty ring drops packets.
    let taken = platform.workers.ask_all(|_, done| {
        let (sockets, injector) = shares.next().expect("a share for each worker");
        Command::AddLan(slot, sockets, injector, !zero_copy, done)
    });
    if !taken.in_time().await {
        // The workers carry it out after the other command.
        platform.workers.tell_all(|_| Command::RemoveLan(slot));
        anyhow::bail!("the workers do not take the card: the machine is too busy, or one hangs");
    }
    Ok(copying.note(got))
}

/// Closes a card. The workers close its sockets later; until then the kernel keeps its queues busy.
pub(super) fn shut(platform: &Platform, ifindex: u32, slot: usize) {
    log_failure(platform.programs().remove_lan_device(ifindex));
    platform.programs().detach_lan(ifindex);
    platform.workers.tell_all(|_| Command::RemoveLan(slot));
}
