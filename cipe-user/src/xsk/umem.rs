//! The memory of packets.

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::bind::{self, Prepared};
use super::map::Region;
use super::registration::Registration;
use super::{Error, Frame, Pool, SocketConfig};

/// `XDP_PACKET_HEADROOM`: octets that the kernel leaves in front of a received packet, before the UMEM's own headroom.
pub const PACKET_HEADROOM: u32 = 256;

/// The size of a UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UmemConfig {
    /// Number of chunks, one frame each; 1 or more.
    pub frames: u32,
    /// Octets of a chunk: 2048 or 4096.
    pub frame_size: u32,
    /// Octets to leave free in front of a received packet, beyond the kernel's 256.
    pub headroom: u32,
    /// Whether to use huge pages if available; otherwise ordinary memory (with transparent huge pages) is used.
    pub huge_pages: bool,
}

impl Default for UmemConfig {
    fn default() -> Self {
        Self { frames: 8192, frame_size: 4096, headroom: 0, huge_pages: false }
    }
}

/// The identity and the chunks of a UMEM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Unique in this process.
    pub(super) umem: u32,
    pub(super) frames: u32,
    pub(super) frame_size: u32,
    pub(super) headroom: u32,
}

impl Layout {
    /// Panics if the frame belongs to another UMEM: a mistake of the caller that would lose frames of both.
    pub(super) fn own(&self, frame: &Frame) {
        assert_eq!(frame.umem(), self.umem, "a frame was used with another UMEM than its own");
    }

    fn octets(&self) -> usize {
        self.frames as usize * self.frame_size as usize
    }
}

/// A UMEM. Clones are cheap and refer to the same memory.
#[derive(Clone)]
pub struct Umem {
    shared: Arc<Shared>,
}

struct Shared {
    memory: Region,
    layout: Layout,
    /// Sockets that are bound with this memory; later ones share their kernel UMEM.
    registrations: Mutex<Vec<Registration>>,
    /// For the next socket that shares with none of them.
    prepared: Mutex<Option<Prepared>>,
}

impl Umem {
    /// Maps new memory and makes all of its frames.
    ///
    /// # Errors
    /// Sizes out of range, or no memory.
    pub fn new(config: UmemConfig) -> Result<(Self, Pool), Error> {
        Self::of(config, |octets| Region::anonymous(octets, config.huge_pages))
    }

    /// Does the same with the memory of a `BPF_F_MMAPABLE` array, which eBPF programs also see: its first values, of
    /// `frame_size` octets each. `huge_pages` has no effect.
    ///
    /// # Errors
    /// As [`Self::new`]; or `fd` has too little memory, or cannot be mapped.
    pub fn over(fd: BorrowedFd<'_>, config: UmemConfig) -> Result<(Self, Pool), Error> {
        Self::of(config, |octets| Region::shared(fd, octets))
    }

    fn of(
        config: UmemConfig,
        map: impl FnOnce(usize) -> Result<Region, rustix::io::Errno>,
    ) -> Result<(Self, Pool), Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);

        let UmemConfig { frames, frame_size, headroom, .. } = config;
        let size = |what, value: u32, rule| Error::Size { what, value: value.into(), rule };
        if !matches!(frame_size, 2048 | 4096) {
            return Err(size("frame size", frame_size, "it must be 2048 or 4096"));
        }
        if frames == 0 || frames > 1 << 22 {
            return Err(size("number of frames", frames, "it must be between 1 and 4194304"));
        }
        // The kernel requires space for a packet behind both headrooms; less than an Ethernet header makes no sense.
        if headroom > frame_size - PACKET_HEADROOM - 64 {
            return Err(size(
                "headroom",
                headroom,
                "it must leave 64 octets of the frame behind it and the kernel's 256",
            ));
        }
        let octets = (frames as usize)
            .checked_mul(frame_size as usize)
            .ok_or_else(|| size("number of frames", frames, "that is more than the address space"))?;
        let memory = map(octets).map_err(|errno| Error::Memory { octets, errno })?;
        let umem = NEXT
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_add(1))
            .expect("four billion UMEMs outlive any machine");
        let layout = Layout { umem, frames, frame_size, headroom };
        let shared = Arc::new(Shared { memory, layout, registrations: Mutex::default(), prepared: Mutex::default() });
        Ok((Self { shared }, Pool::full(layout)))
    }

    /// Octets of a chunk.
    pub fn frame_size(&self) -> u32 {
        self.shared.layout.frame_size
    }

    /// The whole chunk of a frame.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM.
    pub fn chunk<'a>(&'a self, frame: &'a Frame) -> &'a [u8] {
        // SAFETY: `start` points at `frame_size` initialised octets of a mapping that `self` keeps for 'a. The frame is
        // the only one of its chunk (invariant of `frames.rs`) and borrowed for 'a, so nobody writes: user space
        // needs the frame for that, and the kernel gets chunks only by `FrameSet::put`, which takes the frame.
        unsafe { std::slice::from_raw_parts(self.start(frame).as_ptr(), self.frame_size() as usize) }
    }

    /// The whole chunk of a frame, mutable. Chunks of different frames can be borrowed at the same time.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM.
    pub fn chunk_mut<'a>(&'a self, frame: &'a mut Frame) -> &'a mut [u8] {
        // SAFETY: as in `chunk`; and the frame is borrowed mutably for 'a, so this is the only reference to the chunk.
        unsafe { std::slice::from_raw_parts_mut(self.start(frame).as_ptr(), self.frame_size() as usize) }
    }

    fn start(&self, frame: &Frame) -> NonNull<u8> {
        self.shared.layout.own(frame);
        let offset = frame.index() as usize * self.frame_size() as usize;
        debug_assert!(offset + self.frame_size() as usize <= self.shared.layout.octets());
        // SAFETY: a frame of this UMEM has an index below `frames` (invariant of `frames.rs`), and the mapping has
        // `frames * frame_size` octets.
        unsafe { self.shared.memory.start().add(offset) }
    }

    pub(super) fn layout(&self) -> Layout {
        self.shared.layout
    }

    /// Start and length of the memory, for `XDP_UMEM_REG`.
    pub(super) fn range(&self) -> (u64, u64) {
        (self.shared.memory.start().as_ptr() as u64, self.shared.layout.octets() as u64)
    }

    /// Does in advance, for one socket of this configuration, what takes longest in binding it. Without effect if the kernel refuses:
    /// the socket is then made as usual.
    pub fn prepare(&self, config: &SocketConfig) {
        match bind::prepare(self, config) {
            Ok(made) => *self.prepared().lock().unwrap_or_else(PoisonError::into_inner) = Some(made),
            Err((call, errno)) => tracing::debug!("an AF_XDP socket is not prepared: {call}: {errno}"),
        }
    }

    pub(super) fn prepared(&self) -> &Mutex<Option<Prepared>> {
        &self.shared.prepared
    }

    pub(super) fn registrations(&self) -> &Mutex<Vec<Registration>> {
        &self.shared.registrations
    }
}
