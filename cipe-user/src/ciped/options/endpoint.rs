//! Carrier addresses as written: host and port, resolved by [`super::resolve`].

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

use super::problem::Mistake;
use super::secret::masked;
use super::value::{Parsed, Show, clip, word};

/// `host:port` or `[IPv6]:port`, not yet resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointName {
    /// IP address without brackets, or host name; a link-local address with its zone, such as `fe80::1%eth0`. Empty: any
    /// address (`me` only).
    pub host: String,
    /// Number or service name.
    pub port: String,
}

impl EndpointName {
    /// The host, and the zone behind it if there is one.
    pub fn host_and_zone(&self) -> (&str, Option<&str>) {
        self.host.split_once('%').map_or((&self.host, None), |(host, zone)| (host, Some(zone)))
    }

    /// Whether the host is an address, which no resolver is asked for.
    pub fn is_address(&self) -> bool {
        self.host_and_zone().0.parse::<IpAddr>().is_ok()
    }
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl Show for EndpointName {
    fn show(&self) -> String {
        masked(&self.to_string()).into_owned()
    }

    fn plain(&self) -> OsString {
        self.to_string().into()
    }
}

/// Carrier address and port.
pub(super) fn endpoint(text: &[u8]) -> Parsed<Option<EndpointName>> {
    let word = word(text)?;
    split(word).filter(|(host, port)| !host.is_empty() && !port.is_empty()).map(named).ok_or_else(|| {
        let what = format!("`{}` is not an address and a port", clip(word));
        Mistake::new(what, "write address:port, such as 192.0.2.1:6789 or [2001:db8::1]:6789")
    })
}

/// Own carrier address: what is missing of address and port is the system's choice, as port 0 is.
pub(super) fn own_endpoint(text: &[u8]) -> Parsed<Option<EndpointName>> {
    let word = word(text)?;
    let without_port = || {
        let host = match word.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']')?,
            None => word,
        };
        // A number alone would be taken for an address by the resolver, and is most likely a port.
        let is_port = host.bytes().all(|octet| octet.is_ascii_digit());
        let is_host = !host.contains([':', '[', ']']) || is_ipv6(host);
        (is_host && !is_port).then_some((host, "0"))
    };
    let parts = split(word).filter(|(_, port)| !port.is_empty()).or_else(without_port);
    parts.map(named).ok_or_else(|| {
        let what = format!("`{}` is neither an address nor a port nor both", clip(word));
        Mistake::new(
            what,
            "write address:port, address, or :port, such as 192.0.2.1:6789, 192.0.2.1, [2001:db8::1] or :6789",
        )
    })
}

/// Host and port, either of which may be empty.
fn split(word: &str) -> Option<(&str, &str)> {
    let (host, port) = match word.strip_prefix('[') {
        Some(rest) => rest.split_once("]:")?,
        None => word.rsplit_once(':').filter(|(host, _)| !host.contains(':'))?,
    };
    (!host.contains(['[', ']'])).then_some((host, port))
}

fn is_ipv6(host: &str) -> bool {
    let address = host.split_once('%').map_or(host, |(address, _)| address);
    address.parse::<Ipv6Addr>().is_ok()
}

fn named((host, port): (&str, &str)) -> Option<EndpointName> {
    Some(EndpointName { host: host.to_owned(), port: port.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(host: &str, port: &str) -> Result<Option<EndpointName>, Mistake> {
        Ok(Some(EndpointName { host: host.to_owned(), port: port.to_owned() }))
    }

    #[test]
    fn endpoints_have_a_host_and_a_port() {
        for (text, host, port) in [
            ("192.0.2.1:6789", "192.0.2.1", "6789"),
            ("gw.example.org:cipe", "gw.example.org", "cipe"),
            ("[2001:db8::1]:6789", "2001:db8::1", "6789"),
            ("[fe80::1%eth0]:6789", "fe80::1%eth0", "6789"),
        ] {
            assert_eq!(endpoint(text.as_bytes()), name(host, port));
            assert_eq!(own_endpoint(text.as_bytes()), name(host, port));
            assert_eq!(endpoint(text.as_bytes()).unwrap().unwrap().to_string(), text);
        }
        for text in
            ["", "192.0.2.1", ":1", "a:", "2001:db8::1", "2001:db8::1:6789", "[::1]", "[::1]6", "a b:1", "[[::]:1"]
        {
            assert!(endpoint(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn the_own_endpoint_may_lack_address_or_port() {
        for (text, host, port) in [
            ("192.0.2.1", "192.0.2.1", "0"),
            ("gw-a.example.org", "gw-a.example.org", "0"),
            ("2001:db8::1", "2001:db8::1", "0"),
            ("[2001:db8::1]", "2001:db8::1", "0"),
            ("fe80::1%eth0", "fe80::1%eth0", "0"),
            (":9999", "", "9999"),
            (":cipe", "", "cipe"),
        ] {
            assert_eq!(own_endpoint(text.as_bytes()), name(host, port), "{text}");
        }
        for text in ["", ":", "9999", "a:", "[::1", "[::1]6", "a b", "1:2:3", "[[::1]]"] {
            assert!(own_endpoint(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_parser_panics(text: Vec<u8>) {
            let _ = (endpoint(&text), own_endpoint(&text));
        }

        #[test]
        fn an_endpoint_reads_back_as_written(word in "[!-~]{1,40}") {
            if let Ok(Some(endpoint_name)) = endpoint(word.as_bytes()) {
                prop_assert_eq!(endpoint_name.to_string().parse::<std::net::SocketAddr>().ok(), word.parse().ok());
            }
        }
    }
}
