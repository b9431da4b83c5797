//! The errors of this module. Each message names the object and the remedy.

use rustix::io::Errno;

/// A set-up or system call of this module failed. The text includes the cause, so the error has no `source()`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size is not valid.
    #[error("AF_XDP {what} is {value}; {rule}")]
    Size {
        /// Which size.
        what: &'static str,
        /// The requested value.
        value: u64,
        /// The valid values.
        rule: &'static str,
    },
    /// The kernel refused the memory for the UMEM.
    #[error("UMEM of {octets} octets: {errno}{}", hint("mmap", *errno))]
    Memory {
        /// The requested octets.
        octets: usize,
        /// Why.
        errno: Errno,
    },
    /// A system call on a socket failed.
    #[error("{object}: {call}: {errno}{hint}")]
    Socket {
        /// Device and queue.
        object: String,
        /// The system call or socket option.
        call: &'static str,
        /// Why.
        errno: Errno,
        /// What to do about it, with a leading "; ", or empty.
        hint: &'static str,
    },
}

impl Error {
    /// The kernel's error number, if the kernel refused.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Size { .. } => None,
            Self::Memory { errno, .. } | Self::Socket { errno, .. } => Some(*errno),
        }
    }

    pub(super) fn socket(object: &str, call: &'static str, errno: Errno) -> Self {
        Self::Socket { object: object.to_owned(), call, errno, hint: hint(call, errno) }
    }
}

fn hint(call: &str, errno: Errno) -> &'static str {
    match (call, errno) {
        ("socket", Errno::AFNOSUPPORT) => "; AF_XDP is not supported by this kernel (CONFIG_XDP_SOCKETS)",
        ("socket", Errno::PERM) => "; AF_XDP needs CAP_NET_RAW, run as root",
        ("XDP_UMEM_REG", Errno::NOBUFS) => {
            "; the UMEM is over the limit of locked memory, which all processes of the user share: grant CAP_IPC_LOCK, or raise \
             RLIMIT_MEMLOCK (LimitMEMLOCK= of the service)"
        }
        ("XDP_UMEM_REG" | "mmap", Errno::NOMEM) => {
            "; raise the memory limit of its cgroup (memory.max, MemoryMax= of the service), or free memory"
        }
        ("mmap", Errno::AGAIN | Errno::PERM) => {
            "; memory may not be locked, raise RLIMIT_MEMLOCK (LimitMEMLOCK= of the service)"
        }
        ("XDP_UMEM_REG", Errno::INVAL) => "; the kernel refuses frames of this size or at this address, report it",
        ("socket", Errno::MFILE) => "; too many open files, raise the limit (ulimit -n, LimitNOFILE= of the service)",
        ("socket", Errno::NFILE) => "; too many open files on this machine, raise fs.file-max",
        ("bind", Errno::BUSY) => {
            "; another AF_XDP socket owns this queue, end the program that holds it (ss --xdp -p shows it)"
        }
        ("bind", Errno::INVAL) => {
            "; the device has no such queue, or the kernel is older than 6.6 and has no multi-buffer AF_XDP"
        }
        ("bind", Errno::OPNOTSUPP) => "; the driver has no zero copy, use copy mode",
        ("bind", Errno::NODEV) => "; the device is gone",
        ("bind" | "sendto", Errno::NETDOWN) => "; set the device up",
        ("sendto", Errno::NXIO) => "; the device is gone",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_the_queue_the_reason_and_the_way_out() {
        let text = Error::socket("wire0 queue 0", "bind", Errno::BUSY).to_string();
        assert!(text.starts_with("wire0 queue 0: bind: "), "{text}");
        assert!(text.contains("busy") && text.contains("another AF_XDP socket owns this queue"), "{text}");
    }

    #[test]
    fn each_refusal_of_the_memory_has_a_sentence_of_its_own() {
        let refused = |call, errno| Error::socket("wire0 queue 0", call, errno).to_string();
        assert!(refused("XDP_UMEM_REG", Errno::NOBUFS).contains("CAP_IPC_LOCK"));
        assert!(refused("XDP_UMEM_REG", Errno::NOMEM).contains("MemoryMax="));
        assert!(refused("socket", Errno::MFILE).contains("LimitNOFILE="));
        assert!(Error::Memory { octets: 1, errno: Errno::NOMEM }.to_string().contains("memory.max"));
    }

    #[test]
    fn a_kernel_without_af_xdp_is_named_as_such() {
        let text = Error::socket("wire0 queue 0", "socket", Errno::AFNOSUPPORT).to_string();
        assert!(text.contains("CONFIG_XDP_SOCKETS"), "{text}");
    }
}
