//! Binds a socket to a device queue: options, sharing of the UMEM, and retries while the queue is busy.
//!
//! The rules of the kernel (net/xdp/xsk.c, `xsk_bind`; net/xdp/xsk_buff_pool.c, `xp_assign_dev`):
//! - A new socket shares the UMEM of any *bound* socket (`XDP_SHARED_UMEM`). Afterwards the two are equal, and either
//!   may be closed. For another device or queue, the new one needs its own fill and completion rings.
//! - A shared bind has no flags of its own: copy or zero copy, need_wakeup and multi-buffer are those of the shared
//!   UMEM.
//! - The same memory may be registered more than once, as several kernel UMEMs.
//!
//! So no socket has to stay open for the others: this module keeps a weak reference to each bound socket, with its
//! flags. A new socket shares the UMEM of any open one with the wanted flags; if there is none, it registers the memory
//! again. So copy and zero-copy devices can exchange frames, and any socket can be closed at any time.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::event::Timespec;
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags, SocketAddrXdpWithSharedUmem, XdpUmemReg, XdpUmemRegFlags};

use super::config::{Mode, MultiBuffer, SocketConfig};
use super::registration::Registration;
use super::rings::{self, Refusal, Rings};
use super::{Error, Umem};

/// Maximum wait for a busy queue: the kernel frees the queue of a closed socket later, from a work queue.
const MAX_BUSY_WAIT: Duration = Duration::from_secs(2);

/// A bound socket.
pub(super) struct Bound {
    // Before the descriptor: a mapping keeps the socket alive in the kernel.
    pub(super) rings: Rings,
    pub(super) socket: OwnedFd,
    /// The flags that it was bound with.
    pub(super) flags: SocketAddrXdpFlags,
}

/// Opens a socket and binds it to queue `queue.1` of device `queue.0`. Returns it with the flags that it was bound
/// with.
pub(super) fn open(
    umem: &Umem,
    queue: (u32, u32),
    object: &str,
    config: &SocketConfig,
) -> Result<(Arc<OwnedFd>, Rings, SocketAddrXdpFlags), Error> {
    config.check()?;
    let deadline = Instant::now() + MAX_BUSY_WAIT;
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt(umem, queue, config) {
            Ok(Bound { rings, socket, flags }) => {
                let socket = Arc::new(socket);
                let registration = Registration { socket: Arc::downgrade(&socket), queue, flags };
                let mut known = umem.registrations().lock().unwrap_or_else(PoisonError::into_inner);
                known.retain(|other| other.socket.strong_count() > 0);
                known.push(registration);
                return Ok((socket, rings, flags));
            }
            Err((_, Errno::BUSY)) if Instant::now() < deadline => {
                // No event reports that the queue is free, so this polls; the time-out of an empty poll is the
                // interval.
                let pause_now = Timespec::try_from(pause).expect("a pause is far below the range of time_t");
                let _ = rustix::event::poll(&mut [], Some(&pause_now));
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err((call, errno)) => return Err(Error::socket(object, call, errno)),
        }
    }
}

/// Whether an open socket with this UMEM has the queue.
pub(super) fn has_live_socket(umem: &Umem, queue: (u32, u32)) -> bool {
    let known = umem.registrations().lock().unwrap_or_else(PoisonError::into_inner);
    known.iter().any(|other| other.queue == queue && other.socket.strong_count() > 0)
}

/// Returns the flags to try, the best first. Zero copy without multi-buffer is preferred to multi-buffer with copies:
/// it cannot receive packets larger than a frame, but [`MultiBuffer::Wanted`] accepts that.
fn choices(config: &SocketConfig) -> ArrayVec<SocketAddrXdpFlags, 4> {
    let modes: &[_] = match config.mode {
        Mode::Copy => &[SocketAddrXdpFlags::XDP_COPY],
        Mode::ZeroCopy => &[SocketAddrXdpFlags::XDP_ZEROCOPY],
        Mode::Auto => &[SocketAddrXdpFlags::XDP_ZEROCOPY, SocketAddrXdpFlags::XDP_COPY],
    };
    let pieces: &[_] = match config.multi_buffer {
        MultiBuffer::No => &[SocketAddrXdpFlags::empty()],
        MultiBuffer::Wanted => &[SocketAddrXdpFlags::XDP_USE_SG, SocketAddrXdpFlags::empty()],
        MultiBuffer::Needed => &[SocketAddrXdpFlags::XDP_USE_SG],
    };
    let mut common = SocketAddrXdpFlags::empty();
    common.set(SocketAddrXdpFlags::XDP_USE_NEED_WAKEUP, config.need_wakeup);
    modes.iter().flat_map(|mode| pieces.iter().map(move |pieces| common | *mode | *pieces)).collect()
}

