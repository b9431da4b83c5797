//! Offloads and queue counts of a device, by the generic netlink family `ethtool` (Linux 5.6 and later).
//!
//! Messages are built by hand: the ethtool crate can read features but not set them, and the ioctl (SIOCETHTOOL) wants
//! unsafe code and knows fewer features by name. Source: Documentation/networking/ethtool-netlink.rst.

use std::io;

use rtnetlink::packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NlasIterator};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use super::netlink::{Error, Result};

const GENL_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const MSG_FEATURES_GET: u8 = 11;
const MSG_FEATURES_SET: u8 = 12;
const MSG_CHANNELS_GET: u8 = 17;
const VERSION: u8 = 1;
const A_HEADER: u16 = 1;
const A_HEADER_DEV_INDEX: u16 = 1;
const A_FEATURES_WANTED: u16 = 3;
const A_FEATURES_ACTIVE: u16 = 4;
const A_BITSET_BITS: u16 = 3;
const A_BITSET_BITS_BIT: u16 = 1;
const A_BITSET_BIT_NAME: u16 = 2;
const A_BITSET_BIT_VALUE: u16 = 3;
const A_CHANNELS_RX_COUNT: u16 = 6;
const A_CHANNELS_COMBINED_COUNT: u16 = 9;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
/// Octets of `struct nlmsghdr` and `struct genlmsghdr`.
const HEADER: usize = 16 + 4;

/// A feature as `ethtool -k` in its kernel spelling, and whether it is wanted.
pub(super) type Feature = (&'static str, bool);

/// Switches features of a device. The kernel keeps what others depend on consistent by itself.
pub(super) fn set_features(index: u32, features: &[Feature]) -> io::Result<()> {
    let bits = features.iter().map(|(name, on)| {
        let mut bit = vec![text(A_BITSET_BIT_NAME, name)];
        if *on {
            bit.push(DefaultNla::new(A_BITSET_BIT_VALUE, Vec::new()));
        }
        nested(A_BITSET_BITS_BIT, &bit)
    });
    let bits = nested(A_BITSET_BITS, &bits.collect::<Vec<_>>());
    let request = [device(index), nested(A_FEATURES_WANTED, &[bits])];
    Ethtool::open()?.request(MSG_FEATURES_SET, NLM_F_ACK, &request).map(drop)
}

/// Whether a device joins what it receives to superframes (GRO); `None` if the kernel does not tell.
pub fn has_gro(index: u32) -> Option<bool> {
    let answer = Ethtool::open().ok()?.request(MSG_FEATURES_GET, 0, &[device(index)]).ok()?;
    // A list without a mask: what is in it is on.
    let bits = attribute(&attribute(&answer, A_FEATURES_ACTIVE)?, A_BITSET_BITS)?;
    let mut names = NlasIterator::new(&bits).flatten().filter_map(|bit| attribute(bit.value(), A_BITSET_BIT_NAME));
    Some(names.any(|name| name == b"rx-gro\0"))
}

/// Receive queues that a device has in use; `None` if its driver does not tell.
pub(super) fn receive_queues(index: u32) -> Option<u32> {
    let answer = Ethtool::open().ok()?.request(MSG_CHANNELS_GET, 0, &[device(index)]).ok()?;
    let count = |kind| attribute(&answer, kind).and_then(|value| Some(u32::from_ne_bytes(value.try_into().ok()?)));
    let queues = count(A_CHANNELS_RX_COUNT).unwrap_or(0) + count(A_CHANNELS_COMBINED_COUNT).unwrap_or(0);
    (queues > 0).then_some(queues)
}

struct Ethtool {
    socket: Socket,
    family: u16,
}

impl Ethtool {
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let name = text(CTRL_ATTR_FAMILY_NAME, "ethtool");
        let answer = exchange(&socket, GENL_CTRL, CTRL_CMD_GETFAMILY, 0, &[name])?;
        let family = attribute(&answer, CTRL_ATTR_FAMILY_ID).ok_or(io::ErrorKind::InvalidData)?;
        let family = u16::from_ne_bytes(family.try_into().map_err(|_| io::ErrorKind::InvalidData)?);
        Ok(Self { socket, family })
    }

    fn request(&self, command: u8, flags: u16, attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
        exchange(&self.socket, self.family, command, flags, attributes)
    }
}

