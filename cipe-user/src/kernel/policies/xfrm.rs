//! IPsec policies, by the netlink family xfrm. No crate in use has its messages. Source: include/uapi/linux/xfrm.h,
//! net/xfrm/xfrm_policy.c (`xfrm_policy_match`, `xfrm_selector_match`).

use std::io;
use std::net::{IpAddr, SocketAddr};

use rtnetlink::packet_core::NlasIterator;
use rtnetlink::sys::protocols::NETLINK_XFRM;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, Socket, SocketAddr as NetlinkAddress, TokioSocket};

use super::CarrierFlow;

const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETDEFAULT: u16 = 0x28;
const XFRM_MSG_SETDEFAULT: u16 = 0x27;
/// The multicast group of policy changes.
const XFRMNLGRP_POLICY: u32 = 4;
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;
const XFRM_POLICY_BLOCK: u8 = 1;
/// `XFRM_USERPOLICY_BLOCK`.
const DEFAULT_BLOCK: u8 = 1;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Octets of `struct nlmsghdr`, `xfrm_userpolicy_info` and `xfrm_userpolicy_id`.
const HEADER: usize = 16;
const INFO: usize = 168;
const ID: usize = 64;
const UDP: u8 = 17;

/// Direction of a packet, as seen from this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    In,
    Out,
}

