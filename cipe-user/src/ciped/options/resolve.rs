//! Names of hosts and services.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use super::endpoint::EndpointName;
use super::problem::Mistake;
use super::value::HostName;
use crate::kernel::zone;

/// Returns every address of a host, at least one, with port 0. Link-local addresses have the zone from the resolver.
///
/// # Errors
/// The name does not resolve.
fn host(name: &str) -> Result<Vec<SocketAddr>, Mistake> {
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, 0)]);
    }
    let fix = "write an IP address, or make the name resolve (/etc/hosts, DNS)";
    let found: Vec<SocketAddr> = match (name, 0).to_socket_addrs() {
        Ok(found) => found.collect(),
        Err(error) => {
            return Err(Mistake::new(format!("host `{name}` does not resolve ({error})"), fix).without_keys());
        }
    };
    if found.is_empty() {
        return Err(Mistake::new(format!("host `{name}` has no address"), fix).without_keys());
    }
    Ok(found)
}

/// Returns one address of a host on the tunnel, without a zone: of the family of `like` if that is given, otherwise
/// IPv4 before IPv6.
///
/// # Errors
/// The name does not resolve, has no address of this family, or has a zone.
pub(super) fn one_host(name: &HostName, like: Option<IpAddr>) -> Result<IpAddr, Mistake> {
    if let Some((host, zone)) = name.0.split_once('%') {
        let what = format!("`{name}` has a zone; here the zone is always the tunnel's interface");
        return Err(Mistake::new(what, format!("write {host} without %{zone}")).without_keys());
    }
    one_of(&host(&name.0)?, &name.0, like).map(|address| address.ip())
}

/// Chooses one of the addresses of `name`: the first of the family of `like`, or the first IPv4 one before IPv6; an
/// address that lacks its zone comes last.
fn one_of(found: &[SocketAddr], name: &str, like: Option<IpAddr>) -> Result<SocketAddr, Mistake> {
    let wants = |address: &&SocketAddr| like.is_none_or(|like| address.is_ipv4() == like.is_ipv4());
    let rank = |address: &&SocketAddr| (lacks_zone(**address), address.is_ipv6());
    found.iter().filter(wants).min_by_key(rank).copied().ok_or_else(|| {
        let family = if like.is_some_and(|like| like.is_ipv4()) { "IPv4" } else { "IPv6" };
        let what = format!("`{name}` has no {family} address");
        Mistake::new(what, "use one address family at both ends of the tunnel").without_keys()
    })
}

fn lacks_zone(address: SocketAddr) -> bool {
    zone::is_needed(address.ip()) && zone::of(address).is_none()
}

/// Returns a port number, from a number or a UDP service of /etc/services.
///
/// # Errors
/// No such service.
pub(super) fn port(name: &str) -> Result<u16, Mistake> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let services = std::fs::read("/etc/services").unwrap_or_default();
    service(&String::from_utf8_lossy(&services), name).ok_or_else(|| {
        Mistake::new(
            format!("`{name}` is neither a port nor a UDP service"),
            "write a number from 0 to 65535, or add it to /etc/services",
        )
    })
}

/// Looks a UDP service or one of its aliases up in the text of a services(5) file.
fn service(services: &str, name: &str) -> Option<u16> {
    services.lines().find_map(|line| {
        let line = line.split_once('#').map_or(line, |(before, _)| before);
        let mut words = line.split_whitespace();
        let official = words.next()?;
        let (port, protocol) = words.next()?.split_once('/')?;
        let named = official == name || words.any(|alias| alias == name);
        (named && protocol == "udp").then(|| port.parse().ok())?
    })
}

