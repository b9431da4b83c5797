//! What can go wrong, each with its way out.

use std::{error::Error as StdError, fmt::Write as _, io};

use aya::EbpfError;

/// Boxed, so that aya's types do not leave this room.
type Source = Box<dyn StdError + Send + Sync>;

/// Failure to load, attach or talk to the eBPF programs.
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
    #[error("eBPF map {map}: {}", chain(&**source))]
    Map {
        /// Name of the map.
        map: &'static str,
        /// aya's or the kernel's error.
        source: Source,
    },
    /// There is no such device.
    #[error("there is no network device with index {ifindex}; it may have been removed")]
    NoDevice {
        /// The index asked for.
        ifindex: u32,
    },
    /// Someone else's XDP program is there.
    #[error("{device}: another XDP program is attached{id}; detach it with `ip link set {device} xdp off`", id = match id { Some(id) => format!(" (id {id})"), None => String::new() })]
    Busy {
        /// Name of the device.
        device: String,
        /// The program's id, where the kernel tells.
        id: Option<u32>,
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
        match os_error(&error) {
            Some(libc::EPERM | libc::EACCES) if !mentions_verifier(&error) => {
                Self::Privilege { what: "loading eBPF".to_owned() }
            }
            _ => Self::Load { reason: chain(&error) },
        }
    }
}

/// The verifier answers EACCES too; then it has left a log.
fn mentions_verifier(error: &EbpfError) -> bool {
    matches!(error, EbpfError::ProgramError(aya::programs::ProgramError::LoadError { verifier_log, io_error })
        if io_error.raw_os_error() == Some(libc::EACCES) && !verifier_log.to_string().trim().is_empty())
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