/// All policies of this network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Ipsec {
    policies: Vec<XfrmPolicy>,
    /// Whether packets that match no policy are dropped: in, out.
    blocks: [bool; 2],
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct XfrmPolicy {
    direction: Direction,
    /// The policy with the lowest priority applies.
    priority: u32,
    selector: Selector,
    effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Effect {
    Blocks,
    Protects,
    /// A policy without a transformation: the packets pass unchanged.
    Nothing,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Selector {
    is_ipv6: bool,
    destination: ([u8; 16], u8),
    source: ([u8; 16], u8),
    /// Port and mask.
    destination_port: (u16, u16),
    source_port: (u16, u16),
    /// 0: any.
    protocol: u8,
    /// 0: any.
    ifindex: u32,
}

impl Ipsec {
    /// Returns what the policies do with one direction of a flow, in words; `None` if nothing.
    pub(super) fn on(&self, flow: &CarrierFlow, direction: Direction) -> Option<String> {
        let matching =
            self.policies.iter().filter(|policy| policy.direction == direction && policy.selector.has(flow, direction));
        let way = if direction == Direction::In { "in" } else { "out" };
        match matching.min_by_key(|policy| (policy.priority, policy.effect)) {
            Some(XfrmPolicy { effect: Effect::Nothing, .. }) => None,
            Some(XfrmPolicy { effect: Effect::Blocks, priority, .. }) => {
                Some(format!("an IPsec policy (dir {way}, priority {priority}) blocks these datagrams"))
            }
            Some(XfrmPolicy { effect: Effect::Protects, priority, .. }) => {
                Some(format!("an IPsec policy (dir {way}, priority {priority}) is for these datagrams"))
            }
            None if self.blocks[usize::from(direction == Direction::Out)] => {
                Some(format!("IPsec blocks these datagrams, because no policy allows them (dir {way})"))
            }
            None => None,
        }
    }
}

impl Selector {
    fn has(&self, flow: &CarrierFlow, direction: Direction) -> bool {
        let (source, destination) = match direction {
            Direction::Out => (flow.me, flow.peer),
            Direction::In => (flow.peer, flow.me),
        };
        let port = |(port, mask): (u16, u16), address: SocketAddr| (address.port() ^ port) & mask == 0;
        self.is_ipv6 == flow.peer.is_ipv6()
            && has_prefix(source.ip(), &self.source)
            && has_prefix(destination.ip(), &self.destination)
            && port(self.source_port, source)
            && port(self.destination_port, destination)
            && matches!(self.protocol, 0 | UDP)
            && (self.ifindex == 0 || self.ifindex == flow.ifindex)
    }

    fn parse(octets: &[u8]) -> Option<Self> {
        let short = |at: usize| Some(u16::from_be_bytes([*octets.get(at)?, *octets.get(at + 1)?]));
        let family = u16::from_ne_bytes([*octets.get(40)?, *octets.get(41)?]);
        Some(Self {
            is_ipv6: i32::from(family) == libc::AF_INET6,
            destination: (octets.get(..16)?.try_into().ok()?, *octets.get(42)?),
            source: (octets.get(16..32)?.try_into().ok()?, *octets.get(43)?),
            destination_port: (short(32)?, short(34)?),
            source_port: (short(36)?, short(38)?),
            protocol: *octets.get(44)?,
            ifindex: word(octets, 48)?,
        })
    }
}

/// Whether an address begins with these bits.
fn has_prefix(address: IpAddr, (prefix, bits): &([u8; 16], u8)) -> bool {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let mut bits = usize::from(*bits).min(8 * octets.len());
    octets.iter().zip(prefix).all(|(a, b)| {
        let here = bits.min(8);
        bits -= here;
        here == 0 || (a ^ b) >> (8 - here) == 0
    })
}

impl XfrmPolicy {
    /// Parses the body of XFRM_MSG_NEWPOLICY. Returns `None` for a policy that does not apply to plain datagrams of
    /// this host: for forwarded packets, or with a mark or an xfrm interface.
    fn parse(octets: &[u8]) -> Option<Self> {
        let direction = match octets.get(160)? {
            0 => Direction::In,
            1 => Direction::Out,
            _ => return None,
        };
        let mut is_protected = false;
        for attribute in NlasIterator::new(octets.get(INFO..)?).flatten() {
            let value = attribute.value();
            match attribute.kind() {
                XFRMA_TMPL => is_protected = !value.is_empty(),
                XFRMA_MARK if word(value, 0).is_some_and(|mark| mark != 0) => return None,
                XFRMA_IF_ID if word(value, 0).is_some_and(|id| id != 0) => return None,
                _ => {}
            }
        }
        let effect = match (*octets.get(161)?, is_protected) {
            (XFRM_POLICY_BLOCK, _) => Effect::Blocks,
            (_, true) => Effect::Protects,
            (_, false) => Effect::Nothing,
        };
        Some(Self { direction, priority: word(octets, 152)?, selector: Selector::parse(octets)?, effect })
    }
}

fn word(octets: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(octets.get(at..at + 4)?.try_into().ok()?))
}

/// Reads all policies.
///
/// # Errors
/// The kernel's error.
pub(super) fn read() -> io::Result<Ipsec> {
    let mut socket = Socket::new(NETLINK_XFRM)?;
    socket.bind_auto()?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    let mut ipsec = Ipsec::default();
    request(&socket, XFRM_MSG_GETPOLICY, NLM_F_DUMP, ID, |kind, body| {
        if kind == XFRM_MSG_NEWPOLICY {
            ipsec.policies.extend(XfrmPolicy::parse(body));
        }
    })?;
    // Before Linux 5.15 the only default was to let packets pass.
    let of_default = |kind, body: &[u8]| {
        if matches!(kind, XFRM_MSG_SETDEFAULT | XFRM_MSG_GETDEFAULT) {
            ipsec.blocks = [0, 2].map(|at| body.get(at) == Some(&DEFAULT_BLOCK));
        }
    };
    if let Err(error) = request(&socket, XFRM_MSG_GETDEFAULT, 0, 4, of_default) {
        tracing::debug!("xfrm: default policies: {error}");
    }
    Ok(ipsec)
}

/// Sends a request with a body of `octets` zero octets, and calls `answer` with the type and body of each answer.
fn request(
    socket: &Socket,
    kind: u16,
    flags: u16,
    octets: usize,
    mut answer: impl FnMut(u16, &[u8]),
) -> io::Result<()> {
    let length = HEADER + octets;
    let mut message = Vec::with_capacity(length);
    message.extend((length as u32).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    message.resize(length, 0);
    socket.send(&message, 0)?;
    loop {
        let (answers, _) = socket.recv_from_full()?;
        let mut rest = &answers[..];
        while let Some(length) = word(rest, 0).map(|length| length as usize).filter(|length| *length >= HEADER) {
            let Some(message) = rest.get(..length) else { break };
            match u16::from_ne_bytes([message[4], message[5]]) {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => {
                    let code = word(message, HEADER).ok_or(io::ErrorKind::InvalidData)? as i32;
                    return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                }
                kind => answer(kind, &message[HEADER..]),
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(());
        }
    }
}

/// Notifications of changed policies.
pub(super) struct XfrmEvents(TokioSocket);

impl XfrmEvents {
    /// Subscribes to them.
    ///
    /// # Errors
    /// This kernel has no xfrm.
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_XFRM)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(XFRMNLGRP_POLICY)?;
        Ok(Self(socket))
    }

    /// Waits for the next change.
    ///
    /// # Errors
    /// The error of the socket. Lost notifications are no error; they count as a change.
    pub(super) async fn next(&mut self) -> io::Result<()> {
        match self.0.recv_from_full().await {
            Ok(_) => Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
