//! Zones: the device of a link-local address (fe80::/10), without which the address is not usable (RFC 4007).

use std::fmt;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

use rustix::net::{AddressFamily, SocketType, netdevice, socket};

/// Whether an address is not usable without a zone.
pub fn is_needed(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

/// An address and port on the device of index `ifindex`; the index is omitted if the address needs no zone.
pub fn socket_address(ip: IpAddr, port: u16, ifindex: u32) -> SocketAddr {
    match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => SocketAddrV6::new(ip, port, 0, ifindex).into(),
        ip => SocketAddr::new(ip, port),
    }
}

/// The same address in another zone, if it has one.
pub fn moved(address: SocketAddr, ifindex: u32) -> SocketAddr {
    socket_address(address.ip(), address.port(), ifindex)
}

/// Index of the device of a link-local address.
pub fn of(address: SocketAddr) -> Option<u32> {
    match address {
        SocketAddr::V6(address) if address.ip().is_unicast_link_local() => {
            Some(address.scope_id()).filter(|zone| *zone != 0)
        }
        _ => None,
    }
}

/// Index of the device with this name or this index.
pub fn find(zone: &str) -> Option<u32> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    let by_number = || zone.parse().ok().filter(|index| netdevice::index_to_name(&socket, *index).is_ok());
    netdevice::name_to_index(&socket, zone).ok().or_else(by_number)
}

/// Name of a device, or its index if the device is gone.
pub fn name(ifindex: u32) -> String {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None);
    let name = socket.and_then(|socket| netdevice::index_to_name(socket, ifindex));
    name.unwrap_or_else(|_| ifindex.to_string())
}

/// A carrier address in the operator's form: with its zone by name, such as `[fe80::1%eth0]:6789`.
#[derive(Clone, Copy, Debug)]
pub struct Shown(pub SocketAddr);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match of(self.0) {
            Some(zone) => write!(f, "[{}]:{}", ShownHost(self.0.ip(), Some(zone)), self.0.port()),
            None => self.0.fmt(f),
        }
    }
}

/// An address without a port, with the device of this index if it needs a zone, such as `fe80::1%eth0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShownHost(pub IpAddr, pub Option<u32>);

impl fmt::Display for ShownHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.1.filter(|_| is_needed(self.0)) {
            Some(zone) => write!(f, "{}%{}", self.0, name(zone)),
            None => self.0.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// The loopback device has this index in each network namespace.
    const LOOPBACK: u32 = 1;

    #[test]
    fn a_zone_is_found_by_name_and_by_number() {
        assert_eq!((find("lo"), find("1")), (Some(LOOPBACK), Some(LOOPBACK)));
        for none in ["", "0", "no-such-dev", "2147483647", "-1"] {
            assert_eq!(find(none), None, "{none}");
        }
    }

    #[test]
    fn link_local_addresses_alone_have_a_zone() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for (text, at_loopback) in [
            ("fe80::1", "[fe80::1%1]:6789"),
            ("febf::1", "[febf::1%1]:6789"),
            ("fec0::1", "[fec0::1]:6789"),
            ("fd00:c::1", "[fd00:c::1]:6789"),
            ("192.0.2.1", "192.0.2.1:6789"),
        ] {
            let at = socket_address(ip(text), 6789, LOOPBACK);
            assert_eq!((at, of(at).is_some()), (address(at_loopback), is_needed(ip(text))));
        }
        assert_eq!(of(address("[fe80::1]:6789")), None);
        assert_eq!(moved(address("[fe80::1%1]:6789"), 7), address("[fe80::1%7]:6789"));
    }

    #[test]
    fn an_address_is_shown_with_the_name_of_its_zone() {
        for (of, shown) in [
            ("[fe80::1%1]:6789", "[fe80::1%lo]:6789"),
            ("[fe80::1%2147483647]:6789", "[fe80::1%2147483647]:6789"),
            ("[fd00:c::1]:6789", "[fd00:c::1]:6789"),
            ("192.0.2.1:6789", "192.0.2.1:6789"),
        ] {
            assert_eq!(Shown(address(of)).to_string(), shown);
        }
    }
}
