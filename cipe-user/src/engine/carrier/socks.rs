//! The header in front of each datagram to and from a SOCKS5 server (RFC 1928, section 7): two zeros, fragment number,
//! address type, address, port.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Octets of the header with an IPv4 address; the MTU of a tunnel includes it (protocol section 2).
pub const HEADER: usize = 10;

const IPV4: u8 = 1;

/// Returns the header of a datagram to `peer`; `None` if this is not an IPv4 address.
pub fn header(peer: SocketAddr) -> Option<[u8; HEADER]> {
    let IpAddr::V4(address) = peer.ip() else { return None };
    let ([a, b, c, d], [high, low]) = (address.octets(), peer.port().to_be_bytes());
    Some([0, 0, 0, IPV4, a, b, c, d, high, low])
}

/// Returns the source of a relayed datagram; its payload is behind [`HEADER`] octets. `None` for a fragment, which a
/// client may drop by RFC 1928, for an address that is not IPv4, and for invalid headers.
pub fn parse(datagram: &[u8]) -> Option<SocketAddr> {
    match *datagram.first_chunk::<HEADER>()? {
        [0, 0, 0, IPV4, a, b, c, d, high, low] => {
            Some((Ipv4Addr::new(a, b, c, d), u16::from_be_bytes([high, low])).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_header_is_that_of_the_rfc_and_reads_back() {
        let peer: SocketAddr = "198.51.100.7:6789".parse().unwrap();
        let header = header(peer).unwrap();
        assert_eq!(header, [0, 0, 0, 1, 198, 51, 100, 7, 0x1A, 0x85]);
        assert_eq!(parse(&[&header[..], b"datagram"].concat()), Some(peer));
        assert_eq!(super::header("[2001:db8::1]:6789".parse().unwrap()), None);
    }

    #[test]
    fn fragments_other_addresses_and_runts_are_no_datagrams() {
        let good = header("198.51.100.7:6789".parse().unwrap()).unwrap();
        for (at, octet) in [(0, 1), (1, 1), (2, 1), (2, 0x80), (3, 3), (3, 4), (3, 0)] {
            let mut bad = good;
            bad[at] = octet;
            assert_eq!(parse(&bad), None, "octet {at}");
        }
        for length in 0..HEADER {
            assert_eq!(parse(&good[..length]), None);
        }
    }

    proptest! {
        #[test]
        fn any_octets_have_an_answer(datagram: Vec<u8>) {
            if let Some(peer) = parse(&datagram) {
                prop_assert_eq!(&header(peer).unwrap(), &datagram[..HEADER]);
            }
        }
    }
}