/// Tries all flags in order; on failure, returns the refusal of the last.
pub(super) fn attempt(umem: &Umem, queue: (u32, u32), config: &SocketConfig) -> Result<Bound, Refusal> {
    let with = |flags| {
        // It is not known which of the open sockets are still bound, so each is tried.
        for sharer in sharers(umem, queue, flags)? {
            match share(&sharer, queue, config) {
                Ok((socket, rings)) => return Ok(Bound { rings, socket, flags }),
                Err((_, Errno::BUSY)) => return Err(("bind", Errno::BUSY)),
                Err((_, Errno::BADF)) => {}
                Err(_) => break,
            }
        }
        register(umem, queue, flags, config).map(|(socket, rings)| Bound { rings, socket, flags })
    };
    let mut refusal = ("bind", Errno::OPNOTSUPP);
    for flags in choices(config) {
        match with(flags) {
            Err(refused @ (_, errno)) if errno != Errno::BUSY => refusal = refused,
            answer => return answer,
        }
    }
    Err(refusal)
}

/// Returns the open sockets of the UMEM with these flags; `EBUSY` if one of them has the queue itself.
fn sharers(umem: &Umem, queue: (u32, u32), flags: SocketAddrXdpFlags) -> Result<Vec<Arc<OwnedFd>>, Refusal> {
    let known = umem.registrations().lock().unwrap_or_else(PoisonError::into_inner);
    let live = known.iter().filter_map(|other| Some((other, other.socket.upgrade()?)));
    let mut found = Vec::new();
    for (other, socket) in live {
        if other.queue == queue {
            return Err(("bind", Errno::BUSY));
        }
        if other.flags == flags {
            found.push(socket);
        }
    }
    Ok(found)
}

fn share(sharer: &OwnedFd, queue: (u32, u32), config: &SocketConfig) -> Result<(OwnedFd, Rings), Refusal> {
    let (socket, rings) = rings::open(config)?;
    let addr = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_SHARED_UMEM, queue.0, queue.1);
    let addr = SocketAddrXdpWithSharedUmem { addr, shared_umem_fd: sharer.as_fd() };
    rustix::net::bind(&socket, &addr).map_err(|errno| ("bind", errno))?;
    Ok((socket, rings))
}

fn register(
    umem: &Umem,
    queue: (u32, u32),
    flags: SocketAddrXdpFlags,
    config: &SocketConfig,
) -> Result<(OwnedFd, Rings), Refusal> {
    let made = umem.prepared().lock().unwrap_or_else(PoisonError::into_inner).take_if(|made| made.config == *config);
    let made = made.map_or_else(|| prepare(umem, config), Ok)?;
    match rustix::net::bind(&made.socket, &SocketAddrXdp::new(flags, queue.0, queue.1)) {
        Ok(()) => Ok((made.socket, made.rings)),
        Err(errno) => {
            // The queue may be free at the next attempt.
            *umem.prepared().lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
            Err(("bind", errno))
        }
    }
}

/// An unbound socket with which the memory is registered: the kernel takes milliseconds for that.
pub(super) struct Prepared {
    config: SocketConfig,
    // Before the descriptor, as in [`Bound`].
    rings: Rings,
    socket: OwnedFd,
}

/// Makes such a socket.
pub(super) fn prepare(umem: &Umem, config: &SocketConfig) -> Result<Prepared, Refusal> {
    let (socket, rings) = rings::open(config)?;
    let (addr, len) = umem.range();
    let layout = umem.layout();
    let shape = XdpUmemReg {
        addr,
        len,
        chunk_size: layout.frame_size,
        headroom: layout.headroom,
        flags: XdpUmemRegFlags::empty(),
        tx_metadata_len: 0,
    };
    sockopt::set_xdp_umem_reg(&socket, shape).map_err(|errno| ("XDP_UMEM_REG", errno))?;
    Ok(Prepared { config: *config, rings, socket })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(mode: Mode, multi_buffer: MultiBuffer) -> Vec<(bool, bool)> {
        let config = SocketConfig { mode, multi_buffer, ..SocketConfig::default() };
        let is = |flags: SocketAddrXdpFlags, flag| flags.contains(flag);
        let of = |flags| (is(flags, SocketAddrXdpFlags::XDP_ZEROCOPY), is(flags, SocketAddrXdpFlags::XDP_USE_SG));
        choices(&config).into_iter().map(of).collect()
    }

    #[test]
    fn zero_copy_is_tried_before_copies_with_and_without_scatter_gather() {
        let all = [(true, true), (true, false), (false, true), (false, false)];
        assert_eq!(flags(Mode::Auto, MultiBuffer::Wanted), all);
        assert_eq!(flags(Mode::Copy, MultiBuffer::Wanted), all[2..]);
    }

    #[test]
    fn what_needs_scatter_gather_is_never_bound_without() {
        assert_eq!(flags(Mode::Auto, MultiBuffer::Needed), [(true, true), (false, true)]);
        assert_eq!(flags(Mode::ZeroCopy, MultiBuffer::No), [(true, false)]);
    }
}