/// Returns the carrier address of `name`; the family is chosen as in [`one_host`]. The zone of a link-local address is
/// the one in the text (name or index of a device), or the one from the resolver.
///
/// # Errors
/// Host or service does not resolve; there is no such device; a zone is missing or not allowed.
pub fn endpoint(name: &EndpointName, like: Option<IpAddr>) -> Result<SocketAddr, Mistake> {
    let (host_name, zone) = name.host_and_zone();
    let mut found = host(host_name)?;
    if let Some(zone) = zone {
        let ifindex = zone::find(zone).ok_or_else(|| {
            let what = format!("`{}`: no network device is called `{zone}`, or has that index", name.host);
            Mistake::new(what, "correct the device behind the %, or make the device first (ip link)").without_keys()
        })?;
        found.retain(|address| zone::is_needed(address.ip()));
        found.iter_mut().for_each(|address| *address = zone::moved(*address, ifindex));
        if found.is_empty() {
            let what = format!("`{}` has a zone, but only link-local addresses (fe80::...) have zones", name.host);
            return Err(Mistake::new(what, format!("write {host_name} without %{zone}")).without_keys());
        }
    }
    let mut address = one_of(&found, host_name, like)?;
    if lacks_zone(address) {
        let ip = address.ip();
        let what = format!("{ip} is a link-local address, which is not usable without its device");
        return Err(Mistake::new(what, format!("write the device behind it, such as [{ip}%eth0]:6789")));
    }
    address.set_port(port(&name.port)?);
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_found_by_name_and_alias_for_udp_only() {
        let text =
            "# comment\nssh 22/tcp\ncipe 6789/udp tunnel vpn # note\nodd\nodd2 x/udp\ndomain 53/tcp\ndomain 53/udp\n";
        for (name, port) in [
            ("cipe", Some(6789)),
            ("vpn", Some(6789)),
            ("domain", Some(53)),
            ("ssh", None),
            ("note", None),
            ("odd", None),
            ("odd2", None),
        ] {
            assert_eq!(service(text, name), port, "{name}");
        }
    }

    #[test]
    fn numbers_need_no_names() {
        let name = EndpointName { host: "2001:db8::1".to_owned(), port: "6789".to_owned() };
        assert_eq!(endpoint(&name, None), Ok("[2001:db8::1]:6789".parse().unwrap()));
        assert!(endpoint(&name, Some("192.0.2.1".parse().unwrap())).is_err());
        assert!(port("65536").is_err());
    }

    fn at(host: &str) -> Result<SocketAddr, Mistake> {
        endpoint(&EndpointName { host: host.to_owned(), port: "6789".to_owned() }, None)
    }

    #[test]
    fn a_link_local_address_is_in_the_zone_behind_it() {
        // The loopback device has the same index in each network namespace.
        for host in ["fe80::1%lo", "fe80::1%1"] {
            assert_eq!(at(host), Ok("[fe80::1%1]:6789".parse().unwrap()), "{host}");
        }
        for (host, what) in [
            ("fe80::1", "fe80::1 is a link-local address, which is not usable without its device"),
            (
                "fe80::1%no-such-dev",
                "`fe80::1%no-such-dev`: no network device is called `no-such-dev`, or has that index",
            ),
            ("fe80::1%", "`fe80::1%`: no network device is called ``, or has that index"),
            ("fd00::1%lo", "`fd00::1%lo` has a zone, but only link-local addresses (fe80::...) have zones"),
            ("192.0.2.1%lo", "`192.0.2.1%lo` has a zone, but only link-local addresses (fe80::...) have zones"),
        ] {
            assert_eq!(at(host).unwrap_err().what, what);
        }
        let missing = at("fe80::1").unwrap_err();
        assert_eq!(missing.fix, "write the device behind it, such as [fe80::1%eth0]:6789");
    }

    #[test]
    fn an_address_that_lacks_its_zone_comes_after_all_others() {
        let all: Vec<SocketAddr> =
            ["[fe80::1]:0", "[fe80::2%1]:0", "[fd00::1]:0"].iter().map(|text| text.parse().unwrap()).collect();
        let chosen = |found: &[SocketAddr]| one_of(found, "gw", None).unwrap();
        assert_eq!((chosen(&all), chosen(&all[..1])), (all[1], all[0]));
        let found = [all[2], "192.0.2.1:0".parse().unwrap()];
        assert_eq!(chosen(&found), found[1], "IPv4 comes first");
        assert_eq!(one_of(&found, "gw", Some(all[0].ip())), Ok(all[2]));
    }

    #[test]
    fn an_address_on_the_tunnel_has_no_zone() {
        let host = |text: &str| one_host(&HostName(text.to_owned()), None);
        assert_eq!(host("fe80::1"), Ok("fe80::1".parse().unwrap()));
        let mistake = host("fe80::1%lo").unwrap_err();
        assert_eq!(mistake.what, "`fe80::1%lo` has a zone; here the zone is always the tunnel's interface");
    }
}