/// Sends one request and returns the attributes of its answer. Generic netlink answers before `send` returns, so this
/// never waits.
fn exchange(socket: &Socket, family: u16, command: u8, flags: u16, attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
    let length = HEADER + attributes.buffer_len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, VERSION, 0, 0]);
    message.resize(length, 0);
    attributes.emit(&mut message[HEADER..]);
    socket.send(&message, 0)?;
    // With an acknowledgement asked for, a refusal or the acknowledgement comes; changed features may be told before it.
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
        if kind == Some(NLMSG_ERROR) {
            let code = answer.get(16..20).ok_or(io::ErrorKind::InvalidData)?;
            let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
            return if code == 0 { Ok(Vec::new()) } else { Err(io::Error::from_raw_os_error(-code)) };
        }
        if flags & NLM_F_ACK == 0 {
            return Ok(answer.get(HEADER..).unwrap_or_default().to_vec());
        }
    }
}

fn device(index: u32) -> DefaultNla {
    nested(A_HEADER, &[DefaultNla::new(A_HEADER_DEV_INDEX, index.to_ne_bytes().to_vec())])
}

fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), &[0]].concat())
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == kind).map(|nla| nla.value().to_vec())
}

/// Offloads of a hub's visible end. What arrives on the hidden end follows from them (see [`super::device`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Leave TCP and UDP checksums of sent packets partial. SCTP's CRC is always the kernel's: the engine completes sums only.
    pub tx_checksum: bool,
    /// Leave TCP superframes uncut (needs `tx_checksum`).
    pub tso: bool,
    /// Leave UDP superframes (UDP_SEGMENT) uncut (needs `tx_checksum`).
    pub uso: bool,
    /// Coalesce received packets, which also gives the device a NAPI instance.
    pub gro: bool,
}

impl Offloads {
    /// Single frames with complete checksums: the kernel cuts and completes before the packet reaches the hidden end.
    pub const SINGLE_FRAMES: Self = Self { tx_checksum: false, tso: false, uso: false, gro: false };
    /// Superframes with partial checksums, to be cut by the engine.
    pub const SUPERFRAMES: Self = Self { tx_checksum: true, tso: true, uso: true, gro: false };
}

/// Sets the offloads of the device `name` with this index.
///
/// # Errors
/// The kernel refuses; the message names the device.
pub fn set_offloads(name: &str, index: u32, offloads: Offloads) -> Result<()> {
    let Offloads { tx_checksum, tso, uso, gro } = offloads;
    // Packets of an inner GRE, IP-in-IP or UDP tunnel are cut by the kernel always: the engine cuts plain TCP and UDP.
    let features = [
        ("tx-checksum-ip-generic", tx_checksum),
        ("tx-checksum-sctp", false),
        ("tx-tcp-segmentation", tso),
        ("tx-tcp-ecn-segmentation", tso),
        ("tx-tcp-mangleid-segmentation", tso),
        ("tx-tcp6-segmentation", tso),
        ("tx-udp-segmentation", uso),
        ("tx-gso-list", false),
        ("tx-sctp-segmentation", false),
        ("tx-gre-segmentation", false),
        ("tx-gre-csum-segmentation", false),
        ("tx-ipxip4-segmentation", false),
        ("tx-ipxip6-segmentation", false),
        ("tx-udp_tnl-segmentation", false),
        ("tx-udp_tnl-csum-segmentation", false),
        ("rx-gro", gro),
    ];
    // Accurate ECN superframes want another treatment of CWR. Kernels before 6.18 neither have nor know the feature.
    set_features(index, &[("tx-tcp-accecn-segmentation", false)]).ok();
    set_features(index, &features)
        .map_err(|cause| Error::Io { what: format!("{name}: cannot set offloads to {offloads:?}"), cause })
}
