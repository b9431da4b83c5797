//! Transmits without socket buffers: the kernel runs the carrier program, which copies our frames into pages of the
//! kernel, and sends them by a device's `ndo_xdp_xmit` (BPF_PROG_RUN with live frames, Linux 5.18;
//! Documentation/bpf/bpf_prog_run.rst). A page costs less than a socket buffer, but a call costs as much as many socket
//! buffers, so it pays for bursts only.
//!
//! The program should be attached in native mode to some device: otherwise each run patches the kernel's dispatcher.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya::programs::{ProgramError, TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use cipe_common::maps::{DEPARTURES_PER_WORKER, Departure, Run, names};

use super::error::{chain, os_error};
use super::{Error, Programs};
use crate::kernel::shared::SharedArray;

/// 64-bit words of a [`Run`].
const WORDS: usize = size_of::<Run>() / size_of::<u64>();
const NEXT: usize = 0;
const DEVICE: usize = 1;
const SENT: usize = 2;
const _: () = assert!(
    std::mem::offset_of!(Run, next) == 8 * NEXT
        && std::mem::offset_of!(Run, device) == 8 * DEVICE
        && std::mem::offset_of!(Run, sent) == 8 * SENT
);

/// The device from which, according to the kernel, the frames come (cipe-ebpf/src/live.rs).
const LOOPBACK: u32 = 1;

/// Maximum frames that the kernel makes at once, and queues before the device gets them; a NAPI poll takes 64.
const MAX_KERNEL_BATCH: u32 = 128;

/// The maps for live frames.
pub(super) struct LiveMaps {
    chunks: MapData,
    runs: Arc<SharedArray<WORDS>>,
    departures: Arc<SharedArray<1>>,
    /// A second handle to the carrier program. `None`: the process had no CAP_SYS_ADMIN, without which the kernel gives none.
    program: Option<Arc<Xdp>>,
    /// Their descriptors are in the code of a program that is not loaded yet.
    _maps: [MapData; 2],
}

impl LiveMaps {
    pub(super) fn take(ebpf: &mut Ebpf, workers: u32) -> Result<Self, Error> {
        let (runs, run_map) = shared(ebpf, names::RUNS, workers)?;
        let (departures, departure_map) = shared(ebpf, names::DEPARTURES, workers * DEPARTURES_PER_WORKER)?;
        let program = second_handle(ebpf)
            .inspect_err(|error| {
                tracing::warn!("no live frames are sent, which costs throughput over veth: {}", chain(error));
            })
            .ok();
        Ok(Self { chunks: array(ebpf, names::CHUNKS)?, runs, departures, program, _maps: [run_map, departure_map] })
    }
}

/// Opens the carrier program again. A process can do that as long as it has CAP_SYS_ADMIN.
fn second_handle(ebpf: &mut Ebpf) -> Result<Arc<Xdp>, ProgramError> {
    let program: &mut Xdp = ebpf.program_mut(names::CARRIER_XDP).ok_or(ProgramError::NotLoaded)?.try_into()?;
    let name = Cow::Borrowed(names::CARRIER_XDP);
    Xdp::from_program_info(program.info()?, name, XdpAttachType::Interface).map(Arc::new)
}

/// A map as memory, and its descriptor.
type Shared<const N: usize> = (Arc<SharedArray<N>>, MapData);

fn shared<const N: usize>(ebpf: &mut Ebpf, name: &'static str, len: u32) -> Result<Shared<N>, Error> {
    let failed = |cause: io::Error| Error::Map { map: name, cause: cause.into() };
    let map = array(ebpf, name)?;
    let memory = SharedArray::map(map.fd().as_fd(), len as usize).map_err(failed)?;
    Ok((Arc::new(memory), map))
}

fn array(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, Error> {
    match ebpf.take_map(name) {
        Some(Map::Array(map)) => Ok(map),
        _ => Err(Error::Object { name }),
    }
}

impl Programs {
    /// The map that holds the UMEM's memory, for [`crate::xsk::Umem::over`]: [`LiveFrames`] transmits from there.
    pub fn chunks(&self) -> BorrowedFd<'_> {
        self.live.chunks.fd().as_fd()
    }

    /// Lets worker `number` transmit. For one thread; two users of one number must not transmit at the same time. `None`: the process
    /// had no CAP_SYS_ADMIN when it loaded the programs, without which the kernel gives no second handle to one.
    pub fn live_frames(&self, number: u32) -> Option<LiveFrames> {
        let (runs, departures) = (self.live.runs.clone(), self.live.departures.clone());
        Some(LiveFrames { program: self.live.program.clone()?, runs, departures, number })
    }
}

/// The handle by which a worker transmits live frames.
pub struct LiveFrames {
    program: Arc<Xdp>,
    runs: Arc<SharedArray<WORDS>>,
    departures: Arc<SharedArray<1>>,
    number: u32,
}

impl LiveFrames {
    /// Maximum frames of one call.
    pub const MAX_FRAMES: usize = DEPARTURES_PER_WORKER as usize;

    /// Transmits at most [`Self::MAX_FRAMES`] frames on a device that accepts XDP frames ([`crate::kernel::netdev`]). Returns
    /// how many of them, from the front, the device got. The device keeps no reference to their memory, and counts its
    /// own later drops.
    ///
    /// # Panics
    /// If there are more than [`Self::MAX_FRAMES`].
    pub fn send(&mut self, ifindex: u32, frames: &[Departure]) -> usize {
        if frames.is_empty() {
            return 0;
        }
        let first = self.number as usize * Self::MAX_FRAMES;
        let places = &self.departures[first..first + Self::MAX_FRAMES][..frames.len()];
        for ([place], frame) in places.iter().zip(frames) {
            place.store(frame.0, Ordering::Relaxed);
        }
        let run = &self.runs[self.number as usize];
        let set = |word: usize, value: u64| run[word].store(value, Ordering::Relaxed);
        set(NEXT, 0);
        set(SENT, 0);
        set(DEVICE, ifindex.into());
        let result = self.run(frames.len() as u32);
        let sent = count(&run[SENT]);
        if let Err(error) = result {
            let error =
                os_error(&error).map_or_else(|| error.to_string(), |n| io::Error::from_raw_os_error(n).to_string());
            tracing::debug!("device {ifindex}: {sent} of {} live frames sent: {error}", frames.len());
        }
        sent.min(frames.len())
    }

    fn run(&self, frames: u32) -> Result<(), ProgramError> {
        /// Octets of the input: the worker's number, then the shortest frame.
        const DATA: usize = size_of::<u32>() + Departure::MIN_LENGTH;
        let mut data = [0; DATA];
        data[..size_of::<u32>()].copy_from_slice(&self.number.to_ne_bytes());
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [size_of::<u32>() as u32, DATA as u32, 0, LOOPBACK, 0, 0].map(u32::to_ne_bytes);
        let attrs = TestRunAttrs::new().xdp_live_frames(frames.min(MAX_KERNEL_BATCH));
        let options = TestRunOptions {
            data_in: Some(&data),
            ctx_in: Some(context.as_flattened()),
            repeat: frames,
            attrs,
            ..TestRunOptions::default()
        };
        self.program.test_run(options).map(drop)
    }
}

fn count(word: &AtomicU64) -> usize {
    usize::try_from(word.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
}
