//! Generic netlink, as far as it is used here: one request, one answer.
//!
//! Messages are built by hand: the ethtool crate can read features but not set them, the ioctl (SIOCETHTOOL) needs
//! unsafe code and knows fewer features by name, and no crate knows the family `netdev`.
//! Sources: Documentation/networking/ethtool-netlink.rst, Documentation/netlink/specs/netdev.yaml.

use std::io;

use rtnetlink::packet_core::{DefaultNla, Emitable, NLA_F_NESTED, NlasIterator};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

const GENL_CTRL: u16 = 16;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const VERSION: u8 = 1;

const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
/// Requests an acknowledgement, and no other answer.
pub(super) const NLM_F_ACK: u16 = 4;
/// Octets of `struct nlmsghdr` and `struct genlmsghdr`.
const HEADER_OCTETS: usize = 16 + 4;

/// A family, and a socket for its requests.
pub(super) struct Family {
    socket: Socket,
    number: u16,
}

impl Family {
    /// Opens the family of this name.
    pub(super) fn open(name: &str) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let answer = exchange(&socket, GENL_CTRL, CTRL_CMD_GETFAMILY, 0, &[text(CTRL_ATTR_FAMILY_NAME, name)])?;
        let number = attribute(&answer, CTRL_ATTR_FAMILY_ID).ok_or(io::ErrorKind::InvalidData)?;
        let number = u16::from_ne_bytes(number.try_into().map_err(|_| io::ErrorKind::InvalidData)?);
        Ok(Self { socket, number })
    }

    /// Sends one request and returns the attributes of its answer. Generic netlink answers before `send` returns, so this
    /// never waits.
    pub(super) fn request(&self, command: u8, flags: u16, attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
        exchange(&self.socket, self.number, command, flags, attributes)
    }
}

fn exchange(socket: &Socket, family: u16, command: u8, flags: u16, attributes: &[DefaultNla]) -> io::Result<Vec<u8>> {
    let length = HEADER_OCTETS + attributes.buffer_len();
    let mut message = Vec::with_capacity(length);
    message.extend(u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?.to_ne_bytes());
    message.extend(family.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, VERSION, 0, 0]);
    message.resize(length, 0);
    attributes.emit(&mut message[HEADER_OCTETS..]);
    socket.send(&message, 0)?;
    // With a request for an acknowledgement, the answer is an error or the acknowledgement; a notification of changed
    // features may come before it.
    loop {
        let (answer, _) = socket.recv_from_full()?;
        let kind = answer.get(4..6).map(|kind| u16::from_ne_bytes([kind[0], kind[1]]));
        if kind == Some(NLMSG_ERROR) {
            let code = answer.get(16..20).ok_or(io::ErrorKind::InvalidData)?;
            let code = i32::from_ne_bytes([code[0], code[1], code[2], code[3]]);
            return if code == 0 { Ok(Vec::new()) } else { Err(io::Error::from_raw_os_error(-code)) };
        }
        if flags & NLM_F_ACK == 0 {
            return Ok(answer.get(HEADER_OCTETS..).unwrap_or_default().to_vec());
        }
    }
}

/// A string.
pub(super) fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), &[0]].concat())
}

/// Attributes in an attribute.
pub(super) fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

/// The value of the first attribute of a kind.
pub(super) fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes).flatten().find(|nla| nla.kind() == kind).map(|nla| nla.value().to_vec())
}
