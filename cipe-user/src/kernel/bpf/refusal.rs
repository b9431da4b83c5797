//! How to solve a refusal of bpf(2), if the errno alone tells.

/// Returns how to solve an error of creating a map or loading a program; `None` if this depends on the request.
pub(super) fn remedy(errno: i32) -> Option<&'static str> {
    Some(match errno {
        // The memory cgroup is at its limit, even if the machine has free memory.
        libc::ENOMEM => {
            "a memory limit or the machine's memory is used up: raise the limit of its cgroup (memory.max, MemoryMax= of the \
             service; an engine with one worker takes some 100 MB), or free memory"
        }
        libc::EMFILE => "too many open files: raise the limit (ulimit -n, LimitNOFILE= of the service)",
        libc::ENFILE => "too many open files on this machine: raise fs.file-max",
        libc::EACCES => {
            "a security module forbids it (lockdown, SELinux, AppArmor): see its log, and allow the program bpf(2)"
        }
        libc::ENOSPC => "the kernel has no free eBPF id: end other programs that use eBPF",
        libc::E2BIG => "it is too large for this kernel: a newer kernel, or an engine with fewer tunnels, is needed",
        libc::EAGAIN | libc::EINTR => "the kernel was interrupted: start again",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::remedy;

    #[test]
    fn each_errno_has_a_sentence_of_its_own() {
        let errnos = [libc::ENOMEM, libc::EMFILE, libc::ENFILE, libc::EACCES, libc::ENOSPC, libc::E2BIG, libc::EAGAIN];
        let sentences: std::collections::BTreeSet<_> = errnos.iter().filter_map(|errno| remedy(*errno)).collect();
        assert_eq!(sentences.len(), errnos.len());
        assert!(remedy(libc::ENOMEM).is_some_and(|text| text.contains("MemoryMax")));
        assert_eq!(remedy(libc::EINVAL), None);
    }
}
