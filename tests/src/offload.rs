//! Device features by ethtool's netlink interface (kernel documentation `networking/ethtool-netlink`), without a tool.

use anyhow::{Context, Result, bail};
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with};

use crate::namespace::Namespace;

/// Offloads of the devices of a topology.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Offload {
    /// The defaults of veth: the links carry superframes (TSO) and unfinished checksums.
    #[default]
    On,
    /// No superframes (TSO, GSO, GRO, UDP segmentation off); checksums may be unfinished.
    Off,
    /// Neither superframes nor unfinished checksums, as a plain network card delivers packets.
    Raw,
}

const SUPERFRAMES: &[&str] = &[
    "tx-tcp-segmentation",
    "tx-tcp-ecn-segmentation",
    "tx-tcp-mangleid-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-generic-segmentation",
    "rx-gro",
];
const CHECKSUMS: &[&str] = &["tx-checksum-ip-generic", "rx-checksum"];

impl Offload {
    /// Sets this mode of a device.
    ///
    /// # Errors
    /// A device that is not there, or a kernel without ethtool's netlink interface.
    pub fn apply(self, namespace: &Namespace, device: &str) -> Result<()> {
        let off: Vec<&str> = match self {
            Self::On => return Ok(()),
            Self::Off => SUPERFRAMES.to_vec(),
            Self::Raw => [SUPERFRAMES, CHECKSUMS].concat(),
        };
        namespace
            .run(|| Ethtool::open()?.switch(device, &off, false))
            .with_context(|| format!("{}: offloads of {device}", namespace.name()))
    }

    /// Turns on all superframes that a device has, after [`Offload::Off`].
    ///
    /// # Errors
    /// A kernel without ethtool's netlink interface.
    pub fn restore(namespace: &Namespace, device: &str) -> Result<()> {
        namespace.run(|| {
            for feature in SUPERFRAMES {
                // One by one: no card has all features, and the kernel refuses each one separately.
                let _ = Ethtool::open()?.switch(device, &[feature], true);
            }
            Ok(())
        })
    }
}

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_HEADER_DEV_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;
const ETHTOOL_A_BITSET_BIT_VALUE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;

/// A generic netlink socket and the number of the `ethtool` family.
struct Ethtool {
    socket: OwnedFd,
    family: u16,
}

impl Ethtool {
    fn open() -> Result<Self> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::GENERIC))?;
        let name = attribute(CTRL_ATTR_FAMILY_NAME, b"ethtool\0");
        let reply = ask(&socket, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, NLM_F_REQUEST, &name)?;
        let mut rest = reply.get(20..).unwrap_or_default();
        while let [l0, l1, t0, t1, ..] = *rest {
            let (length, kind) = (usize::from(u16::from_ne_bytes([l0, l1])), u16::from_ne_bytes([t0, t1]));
            if let (CTRL_ATTR_FAMILY_ID, Some(&[a, b])) = (kind, rest.get(4..6)) {
                return Ok(Self { socket, family: u16::from_ne_bytes([a, b]) });
            }
            rest = rest.get(length.max(4).next_multiple_of(4)..).unwrap_or_default();
        }
        bail!("this kernel has no ethtool netlink interface")
    }

    fn switch(&self, device: &str, features: &[&str], on: bool) -> Result<()> {
        let mut bits = Vec::new();
        for feature in features {
            // A bit that is listed without the VALUE flag is one to clear.
            let mut bit = attribute(ETHTOOL_A_BITSET_BIT_NAME, format!("{feature}\0").as_bytes());
            if on {
                bit.extend(attribute(ETHTOOL_A_BITSET_BIT_VALUE, &[]));
            }
            bits.extend(attribute(ETHTOOL_A_BITSET_BITS_BIT | NLA_F_NESTED, &bit));
        }
        let bits = attribute(ETHTOOL_A_BITSET_BITS | NLA_F_NESTED, &bits);
        let name = attribute(ETHTOOL_A_HEADER_DEV_NAME, format!("{device}\0").as_bytes());
        let mut body = attribute(ETHTOOL_A_FEATURES_HEADER | NLA_F_NESTED, &name);
        body.extend(attribute(ETHTOOL_A_FEATURES_WANTED | NLA_F_NESTED, &bits));
        // The reply with the refused bits comes first; the acknowledgement after it has the error, if any.
        ask(&self.socket, self.family, ETHTOOL_MSG_FEATURES_SET, NLM_F_REQUEST | NLM_F_ACK, &body)?;
        Ok(())
    }
}

/// Sends one generic netlink request and returns the first message of the answer, headers included.
fn ask(socket: &OwnedFd, family: u16, command: u8, flags: u16, attributes: &[u8]) -> Result<Vec<u8>> {
    let mut message = Vec::with_capacity(20 + attributes.len());
    message.extend((20 + attributes.len() as u32).to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    send(socket, &message, SendFlags::empty())?;
    let mut answer = vec![0; 16 * 1024];
    let (length, _) = recv(socket, &mut answer[..], RecvFlags::empty())?;
    answer.truncate(length);
    if let [_, _, _, _, t0, t1, _, _, _, _, _, _, _, _, _, _, e0, e1, e2, e3, ..] = answer[..]
        && u16::from_ne_bytes([t0, t1]) == NLMSG_ERROR
    {
        let error = i32::from_ne_bytes([e0, e1, e2, e3]);
        if error != 0 {
            return Err(std::io::Error::from_raw_os_error(-error).into());
        }
    }
    Ok(answer)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut octets = Vec::with_capacity(4 + value.len() + 3);
    octets.extend((4 + value.len() as u16).to_ne_bytes());
    octets.extend(kind.to_ne_bytes());
    octets.extend(value);
    octets.resize(octets.len().next_multiple_of(4), 0);
    octets
}
