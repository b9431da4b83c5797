//! Who may use which chunk: frames, the pool of free ones, packets, and the set that a socket has given to the kernel.
//!
//! The invariant that the unsafe blocks of `umem.rs` rest on: of each chunk there is one [`Frame`], or a [`FrameSet`]
//! holds it, never both and never twice. Frames are made in two places only: all of them by [`Pool::full`], which is
//! called once for a UMEM, and by [`FrameSet::take`] in exchange for the set's own entry.

use super::umem::{Layout, Umem};

/// The right to use one chunk of a UMEM. Dropping it leaks the chunk until the UMEM is dropped, which
/// [`Pool::total`] minus everything counted elsewhere shows.
#[derive(Debug)]
#[must_use = "a dropped frame is lost to its UMEM"]
pub struct Frame {
    index: u32,
    umem: u32,
}

impl Frame {
    /// Number of the chunk in the UMEM.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Identity of the UMEM.
    pub(super) fn umem(&self) -> u32 {
        self.umem
    }
}

/// The free frames of one UMEM; last in, first out, so that a warm chunk is used again first.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Frame>,
    total: usize,
    layout: Layout,
}

impl Pool {
    /// All frames of a new UMEM. To be called once for each [`Layout::umem`].
    pub(super) fn full(layout: Layout) -> Self {
        let free: Vec<Frame> = (0..layout.frames).rev().map(|index| Frame { index, umem: layout.umem }).collect();
        Self { total: free.len(), free, layout }
    }

    /// Shares the frames out: `count` pools in place of a full one, as large as each other but for a frame.
    pub fn split(mut self, count: usize) -> Vec<Self> {
        let pool = |left: usize| {
            let free = self.free.split_off(self.free.len() - self.free.len() / left);
            Self { total: free.len(), free, layout: self.layout }
        };
        (1..=count).rev().map(pool).collect()
    }

    /// A free frame, with whatever its last user left in the chunk.
    pub fn take(&mut self) -> Option<Frame> {
        self.free.pop()
    }

    /// Gives a frame back.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM.
    pub fn put(&mut self, frame: Frame) {
        self.layout.own(&frame);
        self.free.push(frame);
    }

    /// Frames in the pool.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Frames that the pool began with. With all sockets closed and all packets put back, equal to [`Pool::free`].
    pub fn total(&self) -> usize {
        self.total
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// One descriptor's worth of a packet.
#[derive(Debug)]
pub struct Packet {
    /// The chunk that the octets are in.
    pub frame: Frame,
    /// First octet, counted from the start of the chunk. A received packet starts at 256 (`XDP_PACKET_HEADROOM`) plus
    /// the UMEM's headroom, unless the XDP program moved it.
    pub offset: u32,
    /// Octets.
    pub len: u32,
    /// The packet goes on in the next descriptor (`XDP_PKT_CONTD`).
    pub more: bool,
}

impl Packet {
    /// The octets of this descriptor.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM, or `offset` and `len` were set beyond the chunk.
    pub fn data<'a>(&'a self, umem: &'a Umem) -> &'a [u8] {
        let start = self.offset as usize;
        &umem.chunk(&self.frame)[start..start + self.len as usize]
    }

    /// The octets of this descriptor, to be changed.
    ///
    /// # Panics
    /// As [`Packet::data`].
    pub fn data_mut<'a>(&'a mut self, umem: &'a Umem) -> &'a mut [u8] {
        let start = self.offset as usize;
        &mut umem.chunk_mut(&mut self.frame)[start..start + self.len as usize]
    }
}

/// Frames that a socket has given to the kernel, by chunk.
pub(super) struct FrameSet {
    bits: Box<[u64]>,
    len: usize,
    layout: Layout,
}

impl FrameSet {
    pub(super) fn new(layout: Layout) -> Self {
        Self { bits: vec![0; layout.frames.div_ceil(64) as usize].into_boxed_slice(), len: 0, layout }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Takes the frame in and says at which UMEM address its chunk starts.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM.
    pub(super) fn put(&mut self, frame: Frame) -> u64 {
        self.layout.own(&frame);
        let index = frame.index;
        debug_assert_eq!(self.bits[index as usize / 64] & 1 << (index % 64), 0, "a chunk has one frame");
        self.bits[index as usize / 64] |= 1 << (index % 64);
        self.len += 1;
        u64::from(index) * u64::from(self.layout.frame_size)
    }

    /// The frame whose chunk holds UMEM address `address`, and the address' offset in the chunk; `None` if the set does
    /// not have it.
    pub(super) fn take(&mut self, address: u64) -> Option<(Frame, u32)> {
        let size = u64::from(self.layout.frame_size);
        let index = u32::try_from(address / size).ok().filter(|index| *index < self.layout.frames)?;
        let word = &mut self.bits[index as usize / 64];
        let bit = 1 << (index % 64);
        if *word & bit == 0 {
            return None;
        }
        *word &= !bit;
        self.len -= 1;
        let offset = (address % size) as u32;
        Some((Frame { index, umem: self.layout.umem }, offset))
    }

    /// Empties the set.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = Frame> {
        let size = u64::from(self.layout.frame_size);
        (0..u64::from(self.layout.frames)).filter_map(move |index| Some(self.take(index * size)?.0))
    }
}
