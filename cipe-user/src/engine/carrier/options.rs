//! Socket options that nix does not have.

// The first macro expands to the second.
use nix::{setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// Reports that a received datagram was reassembled, by the size of its largest fragment (net/ipv4/ip_sockglue.c).
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
    /// Sends UDP without checksums over IPv4. This excludes `UDP_SEGMENT`.
    NoChecksum,
    SetOnly,
    libc::SOL_SOCKET,
    libc::SO_NO_CHECK,
    bool
);
