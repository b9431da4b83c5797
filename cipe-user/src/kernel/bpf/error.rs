//! What can go wrong, each with its way out.

use std::{error::Error as StdError, fmt::Write as _, io};

use aya::{EbpfError, programs::ProgramError};

/// Boxed, so that aya's types do not leave this room.
type Cause = Box<dyn StdError + Send + Sync>;

/// Failure to load, attach or talk to the eBPF programs. The text holds the cause, which is therefore no `source()`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A capability is missing.
    #[error("{what} needs CAP_BPF and CAP_NET_ADMIN: run as root")]
    Privilege {
        /// What was tried.
        what: String,
    },
    /// The kernel does not take the programs or maps.
    #[error(
        "the kernel does not take the eBPF programs ({reason}); Linux 6.6 or later is needed, with BPF_SYSCALL, XDP_SOCKETS and NET_XGRESS"
    )]
    Load {
        /// The kernel's answer.
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
        /// The index asked for.
        ifindex: u32,
    },
    /// Someone else's XDP program is there.
    #[error("{device}: another XDP program is attached{program}; detach it with `ip link set {device} xdp off`")]
    Busy {
        /// Name of the device.
        device: String,
        /// " (id N)", or nothing if the kernel does not tell.
        program: String,
    },
    /// The device refuses the mode that was asked for.
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
    /// Sorts out what loading answered.
    pub(super) fn load(error: EbpfError) -> Self {
        if os_error(&error) == Some(libc::EPERM) {
            return Self::Privilege { what: "loading eBPF".to_owned() };
        }
        let EbpfError::ProgramError(ProgramError::LoadError { io_error, verifier_log }) = &error else {
            return Self::Load { reason: chain(&error) };
        };
        let log = verifier_log.to_string();
        log::debug!("the verifier's log:\n{log}");
        // Its last line is a summary of the work done; the one before says what is wrong.
        let complaint = log.lines().rfind(|line| !line.starts_with("processed ") && !line.trim().is_empty());
        Self::Load { reason: format!("{io_error}: {}", complaint.unwrap_or("the verifier says nothing")) }
    }
}

/// The system error at the bottom of a chain, if one is there.
pub(super) fn os_error(error: &(dyn StdError + 'static)) -> Option<i32> {
    std::iter::successors(Some(error), |error| (*error).source())
        .find_map(|error| error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error))
}

/// An error and what is behind it, in one line.
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
