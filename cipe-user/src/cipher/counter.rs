//! The clock for comparisons of ciphers.

/// Returns the time stamp counter, in cycles of its constant rate; `None` if the CPU has none.
pub fn cycles() -> Option<u64> {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: every x86-64 CPU has RDTSC, and Linux lets programs use it.
        Some(unsafe { std::arch::x86_64::_rdtsc() })
    }
    #[cfg(not(target_arch = "x86_64"))]
    None
}
