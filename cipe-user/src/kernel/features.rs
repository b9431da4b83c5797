//! Features that the running kernel lacks, and the effects. Each is tested, never derived from a version: distributions
//! add newer features to old kernels, and omit some.

use std::fmt;

use super::{bpf, netdev};
use crate::xsk;

/// A feature that not every kernel from the oldest supported one on has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feature {
    /// Packets of several descriptors by AF_XDP (`XDP_USE_SG`).
    MultiBuffer,
    /// tcx links.
    Tcx,
    /// The generic netlink family that reports a driver's XDP features.
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
            Self::XdpFeatures => netdev::reports_xdp_features(),
            Self::UdpSuperframes => xsk::has_udp_superframes(),
        }
    }

    /// Returns its name, the first Linux release that has it, and the effect of its absence.
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

/// The features that this kernel lacks, the same in each network namespace. Needs the capabilities of an engine, and
/// CAP_SYS_ADMIN if the loopback device is down. A feature that cannot be tested counts as present.
pub fn missing() -> Vec<Feature> {
    Feature::ALL.into_iter().filter(|feature| !feature.is_there()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::xsk::tests::net::{in_namespace, ip};

    /// The results must match those of binding, attaching and injecting in the other tests; and they depend on the
    /// kernel only, not on the network namespace.
    #[test]
    fn a_kernel_lacks_only_what_came_after_it() {
        let version = crate::kernel::release::Release::running().unwrap();
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
