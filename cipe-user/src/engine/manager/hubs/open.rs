//! How a hub gets its programs and its AF_XDP sockets.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use cipe_common::maps::{PRIVATE_QUEUES, private_socket_index};

use super::super::platform::Platform;
use super::super::workers::share_of;
use super::handover::Former;
use crate::control::protocol::HubPart;
use crate::engine::worker::Command;
use crate::kernel::bpf::{AttachedMode, Ends, PairLinks, XdpMode};
use crate::kernel::ethtool::{self, Offloads};
use crate::kernel::features::Feature;
use crate::kernel::hub::{Framing, Hub};
use crate::xsk::{Injector, Mode, SocketConfig};

/// The result of opening the hub in a slot.
pub(crate) struct Opened {
    pub slot: usize,
    pub hub: anyhow::Result<OpenHub>,
}

/// What is known of an open hub.
pub(crate) struct OpenHub {
    /// The modes got, for people.
    pub note: String,
    /// The mode in which its programs are attached.
    pub mode: XdpMode,
    /// Descriptors of its sockets, for an engine that takes the place of this one.
    pub sockets: Vec<(HubPart, OwnedFd)>,
}

/// The sockets of a hub. No veth has zero copy: asking for it costs a bind that fails.
pub(crate) const QUEUE: SocketConfig = SocketConfig { mode: Mode::Copy, ..SocketConfig::USUAL };

/// The programs that are on a hub while it is opened.
enum Attachment {
    Own(AttachedMode),
    /// Those of the engine before this one.
    Former(PairLinks),
}

/// Opens a hub; this waits up to 2 s for each queue that is busy, so it is a job. `former`: what the engine before this one has left.
///
/// # Errors
/// The kernel refuses it. Its removal takes back what was done.
pub(super) async fn open(
    platform: Arc<Platform>,
    (slot, hub): (usize, Hub),
    former: Option<Former>,
    wanted: XdpMode,
) -> anyhow::Result<OpenHub> {
    let (ends, requested) = match (hub.framing, wanted) {
        (Framing::Superframes, _) => (Ends::Hub, XdpMode::Generic),
        (Framing::SingleFrames, _) => (Ends::Hub, XdpMode::Native),
        (Framing::Ethernet, XdpMode::Native) => (Ends::Ethernet, XdpMode::Native),
        (Framing::Ethernet, XdpMode::Auto | XdpMode::Generic) => (Ends::Ethernet, XdpMode::Generic),
    };
    // The program stamps what the engine is to segment, so it is attached first.
    let takes_superframes = framing(&platform, wanted) == Framing::Superframes;
    let (queues, programs) = match former.filter(|former| former.mode == requested) {
        Some(Former { links, queues, closed, .. }) => {
            if let Some(mut closed) = closed {
                // It ends with an error when nobody is left to send.
                let _ = closed.changed().await;
            }
            (queues, Attachment::Former(links))
        }
        None => {
            let mode = platform.programs().attach_private(ends, hub.index, hub.hidden_index, requested)?;
            if ends == Ends::Ethernet && takes_superframes {
                ethtool::set_offloads(&hub.name, hub.index, Offloads::SUPERFRAMES)?;
            }
            // A hub that another engine made may have more or fewer queues than there are workers now.
            let queues = platform.netlink.card(hub.hidden_index).await?.receive_queues.clamp(1, PRIVATE_QUEUES);
            (if requested == XdpMode::Generic && queues > 1 { queues - 1 } else { queues }, Attachment::Own(mode))
        }
    };
    let mut sockets = Vec::new();
    for queue in 0..queues {
        let socket = platform.bind_queue(hub.hidden_index, queue, QUEUE).await?;
        platform.programs().set_private_socket(private_socket_index(slot as u32, queue), &socket)?;
        sockets.push(socket);
    }
    let count = platform.workers.count();
    let injectors = (0..count).map(|_| Injector::open(hub.hidden_index)).collect::<Result<Vec<_>, _>>()?;
    let queues = sockets.iter().map(|socket| (HubPart::Queue, socket.as_fd()));
    let others = injectors.iter().map(|injector| (HubPart::Injector, injector.as_fd()));
    let duplicate = |(part, socket): (HubPart, BorrowedFd<'_>)| Ok((part, socket.try_clone_to_owned()?));
    let held = queues.chain(others).map(duplicate).collect::<std::io::Result<Vec<_>>>()?;
    let mode = match programs {
        Attachment::Own(mode) => mode,
        // Last, since the kernel holds the lock of all devices for some milliseconds.
        Attachment::Former(links) => {
            platform.programs().take_over_private(ends, (hub.index, hub.hidden_index), requested, links)?
        }
    };
    let note = format!("private side: {mode} XDP, {count} worker(s)");
    // A worker gets the hub before the first tunnel on it, and no tunnel is alive before all workers have it.
    let mut shares = share_of(sockets, count).into_iter().zip(injectors);
    platform.workers.tell_all(|_| {
        let (sockets, injector) = shares.next().expect("there is a share for each worker");
        Command::AddHub(slot, sockets, injector, ends)
    });
    tracing::info!("{}: {note}", hub.name);
    Ok(OpenHub { note, mode: requested, sockets: held })
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
