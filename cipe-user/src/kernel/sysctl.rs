//! Per-device switches of /proc/sys/net, which is read-only in containers.

use std::io;

use netlink_packet_route::link::{AfSpecInet, AfSpecUnspec, LinkAttribute};
use rtnetlink::packet_core::{DefaultNla, Emitable, NLA_F_NESTED};

use super::netlink::{Error, Netlink, Result};

/// `IFLA_INET_CONF` of linux/if_link.h.
const INET_CONF: u16 = 1;
/// Numbers of the IPv4 switches in it (linux/ip.h).
const IPV4_NUMBERS: [(&str, u16); 4] =
    [("forwarding", 1), ("rp_filter", 8), ("accept_local", 23), ("drop_unicast_in_l2_multicast", 30)];

/// IP version of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    /// net.ipv4.conf
    Ipv4,
    /// net.ipv6.conf
    Ipv6,
}

impl Netlink {
    /// Sets `net.<family>.conf.<device>.<switch>` in the network namespace of the calling thread.
    ///
    /// If /proc/sys cannot be written: a right value is left; a wrong value of IPv4 is set by netlink; a wrong value of
    /// IPv6 stays, with a warning.
    ///
    /// A device without IPv6 (none in the kernel, or an MTU below 1280) has no IPv6 switches: nothing is set, without
    /// an error.
    pub(super) async fn set_switch(
        &self,
        family: Family,
        (name, index): (&str, u32),
        switch: &str,
        value: &str,
    ) -> Result<()> {
        let Err(error) = set(family, name, switch, value) else { return Ok(()) };
        let found = get(family, name, switch);
        if found.as_deref() == Some(value) {
            return Ok(());
        }
        let number = IPV4_NUMBERS.iter().find(|(name, _)| *name == switch).map(|(_, number)| *number);
        match (family, number, value.parse::<u32>()) {
            (Family::Ipv4, Some(number), Ok(value)) => {
                self.set_ipv4_switch(index, number, value).await.map_err(|_| error)
            }
            (Family::Ipv6, _, _) if error.is_read_only() => {
                tracing::warn!(
                    "net.ipv6.conf.{name}.{switch} stays {}: {error}; set net.ipv6.conf.default.{switch}={value} outside of the \
                     container",
                    found.as_deref().unwrap_or("unknown")
                );
                Ok(())
            }
            _ => Err(error),
        }
    }

    async fn set_ipv4_switch(&self, index: u32, number: u16, value: u32) -> Result<()> {
        let switch = DefaultNla::new(number, value.to_ne_bytes().to_vec());
        let mut nested = vec![0; switch.buffer_len()];
        switch.emit(&mut nested);
        let conf = AfSpecInet::Other(DefaultNla::new(INET_CONF | NLA_F_NESTED, nested));
        let attribute = LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![conf])]);
        self.set_link(|| format!("device {index}: cannot set IPv4 switch {number}"), index, vec![attribute], None).await
    }
}

impl Error {
    fn is_read_only(&self) -> bool {
        match self {
            Self::Io { cause, .. } => {
                matches!(cause.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
            }
            _ => false,
        }
    }
}

fn set(family: Family, device: &str, switch: &str, value: &str) -> Result<()> {
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

/// The value of `net.<family>.conf.<device>.<switch>` in the network namespace of the calling thread, without the line
/// end; `None` for a device without the switch.
pub(super) fn get(family: Family, device: &str, switch: &str) -> Option<String> {
    let family = match family {
        Family::Ipv4 => "ipv4",
        Family::Ipv6 => "ipv6",
    };
    let text = std::fs::read_to_string(format!("/proc/sys/net/{family}/conf/{device}/{switch}")).ok()?;
    Some(text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::testnet::in_namespace;

    #[test]
    fn switches_of_ipv4_can_be_set_without_a_file() {
        in_namespace(|netlink| async move {
            let index = netlink.card_named("lo").await.unwrap().ifindex;
            for (name, number) in IPV4_NUMBERS {
                for value in ["1", "0", "1"] {
                    netlink.set_ipv4_switch(index, number, value.parse().unwrap()).await.unwrap();
                    assert_eq!(get(Family::Ipv4, "lo", name).as_deref(), Some(value), "{name}");
                }
            }
        });
    }
}
