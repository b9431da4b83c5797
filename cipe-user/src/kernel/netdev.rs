//! What a device's driver can do with XDP, by the generic netlink family `netdev` (Linux 6.3).
//! Source: Documentation/netlink/specs/netdev.yaml.

use rtnetlink::packet_core::DefaultNla;

use super::genetlink::{Family, attribute};

const DEV_GET: u8 = 1;
const A_DEV_IFINDEX: u16 = 1;
const A_DEV_XDP_FEATURES: u16 = 3;
/// `NETDEV_XDP_ACT_NDO_XMIT`.
const NDO_XMIT: u64 = 4;

/// Whether a device takes XDP frames now. A veth does while its peer has native XDP or GRO; without an answer it does not.
pub fn takes_xdp_frames(ifindex: u32) -> bool {
    let device = DefaultNla::new(A_DEV_IFINDEX, ifindex.to_ne_bytes().to_vec());
    let features = || {
        let answer = Family::open("netdev").ok()?.request(DEV_GET, 0, &[device]).ok()?;
        Some(u64::from_ne_bytes(attribute(&answer, A_DEV_XDP_FEATURES)?.try_into().ok()?))
    };
    features().is_some_and(|features| features & NDO_XMIT != 0)
}
