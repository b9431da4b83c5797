//! What the running kernel lacks of what a newer one has, and what that costs. Each is asked for, never concluded from a version:
//! distributions carry features back, and leave some out.

use std::fmt;

use super::{bpf, netdev};
use crate::xsk;

/// Something that not every kernel from the oldest supported one on has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Packets of several descriptors by AF_XDP (`XDP_USE_SG`).
    MultiBuffer,
    /// tcx links.
    Tcx,
    /// The generic netlink family that tells what a driver does with XDP.
    XdpFeatures,
    /// Superframes of UDP from packet sockets.
    UdpSuperframes,
}

impl Feature {
    const ALL: [Self; 4] = [Self::MultiBuffer, Self::Tcx, Self::XdpFeatures, Self::UdpSuperframes];

    fn is_there(self) -> bool {
        match self {
            Self::MultiBuffer => xsk::has_multi_buffer(),
            Self::Tcx => bpf::has_tcx(),
            Self::XdpFeatures => netdev::tells_xdp_features(),
            Self::UdpSuperframes => xsk::has_udp_superframes(),
        }
    }

    /// What it is called, the first Linux that has it, and what is lost without it.
    fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::MultiBuffer => (
                "AF_XDP multi-buffer",
                "6.6",
                "hubs take single frames by native XDP, not superframes, which costs TCP throughput",
            ),
            Self::Tcx => (
                "tcx links",
                "6.6",
                "hubs have a clsact filter in place of a link, which a killed engine leaves to the next one",
            ),
            Self::XdpFeatures => {
                ("XDP features by netlink", "6.3", "live frames are not sent, which costs throughput over veth")
            }
            Self::UdpSuperframes => (
                "UDP superframes from packet sockets",
                "6.2",
                "received datagrams go to the tunnel's device one by one, which costs UDP throughput",
            ),
        }
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, since, cost) = self.words();
        write!(f, "{name} (Linux {since}): {cost}")
    }
}

/// What this kernel lacks, the same in each network namespace; needs the rights of an engine, and CAP_SYS_ADMIN where the loopback
/// device is down. What it gives no answer to counts as there.
pub fn missing() -> Vec<Feature> {
    Feature::ALL.into_iter().filter(|feature| !feature.is_there()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xsk::tests::net::{in_namespace, ip};

    /// The answers are those that binding, attaching and injecting get elsewhere in these tests; and they are the kernel's, the same
    /// in each network namespace.
    #[test]
    fn a_kernel_lacks_only_what_came_after_it() {
        let version = crate::kernel::release::Version::running().unwrap();
        let right = move || {
            for feature in Feature::ALL {
                let since = feature.words().1.parse().unwrap();
                assert_eq!(feature.is_there(), version >= since, "{feature} on {version}");
            }
        };
        in_namespace(move || {
            right();
            ip("link set lo up");
            right();
        });
    }
}
