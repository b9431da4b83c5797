//! A ring in plain memory; a test can hold both of its ends.

use std::cell::UnsafeCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::ring::Memory;

/// A ring; clones share the same memory.
pub(super) struct Heap<T>(Arc<Shared<T>>);

struct Shared<T> {
    producer: AtomicU32,
    consumer: AtomicU32,
    flags: AtomicU32,
    slots: Box<[UnsafeCell<T>]>,
}

// SAFETY: slots are written by one producer and read by one consumer, ordered by the two indices as `ring.rs`
// describes; miri and thread sanitizers see a race here if that order is broken.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Copy + Default> Heap<T> {
    /// An empty ring whose indices start at `index`.
    pub(super) fn new(slots: u32, index: u32) -> Self {
        Self(Arc::new(Shared {
            producer: AtomicU32::new(index),
            consumer: AtomicU32::new(index),
            flags: AtomicU32::new(0),
            slots: (0..slots).map(|_| UnsafeCell::default()).collect(),
        }))
    }
}

impl<T> Heap<T> {
    pub(super) fn set_flags(&self, flags: u32) {
        self.0.flags.store(flags, Ordering::Relaxed);
    }

    /// Sets the producer's index to any value.
    pub(super) fn set_producer(&self, index: u32) {
        self.0.producer.store(index, Ordering::Release);
    }

    /// Sets the consumer's index to any value.
    pub(super) fn set_consumer(&self, index: u32) {
        self.0.consumer.store(index, Ordering::Release);
    }
}

impl<T> Clone for Heap<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Copy> Memory for Heap<T> {
    type Slot = T;

    fn slots(&self) -> u32 {
        self.0.slots.len() as u32
    }

    fn producer(&self) -> &AtomicU32 {
        &self.0.producer
    }

    fn consumer(&self) -> &AtomicU32 {
        &self.0.consumer
    }

    fn flags(&self) -> &AtomicU32 {
        &self.0.flags
    }

    fn read(&self, index: u32) -> T {
        let slot = &self.0.slots[index as usize % self.0.slots.len()];
        // SAFETY: the consumer reads published slots only, which the producer leaves alone until they are released.
        unsafe { *slot.get() }
    }

    fn write(&self, index: u32, value: T) {
        let slot = &self.0.slots[index as usize % self.0.slots.len()];
        // SAFETY: the producer writes released slots only, which the consumer leaves alone until they are published.
        unsafe { *slot.get() = value }
    }
}
