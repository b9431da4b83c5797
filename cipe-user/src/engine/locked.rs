//! How much memory an engine may lock, as the memory of AF_XDP sockets is.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// Octets that this process may lock; `None`: as many as there are. The limit is first raised as far as it may.
pub(super) fn limit() -> Option<u64> {
    if capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::IPC_LOCK)) {
        return None;
    }
    let limit = getrlimit(Resource::Memlock);
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: limit.maximum, ..limit }) {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
    getrlimit(Resource::Memlock).current
}

/// How many of `wanted` frames of `size` octets fit a limit. Below [`LEAST`] nothing works; then it is the kernel that refuses.
pub(super) fn frames(wanted: u32, size: u32, limit: Option<u64>) -> u32 {
    let most = limit.map_or(u32::MAX, |octets| u32::try_from(octets / u64::from(size)).unwrap_or(u32::MAX));
    wanted.min(most.max(LEAST))
}

/// Frames with which a tunnel still works: those in the fill rings of a hub and a carrier, and some batches.
const LEAST: u32 = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_fit_the_limit_of_locked_memory() {
        assert_eq!(frames(32_768, 2048, None), 32_768);
        assert_eq!(frames(32_768, 2048, Some(8 << 20)), 4096);
        assert_eq!(frames(32_768, 4096, Some(8 << 20)), 2048);
        assert_eq!(frames(32_768, 2048, Some(1 << 40)), 32_768);
        assert_eq!(frames(32_768, 2048, Some(0)), LEAST);
    }
}
