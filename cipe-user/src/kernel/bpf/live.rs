//! Sending without socket buffers: the kernel runs the carrier program, which puts frames of ours into pages that the kernel
//! has made, and hands them to a device's `ndo_xdp_xmit` (BPF_PROG_RUN with live frames, Linux 5.18;
//! Documentation/bpf/bpf_prog_run.rst). A page of its own costs less than a socket buffer, but the call itself as much as
//! many of them: for bursts.
//!
//! The program is to be attached in native mode to some device: otherwise each run patches the kernel's dispatcher.

use std::borrow::Cow;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Ebpf;
use aya::maps::{Map, MapData};
use aya::programs::{ProgramError, TestRun as _, TestRunAttrs, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use cipe_common::maps::{DEPARTURES, Departure, Run, names};

use super::error::{chain, os_error};
use super::{Error, Programs, xdp};
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

/// Where the kernel says that the frames come from (cipe-ebpf/src/live.rs).
const LOOPBACK: u32 = 1;

/// Frames that the kernel makes at once, and queues for the device before that gets them: what a NAPI poll takes (64).
const AT_ONCE: u32 = 128;

/// The maps of what is sent.
pub(super) struct LiveMaps {
    chunks: MapData,
    runs: Arc<SharedArray<WORDS>>,
    departures: Arc<SharedArray<1>>,
}

impl LiveMaps {
    pub(super) fn take(ebpf: &mut Ebpf, workers: u32) -> Result<Self, Error> {
        Ok(Self {
            chunks: array(ebpf, names::CHUNKS)?,
            runs: shared(ebpf, names::RUNS, workers)?,
            departures: shared(ebpf, names::DEPARTURES, workers * DEPARTURES)?,
        })
    }
}

fn shared<const N: usize>(ebpf: &mut Ebpf, name: &'static str, len: u32) -> Result<Arc<SharedArray<N>>, Error> {
    let failed = |cause: io::Error| Error::Map { map: name, cause: cause.into() };
    SharedArray::map(array(ebpf, name)?.fd().as_fd(), len as usize).map(Arc::new).map_err(failed)
}

fn array(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, Error> {
    match ebpf.take_map(name) {
        Some(Map::Array(map)) => Ok(map),
        _ => Err(Error::Object { name }),
    }
}

impl Programs {
    /// The map that is to be the UMEM's memory, for [`crate::xsk::Umem::over`]: [`LiveFrames`] sends from there.
    pub fn chunks(&self) -> BorrowedFd<'_> {
        self.live.chunks.fd().as_fd()
    }

    /// Lets worker `number` send. For one thread; two of one number must not send at the same time.
    ///
    /// # Errors
    /// [`Error::Handle`] if the kernel gives no second handle to its program.
    pub fn live_frames(&mut self, number: u32) -> Result<LiveFrames, Error> {
        let refused = |error: ProgramError| Error::Handle { program: names::CARRIER_XDP, reason: chain(&error) };
        let info = xdp(&mut self.ebpf, names::CARRIER_XDP)?.info().map_err(refused)?;
        let name = Cow::Borrowed(names::CARRIER_XDP);
        let program = Xdp::from_program_info(info, name, XdpAttachType::Interface).map_err(refused)?;
        let (runs, departures) = (self.live.runs.clone(), self.live.departures.clone());
        Ok(LiveFrames { program, runs, departures, number })
    }
}

/// What a worker sends live frames by.
pub struct LiveFrames {
    program: Xdp,
    runs: Arc<SharedArray<WORDS>>,
    departures: Arc<SharedArray<1>>,
    number: u32,
}

impl LiveFrames {
    /// Most frames of one call.
    pub const MOST: usize = DEPARTURES as usize;

    /// Sends frames, at most [`Self::MOST`], on a device that takes XDP frames ([`crate::kernel::netdev`]); returns how many,
    /// from the front, were handed to it. It keeps none of their memory. What the device drops then, it counts itself.
    ///
    /// # Panics
    /// If there are more.
    pub fn send(&mut self, ifindex: u32, frames: &[Departure]) -> usize {
        if frames.is_empty() {
            return 0;
        }
        let first = self.number as usize * Self::MOST;
        let places = &self.departures[first..first + Self::MOST][..frames.len()];
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
        /// The worker's number in front, and then the shortest frame.
        const DATA: usize = size_of::<u32>() + Departure::SHORTEST;
        let mut data = [0; DATA];
        data[..size_of::<u32>()].copy_from_slice(&self.number.to_ne_bytes());
        // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [size_of::<u32>() as u32, DATA as u32, 0, LOOPBACK, 0, 0].map(u32::to_ne_bytes);
        let attrs = TestRunAttrs::new().xdp_live_frames(frames.min(AT_ONCE));
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
