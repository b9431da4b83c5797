//! The frame stamp: what the TC program writes into the destination MAC address of a private frame.
//!
//! Tunnel devices stand on one end of a veth pair whose other end belongs to the engine, so the address means nothing
//! between the two. It carries to user space what XDP and AF_XDP cannot see.

/// First octet of every stamp. The group bit is clear, so a stray frame is addressed to somebody else.
pub const MAGIC: u8 = 0xC2;

/// Octets of a stamp: those of a MAC address.
pub const LEN: usize = 6;

/// Of the octet with the hub, the bit that says [`Stamp::encapsulated`].
const ENCAPSULATED: u8 = 0x80;

const _: () = assert!(crate::maps::MAX_HUBS <= ENCAPSULATED as u32);

/// What TC knows of a frame, laid out as `MAGIC, encapsulated (1 bit) and hub (7 bits), gso_size (2, big-endian), tunnel (2,
/// big-endian)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// The hub that the tunnel's device stands on.
    pub hub: u8,
    /// The kernel has put the packet into another one (VXLAN, GRE, IP in IP and the like) and left the checksum of the inner
    /// transport header unfinished. Superframes of that kind are cut by the kernel.
    pub encapsulated: bool,
    /// Payload octets of each segment of a superframe; 0 for a single frame, and for what the kernel cuts.
    pub gso_size: u16,
    /// Number of the tunnel, as given by the engine at attach.
    pub tunnel: u16,
}

impl Stamp {
    /// The destination MAC address that says this.
    #[inline(always)]
    pub const fn to_mac(self) -> [u8; LEN] {
        let g = self.gso_size.to_be_bytes();
        let t = self.tunnel.to_be_bytes();
        let hub = if self.encapsulated { self.hub | ENCAPSULATED } else { self.hub };
        [MAGIC, hub, g[0], g[1], t[0], t[1]]
    }

    /// Reads a stamp; `None` for an address that TC did not write.
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

/// TPID of the VLAN tag that says an [`EthernetStamp`], in the order of the wire: IEEE 802.1ad.
pub const STAMP_TPID: [u8; 2] = [0x88, 0xA8];

/// What TC knows of a frame of an Ethernet tunnel (protocol 4), whose every octet means something. It is the TCI of one more VLAN
/// tag in front of the frame, which has none if there is nothing to say, unless its own first tag could be taken for this one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EthernetStamp {
    /// Nothing: one packet, whose checksum is where its headers say, finished or not.
    #[default]
    Plain,
    /// TCP or UDP to be cut into segments of so many payload octets, unless the kernel has cut it.
    Superframe(u16),
    /// [`Stamp::encapsulated`].
    Encapsulated,
    /// A checksum was left unfinished, behind headers of which the program knows nothing.
    Hidden,
}

impl EthernetStamp {
    /// No payload of an IP packet has so many octets.
    const ENCAPSULATED: u16 = 0xFFFF;
    const HIDDEN: u16 = 0xFFFE;

    /// The TCI that says this.
    #[inline(always)]
    pub const fn to_tci(self) -> u16 {
        match self {
            Self::Plain => 0,
            Self::Superframe(gso_size) => gso_size,
            Self::Encapsulated => Self::ENCAPSULATED,
            Self::Hidden => Self::HIDDEN,
        }
    }

    /// Reads a TCI. Each says something.
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
