//! Scheduling of the calling thread: its CPU and its policy (sched(7)).

use std::io;

use rustix::thread::{CpuSet, sched_setaffinity};

/// The scheduling policies without real-time priority that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SchedulingPolicy {
    /// SCHED_OTHER: a thread that wakes may preempt the running one.
    Other,
    /// SCHED_BATCH: a thread that wakes waits until the running one sleeps or has used its time slice.
    Batch,
}

/// Keeps the calling thread on one CPU.
///
/// # Errors
/// EINVAL: this process may not use that CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    Ok(sched_setaffinity(None, &set)?)
}

/// The policy of the calling thread; none for any other policy, which somebody must have chosen deliberately.
pub fn policy() -> Option<SchedulingPolicy> {
    // SAFETY: takes a number and returns one; 0 is the calling thread, so the argument is always valid.
    match unsafe { libc::sched_getscheduler(0) } {
        libc::SCHED_OTHER => Some(SchedulingPolicy::Other),
        libc::SCHED_BATCH => Some(SchedulingPolicy::Batch),
        _ => None,
    }
}

/// Sets the policy of the calling thread; its nice value does not change.
///
/// # Errors
/// EPERM: a security module or seccomp filter forbids it.
pub fn set_policy(policy: SchedulingPolicy) -> io::Result<()> {
    let number = match policy {
        SchedulingPolicy::Other => libc::SCHED_OTHER,
        SchedulingPolicy::Batch => libc::SCHED_BATCH,
    };
    let parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads the parameters, which live until it returns; 0 is the calling thread.
    if unsafe { libc::sched_setscheduler(0, number, &raw const parameters) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_holds_for_the_thread_that_sets_it_alone() {
        std::thread::scope(|scope| {
            let other = scope.spawn(|| {
                assert_eq!(policy(), Some(SchedulingPolicy::Other));
                set_policy(SchedulingPolicy::Batch).unwrap();
                assert_eq!(policy(), Some(SchedulingPolicy::Batch));
                set_policy(SchedulingPolicy::Other).unwrap();
                assert_eq!(policy(), Some(SchedulingPolicy::Other));
                set_policy(SchedulingPolicy::Batch).unwrap();
            });
            other.join().unwrap();
        });
        assert_eq!(policy(), Some(SchedulingPolicy::Other));
    }

    #[test]
    fn a_cpu_that_is_not_there_is_refused() {
        assert_eq!(pin(CpuSet::MAX_CPU - 1).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
