//! How a hub gets its programs and its AF_XDP sockets.

use std::sync::Arc;

use cipe_common::maps::{PRIVATE_QUEUES, private_socket_index};

use super::super::platform::Platform;
use super::super::workers::share_of;
use crate::engine::worker::Command;
use crate::kernel::bpf::{Ends, XdpMode};
use crate::kernel::ethtool::{self, Offloads};
use crate::kernel::features::Feature;
use crate::kernel::hub::{Framing, Hub};
use crate::xsk::{Injector, Mode, SocketConfig};

/// The result of opening the hub in a slot: the modes got, for people.
pub(crate) struct Opened {
    pub slot: usize,
    pub note: anyhow::Result<String>,
}

/// Opens a hub; this waits up to 2 s for each queue that is busy, so it is a job.
///
/// # Errors
/// The kernel refuses it. Its removal takes back what was done.
pub(super) async fn open(platform: Arc<Platform>, slot: usize, hub: Hub, wanted: XdpMode) -> anyhow::Result<String> {
    let (ends, requested) = match (hub.framing, wanted) {
        (Framing::Superframes, _) => (Ends::Hub, XdpMode::Generic),
        (Framing::SingleFrames, _) => (Ends::Hub, XdpMode::Native),
        (Framing::Ethernet, XdpMode::Native) => (Ends::Ethernet, XdpMode::Native),
        (Framing::Ethernet, XdpMode::Auto | XdpMode::Generic) => (Ends::Ethernet, XdpMode::Generic),
    };
    // The program stamps what the engine is to segment, so it is attached first.
    let takes_superframes = framing(&platform, wanted) == Framing::Superframes;
    let mode = platform.programs().attach_private(ends, hub.index, hub.hidden_index, requested)?;
    if ends == Ends::Ethernet && takes_superframes {
        ethtool::set_offloads(&hub.name, hub.index, Offloads::SUPERFRAMES)?;
    }
    let mut sockets = Vec::new();
    // A hub that another engine made may have more or fewer queues than there are workers now.
    let queues = platform.netlink.card(hub.hidden_index).await?.receive_queues.clamp(1, PRIVATE_QUEUES);
    let queues = if requested == XdpMode::Generic && queues > 1 { queues - 1 } else { queues };
    for queue in 0..queues {
        // No veth has zero copy: asking for it costs a bind that fails.
        let config = SocketConfig { mode: Mode::Copy, ..SocketConfig::default() };
        let socket = platform.bind_queue(hub.hidden_index, queue, config).await?;
        platform.programs().set_private_socket(private_socket_index(slot as u32, queue), &socket)?;
        sockets.push(socket);
    }
    let count = platform.workers.count();
    let injectors = (0..count).map(|_| Injector::open(hub.hidden_index)).collect::<Result<Vec<_>, _>>()?;
    let note = format!("private side: {mode} XDP, {count} worker(s)");
    // A worker gets the hub before the first tunnel on it, and no tunnel is alive before all workers have it.
    let mut shares = share_of(sockets, count).into_iter().zip(injectors);
    platform.workers.tell_all(|_| {
        let (sockets, injector) = shares.next().expect("there is a share for each worker");
        Command::AddHub(slot, sockets, injector, ends)
    });
    tracing::info!("{}: {note}", hub.name);
    Ok(note)
}

/// The frames that the engine takes from a tunnel's device. Native XDP takes no superframes; generic XDP does, and the engine cuts
/// them at less cost than the kernel, unless AF_XDP takes no frame larger than a descriptor.
pub(super) fn framing(platform: &Platform, mode: XdpMode) -> Framing {
    match mode {
        _ if platform.lacks.contains(&Feature::MultiBuffer) => Framing::SingleFrames,
        XdpMode::Native => Framing::SingleFrames,
        XdpMode::Auto | XdpMode::Generic => Framing::Superframes,
    }
}
