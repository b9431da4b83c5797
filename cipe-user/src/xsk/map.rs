//! Memory mappings: those of UMEMs and those of a socket's rings.

use std::ffi::c_void;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::atomic::AtomicU32;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use rustix::net::xdp::{XdpDesc, XdpRingOffset};

use super::ring;

const HUGE_PAGE: usize = 2 << 20;

/// Zeroed, readable and writable memory for a UMEM.
pub(super) struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that no thread owns; `umem.rs` decides who may access which part.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps at least `octets` octets of private memory, in huge pages if requested and possible.
    pub(super) fn anonymous(octets: usize, huge_pages: bool) -> Result<Self, Errno> {
        let rounded = octets.next_multiple_of(HUGE_PAGE);
        let huge = huge_pages.then(|| Self::map(rounded, MapFlags::HUGETLB | MapFlags::POPULATE).ok()).flatten();
        let memory = match huge {
            Some(memory) => memory,
            None => {
                let memory = Self::map(if huge_pages { rounded } else { octets }, MapFlags::empty())?;
                if huge_pages {
                    memory.advise(Advice::LinuxHugepage);
                }
                memory
            }
        };
        memory.exclude_from_dump_and_fork();
        Ok(memory)
    }

    /// Maps the first `octets` octets of `fd`, which must be memory, not a file on disk.
    pub(super) fn shared(fd: BorrowedFd<'_>, octets: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start =
            unsafe { mmap(ptr::null_mut(), octets, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, fd, 0)? };
        let memory = Self { start: NonNull::new(start.cast()).ok_or(Errno::NOMEM)?, len: octets };
        memory.exclude_from_dump_and_fork();
        Ok(memory)
    }

    /// Excludes the mapping from core dumps, because it contains packets in clear, and from child processes, because
    /// its pages are pinned.
    fn exclude_from_dump_and_fork(&self) {
        self.advise(Advice::LinuxDontDump);
        self.advise(Advice::LinuxDontFork);
    }

    fn map(len: usize, flags: MapFlags) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | flags)?
        };
        let start = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { start, len })
    }

    /// Gives the kernel advice; a refusal has no effect.
    fn advise(&self, advice: Advice) {
        // SAFETY: the range is the whole of our mapping, and none of the advices used here changes its contents.
        let _ = unsafe { madvise(self.start.as_ptr().cast(), self.len, advice) };
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every borrow of it ended with its `Umem`. Sockets may still have the pages
        // pinned; the kernel keeps such pages alive itself.
        let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The elements of the kernel's rings: types for which any octets are valid.
pub(super) trait Slot: Copy + Send {}

/// A UMEM address, in fill and completion rings.
impl Slot for u64 {}

/// A descriptor, in receive and transmit rings.
impl Slot for XdpDesc {}

/// A ring of a socket, shared with the kernel.
pub(super) struct Ring<T> {
    map: NonNull<c_void>,
    len: usize,
    slots: u32,
    producer: NonNull<AtomicU32>,
    consumer: NonNull<AtomicU32>,
    flags: NonNull<AtomicU32>,
    first: NonNull<T>,
    _slot: PhantomData<T>,
}

// SAFETY: the pointers lead into a mapping that the ring owns and that may be used from any thread; there is no `Sync`,
// since reading and writing slots is for one thread at a time.
unsafe impl<T: Slot> Send for Ring<T> {}

impl<T: Slot> Ring<T> {
    /// Maps the ring of `slots` slots at page offset `page` of a socket.
    pub(super) fn map(socket: BorrowedFd<'_>, page: u64, at: XdpRingOffset, slots: u32) -> Result<Self, Errno> {
        // Without flags the kernel is older than 5.4.
        let flags = at.flags.ok_or(Errno::NOSYS)?;
        let offset = |octets: u64| usize::try_from(octets).map_err(|_| Errno::RANGE);
        let (producer, consumer, flags, desc) =
            (offset(at.producer)?, offset(at.consumer)?, offset(flags)?, offset(at.desc)?);
        let len = (slots as usize)
            .checked_mul(size_of::<T>())
            .and_then(|octets| octets.checked_add(desc))
            .ok_or(Errno::RANGE)?;
        let index_fits =
            |at: usize| at.is_multiple_of(align_of::<AtomicU32>()) && at <= len.saturating_sub(size_of::<AtomicU32>());
        let sane = [producer, consumer, flags].into_iter().all(index_fits) && desc.is_multiple_of(align_of::<T>());
        if !slots.is_power_of_two() || !sane {
            return Err(Errno::RANGE);
        }
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let map = unsafe {
            let flags = MapFlags::SHARED | MapFlags::POPULATE;
            mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, socket, page)?
        };
        let map = NonNull::new(map).ok_or(Errno::NOMEM)?;
        // SAFETY: all offsets were checked to be inside the mapping's `len` octets and aligned; the mapping itself is
        // page aligned.
        let at = |offset: usize| unsafe { map.byte_add(offset) };
        Ok(Self {
            map,
            len,
            slots,
            producer: at(producer).cast(),
            consumer: at(consumer).cast(),
            flags: at(flags).cast(),
            first: at(desc).cast(),
            _slot: PhantomData,
        })
    }

    fn slot(&self, index: u32) -> NonNull<T> {
        // SAFETY: the masked index is below `slots`, and `slots` slots from `first` on are inside the mapping.
        unsafe { self.first.add((index & (self.slots - 1)) as usize) }
    }
}

impl<T: Slot> ring::Memory for Ring<T> {
    type Slot = T;

    fn slots(&self) -> u32 {
        self.slots
    }

    fn producer(&self) -> &AtomicU32 {
        // SAFETY: points into the mapping, which lives as long as `self`; the kernel accesses it atomically.
        unsafe { self.producer.as_ref() }
    }

    fn consumer(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.consumer.as_ref() }
    }

    fn flags(&self) -> &AtomicU32 {
        // SAFETY: as in `producer`.
        unsafe { self.flags.as_ref() }
    }

    fn read(&self, index: u32) -> T {
        // SAFETY: `slot` is inside the mapping and aligned; any octets are a `Slot`. The caller reads
        // only what the producer has published, so the kernel does not write there now.
        unsafe { self.slot(index).read() }
    }

    fn write(&self, index: u32, slot: T) {
        // SAFETY: as in `read`; the caller writes only slots that the kernel has released.
        unsafe { self.slot(index).write(slot) }
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.map.as_ptr(), self.len) };
    }
}
