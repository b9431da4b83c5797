//! Memory that is shared with the kernel or with other processes: a map's values (`BPF_F_MMAPABLE` arrays), or a file without a name.

use std::{
    io,
    ops::Deref,
    os::fd::AsFd,
    ptr::{self, NonNull},
    slice,
    sync::atomic::AtomicU64,
};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// `N` 64-bit words, the shared unit. Atomics, because the kernel and other threads see every store.
pub(crate) type Words<const N: usize> = [AtomicU64; N];

/// An array of [`Words`] in shared memory; unmapped on drop. It may outlive the descriptor.
pub(crate) struct SharedArray<const N: usize> {
    base: NonNull<Words<N>>,
    len: usize,
}

// SAFETY: the mapping belongs to the value (no thread-local state), and all access goes through atomics.
unsafe impl<const N: usize> Send for SharedArray<N> {}
// SAFETY: as above; a shared reference gives atomics only.
unsafe impl<const N: usize> Sync for SharedArray<N> {}

impl<const N: usize> SharedArray<N> {
    /// Maps the first `len` elements of an array map with values of `8 * N` octets, or of a file that cannot shrink.
    ///
    /// # Errors
    /// The error of mmap(2): the map was not made mmapable, or is shorter than `len` elements.
    pub(crate) fn map(fd: impl AsFd, len: usize) -> io::Result<Self> {
        let octets = len * size_of::<Words<N>>();
        // SAFETY: the kernel chooses the address, so no existing mapping is touched; the new one is released in Drop
        // only. `octets` is not zero for any map (mmap refuses zero).
        let base = unsafe {
            mmap(ptr::null_mut(), octets, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd.as_fd(), 0)
        }?;
        Ok(Self { base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len })
    }
}

impl<const N: usize> Deref for SharedArray<N> {
    type Target = [Words<N>];

    fn deref(&self) -> &Self::Target {
        // SAFETY: base points to `len` elements, page aligned, mapped until Drop; any bit pattern is a valid atomic.
        unsafe { slice::from_raw_parts(self.base.as_ptr(), self.len) }
    }
}

impl<const N: usize> Drop for SharedArray<N> {
    fn drop(&mut self) {
        // SAFETY: exactly the region that `map` got; no reference outlives self. munmap fails only for a region that is
        // not mapped.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.len * size_of::<Words<N>>()) };
    }
}
