//! The owners of chunks: frames, the pool of free frames, packets, and the set of frames that a socket has given to the
//! kernel.
//!
//! The unsafe blocks of `umem.rs` depend on this invariant: each chunk either has one [`Frame`], or is in one
//! [`FrameSet`], never both and never twice. Frames are made in two places only: [`Pool::full`] makes all of them, once
//! for each UMEM, and [`FrameSet::take`] makes one and removes the set's entry.

use super::umem::{Layout, Umem};

/// The exclusive right to use one chunk of a UMEM. A dropped frame leaks its chunk until the UMEM is dropped; the leak
/// shows as the difference between [`Pool::total`] and the frames counted elsewhere.
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

/// The free frames of one UMEM: last in, first out, because a chunk that was used last is still in the cache.
#[derive(Debug)]
pub struct Pool {
    free: Vec<Frame>,
    total: usize,
    layout: Layout,
}

impl Pool {
    /// Makes all frames of a new UMEM. Call it once for each [`Layout::umem`].
    pub(super) fn full(layout: Layout) -> Self {
        let free: Vec<Frame> = (0..layout.frames).rev().map(|index| Frame { index, umem: layout.umem }).collect();
        Self { total: free.len(), free, layout }
    }

    /// Splits a full pool into `count` pools; their sizes differ by at most one frame.
    pub fn split(mut self, count: usize) -> Vec<Self> {
        let pool = |left: usize| {
            let free = self.free.split_off(self.free.len() - self.free.len() / left);
            Self { total: free.len(), free, layout: self.layout }
        };
        (1..=count).rev().map(pool).collect()
    }

    /// Takes a free frame. Its chunk still contains old octets.
    pub fn take(&mut self) -> Option<Frame> {
        self.free.pop()
    }

    /// Returns a frame to the pool.
    ///
    /// # Panics
    /// If the frame belongs to another UMEM.
    pub fn put(&mut self, frame: Frame) {
        self.layout.own(&frame);
        self.free.push(frame);
    }

    /// Number of frames in the pool.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Number of frames in the full pool. Equal to [`Pool::free`] when all sockets are closed and all packets are
    /// returned.
    pub fn total(&self) -> usize {
        self.total
    }

    pub(super) fn layout(&self) -> Layout {
        self.layout
    }
}

/// The part of a packet in one descriptor.
#[derive(Debug)]
pub struct Packet {
    /// The chunk that holds the octets.
    pub frame: Frame,
    /// Position of the first octet in the chunk. A received packet starts at 256 (`XDP_PACKET_HEADROOM`) plus the
    /// UMEM's headroom, unless the XDP program moved it.
    pub offset: u32,
    /// Length in octets.
    pub len: u32,
    /// Whether the packet continues in the next descriptor (`XDP_PKT_CONTD`).
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

    /// The octets of this descriptor, mutable.
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

    /// Adds the frame to the set and returns the UMEM address where its chunk starts.
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

    /// Removes and returns the frame whose chunk contains UMEM address `address`, with the offset of the address in the
    /// chunk; `None` if it is not in the set.
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
