//! Per-device switches that only /proc/sys has.

use super::netlink::{Error, Result};

/// IP version of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// net.ipv4.conf
    Ipv4,
    /// net.ipv6.conf
    Ipv6,
}

/// Sets `net.<family>.conf.<device>.<switch>` in the network namespace of the calling thread.
///
/// A device without IPv6 (none in the kernel, or an MTU below 1280) has none of its switches: nothing to set, no error.
pub(super) fn set(family: Family, device: &str, switch: &str, value: &str) -> Result<()> {
    let directory = match family {
        Family::Ipv4 => format!("/proc/sys/net/ipv4/conf/{device}"),
        Family::Ipv6 => format!("/proc/sys/net/ipv6/conf/{device}"),
    };
    let path = format!("{directory}/{switch}");
    match std::fs::write(&path, value) {
        Err(_) if family == Family::Ipv6 && !std::path::Path::new(&directory).exists() => Ok(()),
        result => result.map_err(|cause| Error::Io { what: format!("{path}: cannot write {value}"), cause }),
    }
}

/// What `net.<family>.conf.<device>.<switch>` says in the network namespace of the calling thread, without the end of the
/// line; `None` for a device that has none.
pub(super) fn get(family: Family, device: &str, switch: &str) -> Option<String> {
    let family = match family {
        Family::Ipv4 => "ipv4",
        Family::Ipv6 => "ipv6",
    };
    let text = std::fs::read_to_string(format!("/proc/sys/net/{family}/conf/{device}/{switch}")).ok()?;
    Some(text.trim_end().to_owned())
}
