//! One enum says what became of a packet. A drop without a verdict does not exist.

macro_rules! verdicts {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// What became of one packet. The discriminants index the counter maps; each packet is counted once,
        /// and `Fragmented` beside that.
        #[repr(u8)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum Verdict { $($(#[$doc])* $name,)* }

        impl Verdict {
            /// Every verdict, in the order of the discriminants.
            pub const ALL: &'static [Verdict] = &[$(Verdict::$name,)*];

            /// The name in status, metrics and documentation.
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
    /// Outbound drop: the tunnel's own datagram came into it, or its way leads round through other tunnels.
    RouteLoop = "route-loop",
    /// Outbound drop: larger than the tunnel takes.
    TooBig = "too-big",
    /// Outbound drop: a key is being negotiated and data must not go under the static key.
    NoSendKey = "no-send-key",
    /// Outbound drop: the carrier did not take it (ring or socket buffer full).
    CarrierFull = "carrier-full",

    // Carrier to private.
    /// Inbound: opened, checked and handed to the private side.
    Delivered = "delivered",
    /// Inbound: a key-exchange or control message, handed to the daemon.
    ControlReceived = "control-received",
    /// Beside the others: a carrier datagram arrived in fragments. The kernel joined them for the tunnel's UDP socket, and
    /// the datagram is counted as what becomes of it, too.
    Fragmented = "fragmented",
    /// Inbound drop: not a multiple of 8 octets, or under 16.
    BadLength = "bad-length",
    /// Inbound drop: sent under a dynamic key that we do not have (protocol section 2).
    NoReceiveKey = "no-receive-key",
    /// Inbound drop: the CRC does not match; wrong key, damage or forgery.
    BadCrc = "bad-crc",
    /// Inbound drop: reserved bits of P are set, or the padding is longer than the packet.
    BadPadding = "bad-padding",
    /// Inbound drop: packet type 10 or 11.
    BadType = "bad-type",
    /// Inbound drop: the payload is not exactly one IP packet; in protocol 4, no Ethernet frame.
    BadInner = "bad-inner",
    /// Inbound drop: a router has marked the datagram (CE) in place of dropping it, and the packet in it does not take part in
    /// congestion notification, so that nobody could be told (RFC 6040 section 4.2).
    CongestionDrop = "congestion-drop",
    /// Inbound drop: this very packet was accepted before.
    Replayed = "replayed",
    /// Inbound drop: a packet of our own came back to us.
    Reflected = "reflected",
    /// Inbound drop: valid, but from an address other than the pinned peer's.
    WrongPeer = "wrong-peer",
    /// Inbound drop: not from the relay of the tunnel's SOCKS5 server, or without a header of its own, or a fragment.
    BadRelay = "bad-relay",
    /// Inbound drop: a control packet that is no message of protocol section 3.
    BadMessage = "bad-message",
    /// Inbound drop: a control message in clear (32 zero bits in front). Some are passed on to the daemon, which answers
    /// questions about its configuration and believes nothing.
    ClearControl = "clear-control",
    /// Inbound drop: the daemon's queue was full.
    ControlFull = "control-full",
    /// Inbound drop: the private device did not take it.
    PrivateFull = "private-full",

    // Either way.
    /// Drop: no free UMEM frame.
    NoFrame = "no-frame",
    /// Drop: the receive ring of an engine socket was full or its fill ring empty, or a tunnel's UDP socket had no room: the
    /// engine is too slow. The kernel does not say whose packets a ring lost: they are counted for the first of the tunnels
    /// that share it.
    RingFull = "ring-full",
}

impl Verdict {
    /// Number of verdicts.
    pub const COUNT: usize = Self::ALL.len();

    /// Those that the eBPF programs count; the rest is the engine's. `NoReceiveKey`, `BadLength` and `RouteLoop` are
    /// counted on both sides, each packet once.
    pub const KERNEL: &'static [Self] = &[
        Self::PrivateNotIp,
        Self::PrivateUnstamped,
        Self::PrivateMalformed,
        Self::TunnelDead,
        Self::NoEngine,
        Self::RouteLoop,
        Self::BadLength,
        Self::NoReceiveKey,
    ];

    /// Its index in [`Self::KERNEL`], if it stands there.
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

    /// Whether the packet ended here against its sender's wish.
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
