//! The maximum sizes of inner packets.

use std::net::IpAddr;

use crate::engine::carrier::outer;
use crate::inner::headers::IpVersion;
use crate::inner::ip::LEAST_MTU;
use crate::sealed;
use crate::wire::packet;

/// Most octets of a datagram beside its payload: in protocol 3 and 4 the IV, and padding, P and CRC (protocol section 2).
pub(crate) const KEYED_OVERHEAD: usize = packet::IV + 12;
/// The same of a sealed packet.
pub(crate) const SEALED_OVERHEAD: usize = sealed::packet::OVERHEAD;
/// Minimum MTU of IPv6: a link with less must fragment and reassemble itself (RFC 8200, section 5). The carrier's IP
/// does this for us.
const MIN_IPV6_MTU: usize = 1280;

/// The maximum sizes of the inner packets of a tunnel, in octets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelMtu {
    ipv4: usize,
    ipv6: usize,
}

impl TunnelMtu {
    /// No packets: the path MTU of the carrier is too small for the minimum MTU of a link.
    pub const NONE: Self = Self { ipv4: 0, ipv6: 0 };

    /// According to the device MTU only (`forcemtu`, or no carrier known).
    pub fn of_device(device: usize) -> Self {
        Self { ipv4: device, ipv6: device }
    }

    /// According to the device MTU and the path: a datagram with `overhead` octets beside its payload must fit a carrier packet of
    /// `path` octets to `peer`. [`TunnelMtu::NONE`] if that is below the minimum MTU of a link.
    pub fn of_path(device: usize, path: usize, peer: IpAddr, overhead: usize) -> Self {
        let all = outer::room(peer) - outer::ETHERNET + overhead;
        match path.saturating_sub(all).min(device) {
            fits if fits < LEAST_MTU => Self::NONE,
            fits => Self { ipv4: fits, ipv6: fits.max(MIN_IPV6_MTU).min(device) },
        }
    }

    /// For packets of one IP version.
    pub fn of(self, version: IpVersion) -> usize {
        match version {
            IpVersion::V4 => self.ipv4,
            IpVersion::V6 => self.ipv6,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xDB8, 0, 0, 0, 0, 0, 1));

    fn both(mtu: TunnelMtu) -> (usize, usize) {
        (mtu.of(IpVersion::V4), mtu.of(IpVersion::V6))
    }

    #[test]
    fn the_carrier_leaves_its_mtu_less_all_headers_and_the_largest_tail() {
        for (path, peer, expected) in [
            (1500, V4, (1442, 1442)),
            (1490, V4, (1442, 1442)),
            (1489, V4, (1441, 1441)),
            (1400, V4, (1352, 1352)),
            (1400, V6, (1332, 1332)),
            (1328, V4, (1280, 1280)),
            (600, V4, (552, 1280)),
            (116, V4, (68, 1280)),
            (115, V4, (0, 0)),
            (136, V6, (68, 1280)),
            (135, V6, (0, 0)),
            (0, V4, (0, 0)),
        ] {
            assert_eq!(both(TunnelMtu::of_path(1442, path, peer, KEYED_OVERHEAD)), expected, "{path} to {peer}");
        }
    }

    #[test]
    fn nothing_larger_than_the_device_takes_is_allowed() {
        assert_eq!(both(TunnelMtu::of_path(1000, 9000, V4, KEYED_OVERHEAD)), (1000, 1000));
        assert_eq!(both(TunnelMtu::of_path(1000, 600, V4, KEYED_OVERHEAD)), (552, 1000));
        assert_eq!(both(TunnelMtu::of_device(1442)), (1442, 1442));
    }

    #[test]
    fn a_sealed_packet_of_the_largest_size_fits_the_path() {
        for path in 116..1600 {
            let octets = TunnelMtu::of_path(3500, path, V4, KEYED_OVERHEAD).of(IpVersion::V4);
            assert!(packet::sealed_len(octets) + 28 <= path, "{path}");
        }
    }

    /// The sizes of docs/SEALED.md, section 11.
    #[test]
    fn sealed_packets_leave_what_their_specification_says() {
        for (path, peer, expected) in [(1500, V4, 1447), (1500, V6, 1427), (1492, V4, 1439), (1495, V4, 1442)] {
            let mtu = TunnelMtu::of_path(3500, path, peer, SEALED_OVERHEAD);
            assert_eq!(mtu.of(IpVersion::V4), expected, "{path} to {peer}");
        }
    }
}
