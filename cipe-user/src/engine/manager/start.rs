//! The start of the engine: it loads the programs, starts the workers with their memory, takes over the hubs that an engine that died
//! left, and starts the followers.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use cipe_common::maps::CHUNK;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::mpsc;

use super::followers::Followers;
use super::platform::Platform;
use super::workers::{self, Workers};
use crate::control::run_dir;
use crate::engine::random::Random;
use crate::engine::report::WorkerReport;
use crate::engine::{frames, locked};
use crate::kernel::bpf::{LoadOptions, Programs, remove_leftovers};
use crate::kernel::confinement::{Strictness, confine_engine, protect_memory};
use crate::kernel::features::{self, Feature};
use crate::kernel::hub::{Hub, Inheritance, Waiting};
use crate::kernel::keys::KeyWriter;
use crate::kernel::known_bad;
use crate::kernel::netlink::Netlink;
use crate::kernel::nexthop::{NextHopTiming, NextHops};
use crate::kernel::shields::ShieldWriter;
use crate::xsk::{Umem, UmemConfig};

/// Octets of UMEM for each worker. A page of it takes memory only when its frames are used.
const UMEM_PER_WORKER: u32 = 32 << 20;

/// Octets of UMEM of an engine, at least.
const MIN_UMEM: u32 = 64 << 20;

/// The parts of an engine that has all that takes time, and has touched nothing of an engine before it.
pub(super) struct Prepared {
    pub platform: Arc<Platform>,
    /// The one writer of the key slots.
    pub keys: KeyWriter,
    pub shields: ShieldWriter,
    /// Octets that no engine before this one had, for MAC addresses.
    pub salt: [u8; 3],
    pub next_hops: NextHops,
    pub followers: Followers,
    /// Reports of the workers, with the tunnels' numbers.
    pub reports: mpsc::Receiver<(u16, WorkerReport)>,
    /// Numbers of workers that have ended.
    pub ends: mpsc::Receiver<usize>,
}

/// Prepares an engine; `workers`: their number, `None`: by the cards and CPUs; `largest_mtu`: of a tunnel, in octets. From here on it
/// may write files in `run_dir` and in its part of the state directory only.
///
/// # Errors
/// One line that says what was refused, where, and how to go on: no root, no AF_XDP, no memory.
pub(super) async fn prepare(
    workers: Option<usize>,
    largest_mtu: u32,
    (run_dir, confinement): (&Path, Strictness),
) -> anyhow::Result<Prepared> {
    let netlink = Netlink::new()?;
    raise_descriptor_limit();
    let count = match workers {
        Some(count) => count,
        None => workers::suitable_count(netlink.most_receive_queues().await?),
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
    let frames = MIN_UMEM.max(count as u32 * UMEM_PER_WORKER) / frame_size;
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
    // Live frames are sent from the memory of a map, whose values have a fixed size; larger frames cannot be.
    let sends_live = frame_size as usize == CHUNK;
    let chunks = if sends_live { frames } else { 1 };
    // The programs pass frames that do not fit into one descriptor to the kernel.
    let largest_frame =
        if lacks.contains(&Feature::MultiBuffer) { frames::largest_received(frame_size) } else { u32::MAX };
    let load = LoadOptions { debug, workers: count as u32, chunks, largest_frame, ..LoadOptions::default() };
    let mut programs = Programs::load(&load)?;
    confine(run_dir, confinement);
    if let Some(logs) = programs.logs() {
        tokio::spawn(async {
            let error = logs.await;
            tracing::warn!("the eBPF programs' log: {error}; what they say is lost from now on");
        });
    }
    let keys = programs.take_keys().context("the key map has another writer")?;
    let shields = programs.take_shields().context("the map of shields has another writer")?;
    let (umem, pool) = if sends_live { Umem::over(programs.chunks(), umem)? } else { Umem::new(umem)? };
    let (to_manager, reports) = mpsc::channel(1024);
    let next_hops = NextHops::new(&netlink, NextHopTiming::default()).await?;
    let (workers, ends) = Workers::start(count, &umem, pool, &to_manager, &next_hops)?;
    let mut followers = Followers::start(&netlink, next_hops.clone()).await?;
    programs.set_local_addresses(&followers.local_addresses())?;
    let platform = Arc::new(Platform::new(programs, netlink, workers, (umem, sends_live), lacks));
    Ok(Prepared { platform, keys, shields, salt: Random::new()?.octets(), next_hops, followers, reports, ends })
}

/// Takes over the hubs with devices on them that an engine which has ended left, and removes what else it left. `known` are hubs that
/// it has handed over.
///
/// # Errors
/// The kernel refuses it.
pub(super) async fn inherit(netlink: &Netlink, known: &[Hub]) -> anyhow::Result<(Vec<Hub>, Vec<Waiting>)> {
    let Inheritance { swept, hubs, waiting } = netlink.inherit(known).await?;
    for name in swept {
        tracing::info!("{name}: left by an engine that died; removed");
    }
    for hub in &hubs {
        remove_leftovers(hub.index);
    }
    Ok((hubs, waiting))
}

/// Gives up the rights that the engine does not use from here on. What it has used before: CAP_SYS_ADMIN, for a test of the kernel in
/// a network namespace of its own and for a second handle to a program, and CAP_SYS_RESOURCE, to raise limits. Makes the directory for what it keeps, as only that may be
/// written from here on.
fn confine(run_dir: &Path, strictness: Strictness) {
    protect_memory();
    let state_dir = run_dir::engine_part(&run_dir::state_directory());
    if let Err(error) = DirBuilder::new().recursive(true).mode(0o700).create(&state_dir) {
        tracing::warn!(
            "{}: {error}; packets under the static key are not remembered after a restart",
            state_dir.display()
        );
    }
    for error in confine_engine(run_dir, &state_dir, strictness) {
        tracing::warn!("the engine keeps rights that it does not use: {error}");
    }
}

/// Raises the limit of descriptors: a tunnel takes three, its UDP socket, its daemon's connection and its journal.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("RLIMIT_NOFILE stays as it is: {error}");
    }
}
