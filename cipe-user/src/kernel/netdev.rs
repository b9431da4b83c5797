//! XDP features of a device's driver, by the generic netlink family `netdev` (Linux 6.3).
//! Source: Documentation/netlink/specs/netdev.yaml.

use rtnetlink::packet_core::DefaultNla;

use super::genetlink::{Family, attribute};

const DEV_GET: u8 = 1;
const A_DEV_IFINDEX: u16 = 1;
const A_DEV_XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`.
const NDO_XMIT: u64 = 4;
/// `NETDEV_XDP_ACT_XSK_ZEROCOPY`.
const XSK_ZEROCOPY: u64 = 8;

/// Whether the kernel reports XDP features of devices.
pub fn reports_xdp_features() -> bool {
    Family::open("netdev").is_ok()
}

/// Whether a device accepts XDP frames now. A veth does while its peer has native XDP or GRO. False if the kernel does
/// not report it.
pub fn takes_xdp_frames(ifindex: u32) -> bool {
    features(ifindex).is_some_and(|features| features & NDO_XMIT != 0)
}

/// Whether a device's driver has AF_XDP zero copy; `None` if the kernel does not report it.
pub fn has_zero_copy(ifindex: u32) -> Option<bool> {
    features(ifindex).map(|features| features & XSK_ZEROCOPY != 0)
}

fn features(ifindex: u32) -> Option<u64> {
    let device = DefaultNla::new(A_DEV_IFINDEX, ifindex.to_ne_bytes().to_vec());
    let answer = Family::open("netdev").ok()?.request(DEV_GET, 0, &[device]).ok()?;
    Some(u64::from_ne_bytes(attribute(&answer, A_DEV_XDP_FEATURES)?.try_into().ok()?))
}
