//! Frames that a zero-copy driver has when its socket is closed. The kernel takes the driver's rings down some time later, from
//! a work queue (`xp_release_deferred`), and tells nobody; but as long as that is to come, nobody can bind to the queue.

use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::io::Errno;

use super::bind::{self, Mode, MultiBuffer, SocketConfig};
use super::{Frame, Umem, UmemConfig};

/// How long a driver may take to let go; one that takes longer has its frames for good.
const PATIENCE: Duration = Duration::from_secs(30);

/// Such frames.
#[must_use = "dropped frames are lost to their UMEM"]
pub struct Held {
    frames: Vec<Frame>,
    /// The device and the queue that the socket had.
    place: (u32, u32),
    umem: Umem,
}

impl Held {
    pub(super) fn new(frames: Vec<Frame>, place: (u32, u32), umem: Umem) -> Self {
        Self { frames, place, umem }
    }

    /// Waits until the driver has let go of the frames, and returns them; none if it does not. May take seconds.
    pub fn wait(self) -> Vec<Frame> {
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_millis(2);
        while !self.is_free() {
            if Instant::now() >= deadline {
                tracing::warn!("{} frames stayed with a driver", self.frames.len());
                return Vec::new();
            }
            // Nothing tells, so the deadline of an empty poll paces the looks.
            let pause_now = Timespec::try_from(pause).expect("a pause is far below the range of time_t");
            let _ = rustix::event::poll(&mut [], Some(&pause_now));
            pause = (pause * 2).min(Duration::from_millis(100));
        }
        self.frames
    }

    /// Whether another socket of ours has the queue, or could have it.
    fn is_free(&self) -> bool {
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
            // The device, or the queue, is gone, and what it had was taken from it before.
            Err((_, errno)) => matches!(errno, Errno::NODEV | Errno::INVAL | Errno::NXIO),
        }
    }
}
