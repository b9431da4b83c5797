//! Faults of released kernels that affect tunnels, each with its reporter. docs/KERNELS.md has the same table.

use std::fmt;

use super::release::Release;

/// A fault, and the releases that have it. Distributions may have fixed it in theirs, or added it to others.
#[derive(Debug, PartialEq, Eq)]
pub struct Fault {
    /// The first release with it.
    from: Release,
    /// The first later release without it, or the first that nobody has reported.
    until: Release,
    /// The effect, and what to do.
    what: &'static str,
    /// Who reported it.
    source: &'static str,
}

const FAULTS: &[Fault] = &[
    Fault {
        from: Release::new(6, 6, 44),
        until: Release::new(6, 6, 46),
        what: "superframes whose last segment is short are refused as bad GSO, on virtio cards and from packet sockets; take a \
               later kernel",
        source: "https://github.com/tailscale/tailscale/issues/13041",
    },
    Fault {
        from: Release::new(6, 17, 0),
        until: Release::new(6, 18, 0),
        what: "XDP programs can make the kernel panic; take another kernel",
        source: "https://github.com/EmbarkStudios/quilkin/issues/1303",
    },
    Fault {
        from: Release::new(6, 17, 0),
        until: Release::new(6, 18, 0),
        what: "checksum offload of virtual machines' cards is broken; take another kernel",
        source: "https://github.com/cloud-hypervisor/cloud-hypervisor/issues/7447",
    },
    Fault {
        from: Release::new(7, 0, 0),
        until: Release::new(7, 1, 5),
        what: "UDP_SEGMENT sends wrong UDP headers and checksums on some cards, and the peer gets next to nothing; take a later \
               kernel, or `carrier xdp`, or switch tx-udp-segmentation off",
        source: "https://github.com/tailscale/tailscale/pull/19918",
    },
    Fault {
        from: Release::new(7, 0, 0),
        until: Release::new(7, 1, 11),
        what: "generic XDP can make the kernel panic (split lock in skb_clone) on CPUs with split lock detection; take native \
               XDP, or boot with split_lock_detect=off",
        source: "https://github.com/netbirdio/netbird/issues/7331",
    },
];

impl Fault {
    fn is_in(&self, version: Release) -> bool {
        (self.from..self.until).contains(&version)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, until, what, source } = self;
        write!(f, "kernels from {from} to before {until}: {what} ({source})")
    }
}

/// The known faults of a release.
pub fn of(version: Release) -> impl Iterator<Item = &'static Fault> {
    FAULTS.iter().filter(move |fault| fault.is_in(version))
}

/// The known faults of the running kernel.
pub fn of_running() -> impl Iterator<Item = &'static Fault> {
    Release::running().into_iter().flat_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_that_of_its_releases_only() {
        let count = |text: &str| of(text.parse().unwrap()).count();
        for (release, faults) in [
            ("6.6.43", 0),
            ("6.6.44", 1),
            ("6.6.46", 0),
            ("6.17.3", 2),
            ("6.18.0", 0),
            ("7.1.4", 2),
            ("7.1.5", 1),
            ("7.1.11", 0),
        ] {
            assert_eq!(count(release), faults, "{release}");
        }
    }

    #[test]
    fn the_manual_has_every_fault_with_its_releases_and_its_source() {
        let manual = include_str!("../../../docs/KERNELS.md");
        for Fault { from, until, source, .. } in FAULTS {
            let row =
                manual.lines().find(|line| line.starts_with(&format!("| {from} | {until} |")) && line.contains(source));
            assert!(row.is_some(), "{from} to {until}: {source}");
        }
        assert_eq!(manual.lines().filter(|line| line.contains(" | <https://")).count(), FAULTS.len());
    }
}
