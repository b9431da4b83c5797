//! The frame stamp: data that the TC program writes into the destination MAC address of a private frame.
//!
//! Tunnel devices are on top of one end of a veth pair, and the engine owns the other end. So the destination address has no other
//! use between the two. The stamp tells user space what XDP and AF_XDP cannot see.

/// First octet of every stamp. The group bit is clear, so a stray frame is addressed to somebody else.
pub const MAGIC: u8 = 0xC2;

/// Octets of a stamp, which are those of a MAC address.
pub const LEN: usize = 6;

/// The bit for [`Stamp::encapsulated`] in the octet that holds the hub.
const ENCAPSULATED: u8 = 0x80;

const _: () = assert!(crate::maps::MAX_HUBS <= ENCAPSULATED as u32);

/// What TC knows about a frame. Its layout is `MAGIC, encapsulated (1 bit) and hub (7 bits), gso_size (2 octets,
/// big-endian), tunnel (2 octets, big-endian)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The hub of the tunnel's device.
    pub hub: u8,
    /// The kernel has encapsulated the packet (VXLAN, GRE, IP in IP and the like) and left the checksum of the inner transport
    /// header unfinished. The kernel itself segments superframes of that kind.
    pub encapsulated: bool,
    /// Payload octets of each segment of a superframe; 0 for a single frame, and for frames that the kernel segments.
    pub gso_size: u16,
    /// Number of the tunnel, as given by the engine at attach.
    pub tunnel: u16,
}

impl Stamp {
    /// Returns the stamp as a destination MAC address.
    #[inline(always)]
    pub const fn to_mac(self) -> [u8; LEN] {
        let g = self.gso_size.to_be_bytes();
        let t = self.tunnel.to_be_bytes();
        let hub = if self.encapsulated { self.hub | ENCAPSULATED } else { self.hub };
        [MAGIC, hub, g[0], g[1], t[0], t[1]]
    }

    /// Reads a stamp. Returns `None` for an address that TC did not write.
    #[inline(always)]
    pub const fn from_mac(mac: [u8; LEN]) -> Option<Self> {
        if mac[0] != MAGIC {
            return None;
        }
        let (gso_size, tunnel) = ([mac[2], mac[3]], [mac[4], mac[5]]);
        Some(Self {
            hub: mac[1] & !ENCAPSULATED,
            encapsulated: mac[1] & ENCAPSULATED != 0,
            gso_size: u16::from_be_bytes(gso_size),
            tunnel: u16::from_be_bytes(tunnel),
        })
    }
}

/// TPID of the VLAN tag that holds an [`EthernetStamp`], in network order. It is that of IEEE 802.1ad.
pub const STAMP_TPID: [u8; 2] = [0x88, 0xA8];

/// What TC knows about a frame of an Ethernet tunnel (protocol 4). All octets of such a frame have a meaning, so the
/// stamp cannot replace any of them: it is the TCI of one more VLAN tag in front of the frame. A frame with
/// [`Self::Plain`] gets that tag only if its own first tag has the same TPID.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EthernetStamp {
    /// One packet. Its checksum is at the place that its headers say, finished or not.
    #[default]
    Plain,
    /// TCP or UDP to be cut into segments of this many payload octets, unless the kernel has already cut it.
    Superframe(u16),
    /// [`Stamp::encapsulated`].
    Encapsulated,
    /// A checksum is unfinished, behind headers that the program does not know.
    Hidden,
}

impl EthernetStamp {
    /// No IP packet has a payload of this many octets, so the value is free.
    const ENCAPSULATED: u16 = 0xFFFF;
    const HIDDEN: u16 = 0xFFFE;

    /// Returns the stamp as a TCI.
    #[inline(always)]
    pub const fn to_tci(self) -> u16 {
        match self {
            Self::Plain => 0,
            Self::Superframe(gso_size) => gso_size,
            Self::Encapsulated => Self::ENCAPSULATED,
            Self::Hidden => Self::HIDDEN,
        }
    }

    /// Reads a TCI. Every value is a valid stamp.
    #[inline(always)]
    pub const fn from_tci(tci: u16) -> Self {
        match tci {
            0 => Self::Plain,
            Self::ENCAPSULATED => Self::Encapsulated,
            Self::HIDDEN => Self::Hidden,
            gso_size => Self::Superframe(gso_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_survives_the_way_through_a_mac_address() {
        for encapsulated in [false, true] {
            let stamp = Stamp { hub: 9, encapsulated, gso_size: 1402, tunnel: 9_999 };
            assert_eq!(Stamp::from_mac(stamp.to_mac()), Some(stamp));
        }
    }

    #[test]
    fn a_stamp_survives_the_way_through_a_tag() {
        use EthernetStamp::{Encapsulated, Hidden, Plain, Superframe};
        for stamp in [Plain, Superframe(1), Superframe(1402), Superframe(65_495), Encapsulated, Hidden] {
            assert_eq!(EthernetStamp::from_tci(stamp.to_tci()), stamp);
        }
    }

    #[test]
    fn other_addresses_are_no_stamps() {
        assert_eq!(Stamp::from_mac([0xFF; 6]), None);
        assert_eq!(Stamp::from_mac([0; 6]), None);
    }

    #[test]
    fn a_stamp_is_never_a_group_address() {
        assert_eq!(Stamp::default().to_mac()[0] & 1, 0);
    }
}
