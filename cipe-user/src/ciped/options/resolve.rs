//! Names of hosts and services.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use super::endpoint::EndpointName;
use super::problem::Mistake;
use super::value::HostName;

/// Every address of a host, at least one.
///
/// # Errors
/// The name does not resolve.
pub fn host(name: &str) -> Result<Vec<IpAddr>, Mistake> {
    if let Ok(address) = name.parse() {
        return Ok(vec![address]);
    }
    let fix = "write an IP address, or make the name resolve (/etc/hosts, DNS)";
    let found: Vec<IpAddr> = match (name, 0).to_socket_addrs() {
        Ok(found) => found.map(|address| address.ip()).collect(),
        Err(error) => {
            return Err(Mistake::new(format!("host `{name}` does not resolve ({error})"), fix).without_keys());
        }
    };
    if found.is_empty() {
        return Err(Mistake::new(format!("host `{name}` has no address"), fix).without_keys());
    }
    Ok(found)
}

/// One address of a host: of the family of `like` if that is given, else IPv4 before IPv6.
///
/// # Errors
/// The name does not resolve, or not in this family.
pub fn one_host(name: &HostName, like: Option<IpAddr>) -> Result<IpAddr, Mistake> {
    let found = host(&name.0)?;
    match like {
        Some(like) => found.iter().find(|address| address.is_ipv4() == like.is_ipv4()).copied().ok_or_else(|| {
            let what = format!("`{name}` has no {} address", if like.is_ipv4() { "IPv4" } else { "IPv6" });
            Mistake::new(what, "use one address family at both ends of the tunnel")
        }),
        None => Ok(found.iter().find(|address| address.is_ipv4()).copied().unwrap_or(found[0])),
    }
}

/// A port number, or a UDP service of /etc/services.
///
/// # Errors
/// No such service.
pub fn port(name: &str) -> Result<u16, Mistake> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let services = std::fs::read("/etc/services").unwrap_or_default();
    service(&String::from_utf8_lossy(&services), name).ok_or_else(|| {
        Mistake::new(
            format!("`{name}` is no port and no UDP service"),
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

/// Carrier address of `name`; families as in [`one_host`].
///
/// # Errors
/// Host or service does not resolve.
pub fn endpoint(name: &EndpointName, like: Option<IpAddr>) -> Result<SocketAddr, Mistake> {
    Ok(SocketAddr::new(one_host(&HostName(name.host.clone()), like)?, port(&name.port)?))
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
}
