//! The two ends of an AF_XDP ring: a power-of-two array of slots between one producer and one consumer.
//!
//! Indices are u32 that wrap; they are masked when a slot is accessed. Each side owns one index and reads the other's:
//! - The producer writes slots, then stores its index with Release; the consumer loads it with Acquire, so it sees the
//!   slots that the index covers.
//! - The consumer reads slots, then stores its index with Release; the producer loads it with Acquire, so it overwrites
//!   no slot that is still being read.
//!
//! The kernel does the same on its side (net/xdp/xsk_queue.h, "The structure of the shared state of the rings"). If the
//! kernel's index is impossible (more slots in use than there are), the ring counts as empty or full.

use std::sync::atomic::{AtomicU32, Ordering};

/// `XDP_RING_NEED_WAKEUP`: the kernel sleeps, and needs a system call to see new slots.
const NEED_WAKEUP: u32 = 1;

/// Memory of a ring: kernel memory in a socket, plain memory in tests.
pub(super) trait Memory {
    /// A descriptor or an address.
    type Slot: Copy;

    /// Number of slots, a power of two.
    fn slots(&self) -> u32;
    /// Index of the next slot to be written.
    fn producer(&self) -> &AtomicU32;
    /// Index of the next slot to be read.
    fn consumer(&self) -> &AtomicU32;
    /// Flags that the kernel sets for the producer.
    fn flags(&self) -> &AtomicU32;
    /// Reads slot `index` modulo [`Memory::slots`]; called by the consumer, on slots that the producer has published.
    fn read(&self, index: u32) -> Self::Slot;
    /// Writes slot `index` modulo [`Memory::slots`]; called by the producer, on slots that the consumer has released.
    fn write(&self, index: u32, slot: Self::Slot);
}

/// Our end of a ring that the kernel consumes: fill or transmit.
pub(super) struct Producer<M> {
    memory: M,
    /// Next slot to write; ahead of the shared index until [`Producer::submit`].
    head: u32,
    /// The last known value of the consumer's index.
    tail: u32,
}

impl<M: Memory> Producer<M> {
    pub(super) fn new(memory: M) -> Self {
        let head = memory.producer().load(Ordering::Relaxed);
        let tail = memory.consumer().load(Ordering::Acquire);
        Self { memory, head, tail }
    }

    pub(super) fn slots(&self) -> u32 {
        self.memory.slots()
    }

    /// Returns the number of free slots. Reads the consumer's index only if fewer than `want` are known to be free.
    pub(super) fn free(&mut self, want: u32) -> u32 {
        let known = self.slots().saturating_sub(self.head.wrapping_sub(self.tail));
        if known >= want {
            return known;
        }
        self.tail = self.memory.consumer().load(Ordering::Acquire);
        self.slots().saturating_sub(self.head.wrapping_sub(self.tail))
    }

    /// Writes the next slot; the consumer does not see it before [`Producer::submit`]. Returns false, and writes
    /// nothing, if the ring is full.
    pub(super) fn push(&mut self, slot: M::Slot) -> bool {
        if self.free(1) == 0 {
            return false;
        }
        self.memory.write(self.head, slot);
        self.head = self.head.wrapping_add(1);
        true
    }

    /// Makes everything pushed so far visible to the consumer.
    pub(super) fn submit(&mut self) {
        self.memory.producer().store(self.head, Ordering::Release);
    }

    /// Returns the number of slots that are pushed and not yet consumed.
    pub(super) fn pending(&mut self) -> u32 {
        self.tail = self.memory.consumer().load(Ordering::Acquire);
        self.head.wrapping_sub(self.tail).min(self.slots())
    }

    /// Returns the slots that [`Producer::pending`] counted. Call it only after the consumer has stopped for good.
    pub(super) fn unconsumed(&mut self) -> impl Iterator<Item = M::Slot> {
        let pending = self.pending();
        let start = self.head.wrapping_sub(pending);
        (0..pending).map(move |n| self.memory.read(start.wrapping_add(n)))
    }

    /// Whether the consumer waits for a system call.
    pub(super) fn needs_wakeup(&self) -> bool {
        self.memory.flags().load(Ordering::Relaxed) & NEED_WAKEUP != 0
    }
}

/// Our end of a ring that the kernel fills: receive or completion.
pub(super) struct Consumer<M> {
    memory: M,
    /// Next slot to read, equal to the shared index.
    tail: u32,
}

impl<M: Memory> Consumer<M> {
    pub(super) fn new(memory: M) -> Self {
        let tail = memory.consumer().load(Ordering::Relaxed);
        Self { memory, tail }
    }

    pub(super) fn slots(&self) -> u32 {
        self.memory.slots()
    }

    /// Returns the number of slots that can be read.
    pub(super) fn available(&self) -> u32 {
        let available = self.memory.producer().load(Ordering::Acquire).wrapping_sub(self.tail);
        if available <= self.slots() { available } else { 0 }
    }

    /// Returns slot number `n` of those that [`Consumer::available`] counted.
    pub(super) fn peek(&self, n: u32) -> M::Slot {
        self.memory.read(self.tail.wrapping_add(n))
    }

    /// Releases the first `n` available slots to the producer.
    pub(super) fn release(&mut self, n: u32) {
        self.tail = self.tail.wrapping_add(n);
        self.memory.consumer().store(self.tail, Ordering::Release);
    }
}
