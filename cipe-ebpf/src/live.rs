//! Transmission in runs that the engine starts (BPF_PROG_RUN with live frames, Documentation/bpf/bpf_prog_run.rst). The kernel
//! allocates a page for each frame. The program fills it and redirects it to the carrier device, without a socket buffer.
//!
//! This is part of the carrier program, because the kernel patches its dispatcher at each run of a program that is not attached.

use aya_ebpf::{
    bindings::xdp_action::XDP_DROP,
    helpers::generated::{bpf_redirect, bpf_xdp_adjust_meta, bpf_xdp_adjust_tail, bpf_xdp_store_bytes},
    programs::XdpContext,
};
use cipe_common::maps::{DEPARTURES_PER_WORKER, Departure};

use crate::{
    bounds,
    maps::{CHUNKS, DEPARTURES, RUNS},
};

/// Ifindex of the ingress device of the engine's runs: loopback. It has this number in every network namespace and is
/// never a carrier.
const LOOPBACK: usize = 1;

/// Returns the worker that started this run, from the metadata in front of the frame; `None` for a received frame.
#[inline(always)]
pub fn worker_of(ctx: &XdpContext) -> Option<u32> {
    if ctx.ingress_ifindex() != LOOPBACK {
        return None;
    }
    let (worker, end) = (ctx.metadata(), ctx.metadata_end());
    if worker + size_of::<u32>() > end {
        return None;
    }
    // SAFETY: the octets lie between the metadata's ends, which the kernel guarantees to be readable.
    Some(unsafe { (worker as *const u32).read_unaligned() })
}

/// Fills this frame with the worker's next departure. Returns the XDP action.
#[inline(always)]
pub fn send(ctx: &XdpContext, worker: u32) -> u32 {
    fill(ctx, worker).unwrap_or(XDP_DROP)
}

#[inline(always)]
fn fill(ctx: &XdpContext, worker: u32) -> Option<u32> {
    let run = RUNS.get_ptr_mut(worker)?;
    // SAFETY: the pointer comes from a successful array look-up, is aligned, and stays valid as long as the map. The worker
    // that owns the element waits for this run.
    let (next, device) = unsafe { ((*run).next, (*run).device) };
    if next >= u64::from(DEPARTURES_PER_WORKER) {
        return None;
    }
    // SAFETY: as above.
    unsafe { (*run).next = next + 1 };
    let departure = *DEPARTURES.get(worker.checked_mul(DEPARTURES_PER_WORKER)? + next as u32)?;
    let chunk = CHUNKS.get_ptr(departure.chunk())?;
    let (offset, length) = (departure.offset(), departure.length());
    let length = bounds::within::<{ Departure::MIN_LENGTH as u64 }, { Departure::MAX_LENGTH as u64 }>(length as u64)?;
    let grow = length as i32 - (ctx.data_end() - ctx.data()) as i32;
    // SAFETY: the context is the one the kernel called us with; `length` octets from `offset` on are in the chunk, and
    // the worker keeps the frame for this run.
    let filled = unsafe {
        bpf_xdp_adjust_meta(ctx.ctx, size_of::<u32>() as i32) == 0
            && bpf_xdp_adjust_tail(ctx.ctx, grow) == 0
            && bpf_xdp_store_bytes(ctx.ctx, 0, chunk.cast::<u8>().add(offset).cast_mut().cast(), length as u32) == 0
    };
    if !filled {
        return None;
    }
    // SAFETY: as for `next`; the helper takes numbers only.
    unsafe {
        (*run).sent += 1;
        Some(bpf_redirect(device as u32, 0) as u32)
    }
}
