//! Offloads and queue counts of a device, by the generic netlink family `ethtool` (Linux 5.6 and later).
//! Source: Documentation/networking/ethtool-netlink.rst.

use std::io;

use rtnetlink::packet_core::{DefaultNla, NlasIterator};

use super::genetlink::{Family, NLM_F_ACK, attribute, nested, text};
use super::netlink::{Error, Result};

const ETHTOOL: &str = "ethtool";
const MSG_FEATURES_GET: u8 = 11;
const MSG_FEATURES_SET: u8 = 12;
const MSG_CHANNELS_GET: u8 = 17;
const A_HEADER: u16 = 1;
const A_HEADER_DEV_INDEX: u16 = 1;
const A_FEATURES_WANTED: u16 = 3;
const A_FEATURES_ACTIVE: u16 = 4;
const A_BITSET_BITS: u16 = 3;
const A_BITSET_BITS_BIT: u16 = 1;
const A_BITSET_BIT_NAME: u16 = 2;
const A_BITSET_BIT_VALUE: u16 = 3;
const A_CHANNELS_RX_COUNT: u16 = 6;
const A_CHANNELS_TX_COUNT: u16 = 7;
const A_CHANNELS_COMBINED_COUNT: u16 = 9;

/// A feature in the kernel's spelling (as `ethtool -k` shows it), and the requested state.
pub(super) type Feature = (&'static str, bool);

/// Switches features of a device. The kernel keeps dependent features consistent.
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
    Family::open(ETHTOOL)?.request(MSG_FEATURES_SET, NLM_F_ACK, &request).map(drop)
}

/// Whether a device coalesces received packets to superframes (GRO); `None` if the kernel does not report it.
pub fn has_gro(index: u32) -> Option<bool> {
    has_feature(index, "rx-gro")
}

/// Whether a device accepts UDP superframes without segmentation by the kernel; `None` if the kernel does not report
/// it.
pub fn takes_udp_superframes(index: u32) -> Option<bool> {
    has_feature(index, "tx-udp-segmentation")
}

fn has_feature(index: u32, feature: &str) -> Option<bool> {
    let answer = Family::open(ETHTOOL).ok()?.request(MSG_FEATURES_GET, 0, &[device(index)]).ok()?;
    // A list without a mask: every feature in it is on.
    let bits = attribute(&attribute(&answer, A_FEATURES_ACTIVE)?, A_BITSET_BITS)?;
    let mut names = NlasIterator::new(&bits).flatten().filter_map(|bit| attribute(bit.value(), A_BITSET_BIT_NAME));
    Some(names.any(|name| name.strip_suffix(&[0]) == Some(feature.as_bytes())))
}

/// Receive queues that a device has in use; `None` if its driver does not report them.
pub(super) fn receive_queues(index: u32) -> Option<u32> {
    queues(index, A_CHANNELS_RX_COUNT)
}

/// Transmit queues that a device has in use; `None` if its driver does not report them.
pub fn transmit_queues(index: u32) -> Option<u32> {
    queues(index, A_CHANNELS_TX_COUNT)
}

fn queues(index: u32, kind: u16) -> Option<u32> {
    let answer = Family::open(ETHTOOL).ok()?.request(MSG_CHANNELS_GET, 0, &[device(index)]).ok()?;
    let count = |kind| attribute(&answer, kind).and_then(|value| Some(u32::from_ne_bytes(value.try_into().ok()?)));
    let queues = count(kind).unwrap_or(0) + count(A_CHANNELS_COMBINED_COUNT).unwrap_or(0);
    (queues > 0).then_some(queues)
}

fn device(index: u32) -> DefaultNla {
    nested(A_HEADER, &[DefaultNla::new(A_HEADER_DEV_INDEX, index.to_ne_bytes().to_vec())])
}

/// Offloads of a hub's visible end. They decide what arrives on the hidden end (see [`super::device`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// Leave TCP and UDP checksums of sent packets partial. The kernel always computes SCTP's CRC: the engine completes
    /// sums only.
    pub tx_checksum: bool,
    /// Leave TCP superframes whole (needs `tx_checksum`).
    pub tso: bool,
    /// Leave UDP superframes (UDP_SEGMENT) whole (needs `tx_checksum`).
    pub uso: bool,
    /// Coalesce received packets, which also gives the device a NAPI instance.
    pub gro: bool,
}

impl Offloads {
    /// Single frames with complete checksums: the kernel segments and completes packets before the hidden end.
    pub const SINGLE_FRAMES: Self = Self { tx_checksum: false, tso: false, uso: false, gro: false };
    /// Superframes with partial checksums; the engine segments them.
    pub const SUPERFRAMES: Self = Self { tx_checksum: true, tso: true, uso: true, gro: false };
}

/// Makes the kernel write VLAN tags into the frames that the device `name` with this index sends, instead of beside
/// them.
///
/// # Errors
/// The kernel refuses; the message names the device.
pub(super) fn tag_in_the_frame(name: &str, index: u32) -> Result<()> {
    set_features(index, &[("tx-vlan-hw-insert", false), ("tx-vlan-stag-hw-insert", false)])
        .map_err(|cause| Error::Io { what: format!("{name}: cannot switch the VLAN offload off"), cause })
}

/// Sets the offloads of the device `name` with this index.
///
/// # Errors
/// The kernel refuses; the message names the device.
pub fn set_offloads(name: &str, index: u32, offloads: Offloads) -> Result<()> {
    let Offloads { tx_checksum, tso, uso, gro } = offloads;
    // The kernel itself must segment the packets that it has encapsulated (GRE, IP in IP, UDP tunnels): the engine
    // segments plain TCP and UDP. The inner checksum stays partial; no switch controls it for these
    // (`hw_enc_features`).
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
    // Accurate ECN superframes need another handling of CWR. Kernels before 6.18 do not have the feature.
    set_features(index, &[("tx-tcp-accecn-segmentation", false)]).ok();
    set_features(index, &features)
        .map_err(|cause| Error::Io { what: format!("{name}: cannot set offloads to {offloads:?}"), cause })
}
