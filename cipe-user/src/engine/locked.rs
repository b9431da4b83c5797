//! The limit of locked memory (RLIMIT_MEMLOCK), which includes the memory of AF_XDP sockets.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// Returns the octets that this process may lock; `None`: no limit. Raises the limit first, as far as permitted.
pub(super) fn limit() -> Option<u64> {
    if capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK)) {
        return None;
    }
    let limit = getrlimit(Resource::Memlock);
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("cannot raise RLIMIT_MEMLOCK: {error}");
    }
    getrlimit(Resource::Memlock).current
}

/// Returns how many of `wanted` frames of `size` octets fit the limit, but at least [`MIN_FRAMES`]: with fewer nothing
/// works, so the kernel may refuse.
pub(super) fn frames(wanted: u32, size: u32, limit: Option<u64>) -> u32 {
    let most = limit.map_or(u32::MAX, |octets| u32::try_from(octets / u64::from(size)).unwrap_or(u32::MAX));
    wanted.min(most.max(MIN_FRAMES))
}

/// Minimum frames for a working tunnel: the fill rings of a hub and a carrier, and some batches.
const MIN_FRAMES: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_fit_the_limit_of_locked_memory() {
        assert_eq!(frames(32_768, 2048, None), 32_768);
        assert_eq!(frames(32_768, 2048, Some(8 << 20)), 4096);
        assert_eq!(frames(32_768, 4096, Some(8 << 20)), 2048);
        assert_eq!(frames(32_768, 2048, Some(1 << 40)), 32_768);
        assert_eq!(frames(32_768, 2048, Some(0)), MIN_FRAMES);
    }
}
