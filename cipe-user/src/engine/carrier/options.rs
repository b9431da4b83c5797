//! Socket options that nix has no name for yet.

// The one expands to the other.
use nix::{setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// Tells of a received datagram that it came in fragments, by the size of the largest (net/ipv4/ip_sockglue.c).
    FragmentSize,
    SetOnly,
    libc::IPPROTO_IP,
    libc::IP_RECVFRAGSIZE,
    bool
);
sockopt_impl!(
    /// The same over IPv6.
    Ipv6FragmentSize,
    SetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_RECVFRAGSIZE,
    bool
);
#[cfg(test)]
sockopt_impl!(
    /// Sends UDP without checksums over IPv4, which `UDP_SEGMENT` does not go with.
    NoChecksum,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_NO_CHECK,
    bool
);
