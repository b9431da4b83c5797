//! The errors of this module, each with its solution.

use std::{error::Error as StdError, fmt::Write as _, io};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use cipe_common::maps::names;

use super::{refusal, verifier};
use crate::kernel::release::running;

/// Boxed, so that aya's types stay inside this module.
type Cause = Box<dyn StdError + Send + Sync>;

/// A failure to load, attach or use the eBPF programs. The text includes the cause, so the error has no `source()`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capability is missing.
    #[error(
        "{what} needs CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN: run as root, or grant them; in a container its seccomp profile must \
         allow bpf(2), too"
    )]
    Privilege {
        /// The attempted operation.
        what: String,
    },
    /// The kernel has no bpf(2).
    #[error("Linux {kernel} is built without BPF_SYSCALL; use a kernel that has it, such as any distribution's")]
    NoBpf {
        /// Release of the running kernel.
        kernel: String,
    },
    /// The number of CPUs cannot be read.
    #[error("{path}: {cause}; the number of CPUs is read there: mount sysfs on /sys")]
    Cpus {
        /// The file.
        path: &'static str,
        /// Why it cannot be read.
        cause: io::Error,
    },
    /// The kernel refuses to make a map.
    #[error("Linux {kernel} does not make the eBPF map {map} ({reason}); {remedy}")]
    MapRefused {
        /// Release of the running kernel.
        kernel: String,
        /// Name of the map.
        map: String,
        /// The kernel's answer.
        reason: String,
        /// How to solve it.
        remedy: &'static str,
    },
    /// The kernel's verifier refuses a program.
    #[error(
        "the verifier of Linux {kernel} refuses the eBPF program {program} ({reason}); take a kernel that is known to load it \
         (docs/KERNELS.md), and report this line"
    )]
    Refused {
        /// Release of the running kernel.
        kernel: String,
        /// Name of the program.
        program: &'static str,
        /// The verifier's objection, and where in the program it is.
        reason: String,
    },
    /// The kernel refuses a program before its verifier has checked it.
    #[error("Linux {kernel} does not know the kind of the eBPF program {program} ({reason}); {remedy}")]
    KindRefused {
        /// Release of the running kernel.
        kernel: String,
        /// Name of the program.
        program: &'static str,
        /// The kernel's answer.
        reason: String,
        /// How to solve it.
        remedy: &'static str,
    },
    /// The object cannot be read or does not fit the loader.
    #[error(
        "the eBPF object cannot be loaded ({reason}); if CIPE_BPF_OBJECT is set, unset it, else rebuild the object with \
         `cargo xtask build-ebpf`"
    )]
    Load {
        /// What is wrong with it.
        reason: String,
    },
    /// The object lacks a program or map.
    #[error("the eBPF object has no {name} of the right kind; rebuild it with `cargo xtask build-ebpf`")]
    Object {
        /// The missing name.
        name: &'static str,
    },
    /// A map operation failed.
    #[error("eBPF map {map}: {}", chain(&**cause))]
    Map {
        /// Name of the map.
        map: &'static str,
        /// aya's or the kernel's error.
        cause: Cause,
    },
    /// There is no such device.
    #[error("there is no network device with index {ifindex}; it may have been removed")]
    NoDevice {
        /// The requested index.
        ifindex: u32,
    },
    /// Another program's XDP program is attached.
    #[error("{device}: another XDP program is attached{program}; detach it with `ip link set {device} xdp off`")]
    Busy {
        /// Name of the device.
        device: String,
        /// " (id N)", or empty if the kernel does not report it.
        program: String,
    },
    /// The device refuses the requested mode.
    #[error("{device}: native XDP refused ({reason}); use generic XDP (xdp-mode=generic)")]
    NativeRefused {
        /// Name of the device.
        device: String,
        /// Why, in words.
        reason: String,
    },
    /// Any other failure to attach.
    #[error("{device}: {program} cannot be attached: {reason}")]
    Attach {
        /// Name of the device.
        device: String,
        /// Name of the program.
        program: &'static str,
        /// The kernel's answer.
        reason: String,
    },
}

impl Error {
    /// Turns an error of reading the object and making its maps into this type.
    pub(super) fn object(error: &EbpfError) -> Self {
        match os_error(error) {
            Some(libc::EPERM) => return Self::Privilege { what: "loading eBPF".to_owned() },
            Some(libc::ENOSYS) => return Self::NoBpf { kernel: running() },
            _ => {}
        }
        let EbpfError::MapError(MapError::CreateError { name, io_error }) = error else {
            return Self::Load { reason: chain(error) };
        };
        let sockets = [names::PRIVATE_SOCKETS, names::CARRIER_SOCKETS, names::LAN_SOCKETS];
        let remedy = match io_error.raw_os_error() {
            Some(libc::EINVAL) if sockets.contains(&name.as_str()) => "a kernel with XDP_SOCKETS is needed",
            Some(errno) if refusal::remedy(errno).is_some() => refusal::remedy(errno).unwrap_or_default(),
            _ => "Linux 6.1 or later is needed",
        };
        Self::MapRefused { kernel: running(), map: name.clone(), reason: io_error.to_string(), remedy }
    }

    /// Turns an error of loading a program into this type.
    pub(super) fn program(program: &'static str, error: &ProgramError) -> Self {
        match os_error(error) {
            Some(libc::EPERM) => return Self::Privilege { what: "loading eBPF".to_owned() },
            Some(libc::ENOSYS) => return Self::NoBpf { kernel: running() },
            _ => {}
        }
        let ProgramError::LoadError { io_error, verifier_log } = error else {
            return Self::Load { reason: format!("{program}: {}", chain(error)) };
        };
        let log = verifier_log.to_string();
        tracing::debug!("{program}: the verifier's log:\n{log}");
        let kernel = running();
        match verifier::complaint(&log) {
            Some(complaint) => Self::Refused { kernel, program, reason: format!("{io_error}: {complaint}") },
            None => {
                let remedy = match program {
                    _ if io_error.raw_os_error().and_then(refusal::remedy).is_some() => {
                        io_error.raw_os_error().and_then(refusal::remedy).unwrap_or_default()
                    }
                    names::PRIVATE_TC | names::ETHERNET_TC => "a kernel with NET_CLS_BPF or NET_XGRESS is needed",
                    _ => "XDP programs for frames of several pieces are needed, which Linux 5.18 brought",
                };
                Self::KindRefused { kernel, program, reason: io_error.to_string(), remedy }
            }
        }
    }
}

/// The system error at the end of a chain, if there is one.
pub(super) fn os_error(error: &(dyn StdError + 'static)) -> Option<i32> {
    std::iter::successors(Some(error), |error| (*error).source())
        .find_map(|error| error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error))
}

/// An error and its causes, in one line.
pub(super) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            // Writing to a String cannot fail.
            let _ = write!(text, ": {cause_text}");
        }
        next = cause.source();
    }
    text
}
