//! The system calls of an engine (seccomp).

use std::collections::BTreeMap;

use libc::*;
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
    apply_filter,
};

/// System calls without a condition. They are those of the engine, and those that the standard library, tokio or a C library may
/// choose in their place.
#[rustfmt::skip]
const ALLOWED: &[c_long] = &[
    // Descriptors.
    SYS_read, SYS_readv, SYS_pread64, SYS_preadv, SYS_write, SYS_writev, SYS_pwrite64, SYS_pwritev, SYS_close,
    SYS_close_range, SYS_dup, SYS_dup2, SYS_dup3, SYS_lseek, SYS_pipe2, SYS_eventfd2,
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2, SYS_poll, SYS_ppoll,
    SYS_timerfd_create, SYS_timerfd_settime, SYS_signalfd4,
    // Files; Landlock decides which.
    SYS_open, SYS_openat, SYS_stat, SYS_fstat, SYS_lstat, SYS_newfstatat, SYS_statx, SYS_access, SYS_faccessat,
    SYS_faccessat2, SYS_readlink, SYS_readlinkat, SYS_getdents64, SYS_getcwd, SYS_flock, SYS_ftruncate, SYS_fallocate,
    SYS_fsync, SYS_fdatasync, SYS_mkdir, SYS_mkdirat, SYS_rmdir, SYS_unlink, SYS_unlinkat, SYS_rename, SYS_renameat,
    SYS_renameat2, SYS_fchmod, SYS_memfd_create,
    // Sockets but for their kinds.
    SYS_socketpair, SYS_bind, SYS_connect, SYS_listen, SYS_accept4, SYS_shutdown, SYS_getsockopt, SYS_setsockopt,
    SYS_getsockname, SYS_getpeername, SYS_sendto, SYS_sendmsg, SYS_sendmmsg, SYS_recvfrom, SYS_recvmsg, SYS_recvmmsg,
    // eBPF, and the log of its programs.
    SYS_bpf, SYS_perf_event_open,
    // Memory but for its protection.
    SYS_munmap, SYS_mremap, SYS_madvise, SYS_brk, SYS_membarrier, SYS_mlock, SYS_mlock2, SYS_munlock, SYS_mlockall,
    // Threads, scheduling and signals of this process.
    SYS_clone, SYS_clone3, SYS_exit, SYS_exit_group, SYS_futex, SYS_set_robust_list, SYS_rseq, SYS_set_tid_address,
    SYS_gettid, SYS_getpid, SYS_getppid, SYS_sched_getaffinity, SYS_sched_getscheduler,
    SYS_sched_getparam, SYS_sched_getattr, SYS_sched_yield, SYS_getpriority,
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait, SYS_sigaltstack,
    SYS_restart_syscall,
    // Time, limits, and what the process is.
    SYS_clock_gettime, SYS_clock_getres, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday, SYS_time, SYS_getrandom,
    SYS_uname, SYS_sysinfo, SYS_getcpu, SYS_prctl, SYS_arch_prctl, SYS_getrlimit, SYS_setrlimit,
    SYS_getrusage, SYS_getuid, SYS_geteuid, SYS_getgid, SYS_getegid, SYS_capget,
];

/// fcntl(2) and ioctl(2): the owner of a descriptor, which the kernel signals (asm-generic/fcntl.h and sockios.h).
const F_SETOWN_EX: c_int = 15;
const FIOSETOWN: u64 = 0x8901;
const SIOCSPGRP: u64 = 0x8902;

/// The kinds of sockets.
const DOMAINS: [c_int; 6] = [AF_UNIX, AF_INET, AF_INET6, AF_NETLINK, AF_PACKET, AF_XDP];

/// Refuses all system calls but those of an engine to the calling thread and to threads that it starts later. No program is executed,
/// no other process signalled or scheduled, and no memory made executable. `ends`: a refused call ends the process.
///
/// Refused calls seem not to exist (ENOSYS), so that a C library which prefers a later call falls back to the earlier one.
pub(super) fn filter(ends: bool) -> Result<(), seccompiler::Error> {
    let condition = |index, length, operator, value| SeccompCondition::new(index, length, operator, value);
    let not_executable = |index| {
        let executable = PROT_EXEC as u64;
        SeccompRule::new(vec![condition(index, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?])
    };
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    rules.insert(SYS_mmap, vec![not_executable(2)?]);
    rules.insert(SYS_mprotect, vec![not_executable(2)?]);
    // Signals to this process and limits of this process only: user 0 may do that to all processes of root.
    let own = u64::from(std::process::id());
    let of_thread = [SYS_sched_setaffinity, SYS_sched_setscheduler, SYS_sched_setattr].map(|call| (call, 0));
    for (call, process) in [(SYS_tgkill, own), (SYS_prlimit64, 0)].into_iter().chain(of_thread) {
        let is_own = condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, process)?;
        rules.insert(call, vec![SeccompRule::new(vec![is_own])?]);
    }
    // The kernel signals the owner of a descriptor, which may be any process.
    for (call, setters) in [(SYS_fcntl, [F_SETOWN as u64, F_SETOWN_EX as u64]), (SYS_ioctl, [FIOSETOWN, SIOCSPGRP])] {
        let is_other = |setter| condition(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, setter);
        rules.insert(call, vec![SeccompRule::new(setters.into_iter().map(is_other).collect::<Result<_, _>>()?)?]);
    }
    let socket =
        |domain: c_int| SeccompRule::new(vec![condition(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, domain as u64)?]);
    rules.insert(SYS_socket, DOMAINS.into_iter().map(socket).collect::<Result<_, _>>()?);
    let refused = if ends { SeccompAction::KillProcess } else { SeccompAction::Errno(ENOSYS as u32) };
    let filter = SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    let program: seccompiler::BpfProgram = filter.try_into()?;
    apply_filter(&program)
}
