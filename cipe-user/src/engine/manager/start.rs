//! What the engine begins with: the programs, the workers and their memory, what a dead engine left, and what is followed.

use std::sync::Arc;

use anyhow::Context as _;
use cipe_common::maps::CHUNK;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::mpsc;

use super::followers::Followers;
use super::platform::Platform;
use super::workers::{self, Workers};
use crate::engine::random::Random;
use crate::engine::report::WorkerReport;
use crate::engine::{frames, locked};
use crate::kernel::bpf::{LoadOptions, Programs, remove_leftovers};
use crate::kernel::features::{self, Feature};
use crate::kernel::hub::{Hub, Inheritance};
use crate::kernel::keys::KeyWriter;
use crate::kernel::known_bad;
use crate::kernel::netlink::Netlink;
use crate::kernel::nexthop::{NextHopTiming, NextHops};
use crate::xsk::{Umem, UmemConfig};

/// Octets of UMEM that a worker needs, and that the engine has at least; memory is used as its frames are.
const UMEM_OF_WORKER: u32 = 32 << 20;
const UMEM: u32 = 64 << 20;

/// All of it.
pub(super) struct Started {
    pub platform: Arc<Platform>,
    /// The one writer of the key slots.
    pub keys: KeyWriter,
    /// Hubs that a dead engine left, with devices on them.
    pub hubs: Vec<Hub>,
    /// Octets that no engine before had.
    pub salt: [u8; 3],
    pub next_hops: NextHops,
    pub followers: Followers,
    /// What the workers report, with the numbers of the tunnels.
    pub reports: mpsc::Receiver<(u16, WorkerReport)>,
    /// Workers that have ended.
    pub ends: mpsc::Receiver<usize>,
}

/// Starts it; `workers`: how many, `None`: as suits the cards and CPUs; `largest_mtu`: of a tunnel, in octets.
///
/// # Errors
/// One line that says what was refused, where, and how to go on: no root, no AF_XDP, no memory.
pub(super) async fn start(workers: Option<usize>, largest_mtu: u32) -> anyhow::Result<Started> {
    let netlink = Netlink::new()?;
    raise_descriptor_limit();
    let Inheritance { swept, hubs } = netlink.inherit().await?;
    for name in swept {
        tracing::info!("{name}: left by an engine that died; removed");
    }
    let count = match workers {
        Some(count) => count,
        None => workers::suitable_count(netlink.most_receive_queues(&hubs).await?),
    };
    let lacks = features::missing();
    for lack in &lacks {
        tracing::info!("this kernel lacks {lack}");
    }
    for fault in known_bad::of_running() {
        tracing::warn!("{fault}");
    }
    let debug = tracing::enabled!(tracing::Level::DEBUG);
    let frame_size = frames::frame_size(largest_mtu);
    let frames = UMEM.max(count as u32 * UMEM_OF_WORKER) / frame_size;
    let (wanted, limit) = (frames, locked::limit());
    let frames = locked::frames(wanted, frame_size, limit);
    if frames < wanted {
        tracing::warn!(
            "locked memory is limited to {} KiB, which is room for {frames} frames of {wanted}: bursts may be lost; grant \
             CAP_IPC_LOCK, or raise RLIMIT_MEMLOCK (LimitMEMLOCK= of the service)",
            limit.unwrap_or_default() >> 10
        );
    }
    let umem = UmemConfig { frames, frame_size, ..UmemConfig::default() };
    // Live frames are sent from the memory of a map; larger ones than its values are not.
    let sends_live = frame_size as usize == CHUNK;
    let chunks = if sends_live { frames } else { 1 };
    // What does not fit into one descriptor goes the kernel's way.
    let largest_frame =
        if lacks.contains(&Feature::MultiBuffer) { frames::largest_received(frame_size) } else { u32::MAX };
    let load = LoadOptions { debug, workers: count as u32, chunks, largest_frame, ..LoadOptions::default() };
    let mut programs = Programs::load(&load)?;
    for hub in &hubs {
        remove_leftovers(hub.index);
    }
    if let Some(logs) = programs.logs() {
        tokio::spawn(async {
            let error = logs.await;
            tracing::warn!("the eBPF programs' log: {error}; what they say is lost from now on");
        });
    }
    let keys = programs.take_keys().context("the key map has another writer")?;
    let (umem, pool) = if sends_live { Umem::over(programs.chunks(), umem)? } else { Umem::new(umem)? };
    let (to_manager, reports) = mpsc::channel(1024);
    let next_hops = NextHops::new(&netlink, NextHopTiming::default()).await?;
    let (workers, ends) = Workers::start(count, &umem, pool, &to_manager, &next_hops)?;
    let mut followers = Followers::start(&netlink, next_hops.clone()).await?;
    programs.set_local_addresses(&followers.local_addresses())?;
    let platform = Arc::new(Platform::new(programs, netlink, workers, (umem, sends_live), lacks));
    Ok(Started { platform, keys, hubs, salt: Random::new()?.octets(), next_hops, followers, reports, ends })
}

/// A tunnel takes two descriptors: its UDP socket, and its daemon's connection.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("RLIMIT_NOFILE stays as it is: {error}");
    }
}
