//! The verdicts: one enum for every outcome of a packet. Each drop has a verdict.

macro_rules! verdicts {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// The outcome of one packet. The discriminants are the indexes of the counter maps. Each packet is counted once;
        /// `Fragmented` is counted in addition.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Verdict { $($(#[$doc])* $name,)* }

        impl Verdict {
            /// Every verdict, in the order of the discriminants.
            pub const ALL: &'static [Verdict] = &[$(Verdict::$name,)*];

            /// Returns the name in status, metrics and documentation.
            pub const fn name(self) -> &'static str {
                match self { $(Verdict::$name => $text,)* }
            }
        }
    };
}

verdicts! {
    // Private to carrier.
    /// Outbound: sealed and handed to the carrier.
    Sent = "sent",
    /// Outbound: a key-exchange or control message of our own was sent.
    ControlSent = "control-sent",
    /// Outbound drop: a message of our own could not be sent: no peer, no key, no route, or no room. Messages are repeated.
    ControlUnsent = "control-unsent",
    /// Outbound drop: neither IPv4 nor IPv6.
    PrivateNotIp = "private-not-ip",
    /// Outbound drop: the frame did not pass the TC program, so its tunnel is unknown.
    PrivateUnstamped = "private-unstamped",
    /// Outbound drop: the inner headers contradict the frame (short, wrong lengths).
    PrivateMalformed = "private-malformed",
    /// Outbound drop: the tunnel is not attached; fail closed.
    TunnelDead = "tunnel-dead",
    /// Outbound drop: no engine socket is bound to the device; fail closed.
    NoEngine = "no-engine",
    /// Outbound drop: the peer's carrier address is not known yet.
    NoPeer = "no-peer",
    /// Outbound drop: no carrier route leads to the peer, or its SOCKS5 server has no relay for us.
    NoRoute = "no-route",
    /// Outbound drop: the tunnel's own datagram was routed into it, or its route is a loop through other tunnels.
    RouteLoop = "route-loop",
    /// Outbound drop: larger than the tunnel's MTU.
    TooBig = "too-big",
    /// Outbound drop: a key is being negotiated and data must not be encrypted with the static key.
    NoSendKey = "no-send-key",
    /// Outbound drop: the carrier did not take it (ring or socket buffer full).
    CarrierFull = "carrier-full",

    // Carrier to private.
    /// Inbound: opened, checked and handed to the private side.
    Delivered = "delivered",
    /// Inbound: a key-exchange or control message, handed to the daemon.
    ControlReceived = "control-received",
    /// In addition to another verdict: a carrier datagram arrived in fragments, and the kernel reassembled it for the tunnel's
    /// UDP socket. The datagram's outcome is counted too.
    Fragmented = "fragmented",
    /// Inbound drop: not a multiple of 8 octets, or under 16. A sealed datagram: under 25, or a handshake message of another length
    /// than its kind's.
    BadLength = "bad-length",
    /// Inbound drop: encrypted with a dynamic key that we do not have (protocol section 2); a sealed packet of an epoch without a key.
    NoReceiveKey = "no-receive-key",
    /// Inbound drop: the CRC does not match, or the first and last block show that it cannot; wrong key, damage or forgery.
    BadCrc = "bad-crc",
    /// Inbound drop: the tag of a sealed packet, or the MAC of a handshake message, does not verify; wrong key, damage or forgery.
    BadTag = "bad-tag",
    /// Inbound drop: reserved bits of P are set, or the padding is longer than the packet.
    BadPadding = "bad-padding",
    /// Inbound drop: packet type 10 or 11; of a sealed packet, a type above 1.
    BadType = "bad-type",
    /// Inbound drop: the payload is not exactly one IP packet; in protocol 4, no Ethernet frame.
    BadInner = "bad-inner",
    /// Inbound drop: a router marked the datagram as CE, and the inner packet does not support ECN. The mark could not reach the
    /// sender, so the packet is dropped (RFC 6040 section 4.2).
    CongestionDrop = "congestion-drop",
    /// Inbound drop: this packet was accepted before.
    Replayed = "replayed",
    /// Inbound drop: a sealed packet whose counter is so far behind the newest one that it may have been accepted before.
    TooOld = "too-old",
    /// Inbound drop: a packet of our own came back to us.
    Reflected = "reflected",
    /// Inbound drop: valid, but from an address other than the pinned peer's.
    WrongPeer = "wrong-peer",
    /// Inbound drop: not from the relay of the tunnel's SOCKS5 server, or without a SOCKS5 UDP header, or a fragment.
    BadRelay = "bad-relay",
    /// Inbound drop: a packet of protocol 3 or 4, or a message in clear, while the tunnel accepts sealed packets only.
    Unsealed = "unsealed",
    /// Inbound drop: a control packet that is no message of protocol section 3; a handshake message that says what it must not.
    BadMessage = "bad-message",
    /// Inbound drop: a control message in clear text (it begins with 32 zero bits). Some are passed on to the daemon. It answers
    /// questions about its configuration, and trusts nothing in such a message.
    ClearControl = "clear-control",
    /// Inbound drop: the daemon's queue was full.
    ControlFull = "control-full",
    /// Inbound drop: the private device did not take the packet.
    PrivateFull = "private-full",

    // Either way.
    /// Drop: no free UMEM frame.
    NoFrame = "no-frame",
    /// Drop: the engine was too slow. The receive ring of a socket was full, its fill ring was empty, or the buffer of a tunnel's
    /// UDP socket was full. The kernel does not report whose packets a ring lost, so they are counted for the first of the tunnels
    /// that share the ring.
    RingFull = "ring-full",
}

impl Verdict {
    /// Number of verdicts.
    pub const COUNT: usize = Self::ALL.len();

    /// The verdicts that the eBPF programs count. The engine counts all others, and also `NoReceiveKey`, `BadLength`,
    /// `BadCrc`, `WrongPeer`, `ClearControl`, `Unsealed` and `RouteLoop`; each packet is counted by one of the two.
    pub const KERNEL: &'static [Self] = &[
        Self::PrivateNotIp,
        Self::PrivateUnstamped,
        Self::PrivateMalformed,
        Self::TunnelDead,
        Self::NoEngine,
        Self::RouteLoop,
        Self::BadLength,
        Self::NoReceiveKey,
        Self::BadCrc,
        Self::WrongPeer,
        Self::ClearControl,
        Self::Unsealed,
    ];

    /// Returns its index in [`Self::KERNEL`]; `None` if the programs do not count it.
    #[inline(always)]
    pub const fn kernel_index(self) -> Option<usize> {
        let mut index = 0;
        while index < Self::KERNEL.len() {
            if Self::KERNEL[index] as u8 == self as u8 {
                return Some(index);
            }
            index += 1;
        }
        None
    }

    /// Returns whether the packet was dropped.
    pub const fn is_drop(self) -> bool {
        !matches!(self, Self::Sent | Self::ControlSent | Self::Delivered | Self::ControlReceived | Self::Fragmented)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn discriminants_index_the_list() {
        for (index, verdict) in Verdict::ALL.iter().enumerate() {
            assert_eq!(*verdict as usize, index);
        }
    }

    #[test]
    fn verdicts_of_the_kernel_know_their_place() {
        for (index, verdict) in Verdict::KERNEL.iter().enumerate() {
            assert_eq!(verdict.kernel_index(), Some(index));
        }
        assert_eq!(Verdict::Sent.kernel_index(), None);
    }
}
