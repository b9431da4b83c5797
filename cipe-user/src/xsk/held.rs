//! Frames that a zero-copy driver still holds when their socket is closed. The kernel releases the driver's rings
//! later, from a work queue (`xp_release_deferred`), without a notification. Until then, no socket can bind to the
//! queue. The same holds for the frames of a socket whose descriptor another thread still has.

use std::os::fd::OwnedFd;
use std::sync::Weak;
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;

use super::bind;
use super::config::{Mode, MultiBuffer, SocketConfig};
use super::{Frame, Umem, UmemConfig};

/// Maximum wait for a driver to release its frames; after that, they are lost.
const DRIVER_RELEASE_DEADLINE: Duration = Duration::from_secs(30);

/// Frames that a driver may still hold.
#[must_use = "dropped frames are lost to their UMEM"]
pub struct Held {
    frames: Vec<Frame>,
    /// The socket, while a bind on another thread uses it to share its memory.
    others: Weak<OwnedFd>,
    /// Index of the device, and number of the queue.
    place: (u32, u32),
    umem: Umem,
}

impl Held {
    pub(super) fn new(frames: Vec<Frame>, others: Weak<OwnedFd>, place: (u32, u32), umem: Umem) -> Self {
        Self { frames, others, place, umem }
    }

    /// Waits until the driver has released the frames, and returns them; returns none if the driver does not. May take
    /// seconds.
    pub fn wait(self) -> Vec<Frame> {
        let deadline = Instant::now() + DRIVER_RELEASE_DEADLINE;
        let mut pause = Duration::from_millis(2);
        while !self.is_free() {
            if Instant::now() >= deadline {
                tracing::warn!("{} frames are lost: the driver did not release them", self.frames.len());
                return Vec::new();
            }
            // No event reports the release, so this polls; the time-out of an empty poll is the interval.
            let pause_now = Timespec::try_from(pause).expect("a pause is far below the range of time_t");
            let _ = rustix::event::poll(&mut [], Some(&pause_now));
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        self.frames
    }

    /// Whether another socket of this process has the queue, or one could bind to it.
    fn is_free(&self) -> bool {
        if self.others.strong_count() > 0 {
            return false;
        }
        if bind::has_live_socket(&self.umem, self.place) {
            return true;
        }
        let config = SocketConfig {
            rx: 0,
            tx: 1,
            fill: 1,
            completion: 1,
            mode: Mode::Copy,
            multi_buffer: MultiBuffer::No,
            need_wakeup: false,
        };
        let probe = UmemConfig { frames: 1, ..UmemConfig::default() };
        let Ok((umem, _pool)) = Umem::new(probe) else { return false };
        match bind::attempt(&umem, self.place, &config) {
            Ok(_) => true,
            // The device or the queue is gone, so the kernel has released the buffers.
            Err((_, errno)) => matches!(errno, Errno::NODEV | Errno::INVAL | Errno::NXIO),
        }
    }
}
