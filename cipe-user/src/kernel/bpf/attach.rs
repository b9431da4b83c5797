//! Attaching and detaching: each attachment is a link that is held here; dropping the link detaches.

use std::{
    collections::HashMap,
    error::Error as StdError,
    fmt, io,
    os::fd::{AsFd, OwnedFd},
};

use aya::programs::{ProgramError, ProgramInfo, tc::SchedClassifierLink, xdp::XdpLink};
use cipe_common::maps::names;
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage, LinkXdp},
};
use rtnetlink::{
    packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use serde::{Deserialize, Serialize};

use super::hook::{TcHook, name};
use super::link::Link;
use super::{
    Programs, classifier,
    error::{Error, chain, os_error},
    hook, xdp,
};

/// The requested mode of XDP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum XdpMode {
    /// Native if the driver supports it, else generic.
    #[default]
    Auto,
    /// Native or not at all.
    Native,
    /// Generic, even if the driver supports native: superframes stay whole.
    Generic,
}

/// The mode of XDP on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttachedMode {
    /// In the driver.
    Native,
    /// In the network stack; with the reason if native was tried first.
    Generic {
        /// Why the driver refused.
        refused: Option<String>,
    },
}

impl fmt::Display for AttachedMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Native => f.write_str("native"),
            Self::Generic { refused: None } => f.write_str("generic"),
            Self::Generic { refused: Some(reason) } => write!(f, "generic (native refused: {reason})"),
        }
    }
}

/// The use of a veth pair; it decides which programs are on its two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// A hub's.
    Hub,
    /// An Ethernet tunnel's own.
    Ethernet,
}

impl Ends {
    /// The programs for egress of the visible end, and for the hidden end.
    fn programs(self) -> (&'static str, &'static str) {
        match self {
            Self::Hub => (names::PRIVATE_TC, names::PRIVATE_XDP),
            Self::Ethernet => (names::ETHERNET_TC, names::ETHERNET_XDP),
        }
    }
}

/// The attachments of a pair, and how they were asked for.
struct Pair {
    ends: Ends,
    hidden: u32,
    preference: XdpMode,
    tc: TcHook,
    xdp: Link,
}

/// Descriptors of the links on a pair, by which another engine puts its programs in the place of ours.
#[derive(Debug)]
pub struct PairLinks {
    /// On the visible end; `None` on a kernel without tcx.
    pub tc: Option<OwnedFd>,
    /// On the hidden end.
    pub xdp: OwnedFd,
}

/// All attachments. Dropping a link detaches it; if the device is gone, the link is detached already.
#[derive(Default)]
pub(super) struct Links {
    /// By carrier device.
    carrier: HashMap<u32, XdpLink>,
    /// By a pair's visible end.
    private: HashMap<u32, Pair>,
    /// By LAN card with a short cut.
    pub(super) lan: HashMap<u32, XdpLink>,
    /// By carrier device with a shield for UDP sockets.
    shields: HashMap<u32, SchedClassifierLink>,
}

impl Programs {
    /// Attaches carrier classification to a device. Once per device.
    ///
    /// # Errors
    /// [`Error::Busy`], [`Error::NativeRefused`], [`Error::Privilege`], [`Error::NoDevice`] or [`Error::Attach`].
    pub fn attach_carrier(&mut self, ifindex: u32, preference: XdpMode) -> Result<AttachedMode, Error> {
        let (link, mode) = self.attach_xdp(names::CARRIER_XDP, ifindex, preference)?;
        self.links.carrier.insert(ifindex, link);
        Ok(mode)
    }

    /// Detaches it; does nothing if it was not attached.
    pub fn detach_carrier(&mut self, ifindex: u32) {
        self.links.carrier.remove(&ifindex);
    }

    /// Attaches the shield for UDP sockets to a carrier device, as a tcx link before existing programs. Does nothing if it is attached;
    /// if somebody has detached it, it is attached again.
    ///
    /// # Errors
    /// [`Error::NoDevice`] or [`Error::Attach`]; the latter on a kernel without tcx.
    pub fn attach_shield(&mut self, ifindex: u32) -> Result<(), Error> {
        let device = name(ifindex)?;
        let program = classifier(&mut self.ebpf, names::SHIELD_TC)?;
        if self.links.shields.contains_key(&ifindex) {
            let own = program.info().ok().map(|info| info.id());
            if hook::is_attached(ifindex, hook::Place::Ingress, own) {
                return Ok(());
            }
            self.links.shields.remove(&ifindex);
        }
        let link = hook::attach_ingress(program, &device)
            .map_err(|error| attach_error(ifindex, device, names::SHIELD_TC, &error))?;
        self.links.shields.insert(ifindex, link);
        Ok(())
    }

    /// Detaches the shield from all carrier devices but these.
    pub fn detach_shields_except(&mut self, keep: impl Fn(u32) -> bool) {
        self.links.shields.retain(|ifindex, _| keep(*ifindex));
    }

    /// Attaches the check to a pair's visible end (TC egress, behind existing programs) and the redirection to its
    /// hidden end. Packets pass only when both are attached: after an error neither is.
    ///
    /// # Errors
    /// As [`Self::attach_carrier`].
    pub fn attach_private(
        &mut self,
        ends: Ends,
        visible: u32,
        hidden: u32,
        preference: XdpMode,
    ) -> Result<AttachedMode, Error> {
        let (tc, redirect) = ends.programs();
        let program = xdp(&mut self.ebpf, redirect)?;
        let program = program.fd().map_err(|error| Error::program(redirect, &error))?.as_fd();
        let in_mode = |mode| Link::xdp(program, hidden, mode);
        let (xdp, mode) = in_best_mode((redirect, hidden), preference, in_mode)?;
        let device = name(visible)?;
        let program = classifier(&mut self.ebpf, tc)?;
        let attached = hook::attach(program, (&device, visible));
        let tc = attached.map_err(|error| attach_error(visible, device, tc, &error))?;
        self.links.private.insert(visible, Pair { ends, hidden, preference, tc, xdp });
        Ok(mode)
    }

    /// Descriptors of a pair's links; `None` if it has none, or there are no descriptors to spare.
    pub fn pair_links(&self, visible: u32) -> Option<PairLinks> {
        let pair = self.links.private.get(&visible)?;
        let tc = match &pair.tc {
            TcHook::Link(link) => Some(link.descriptor().ok()?),
            TcHook::Filter { .. } => None,
        };
        Some(PairLinks { tc, xdp: pair.xdp.descriptor().ok()? })
    }

    /// Puts the programs in the place of those of another engine, which has ended, by its links on a pair. If the one on the hidden end
    /// is detached, [`Self::mend_private`] finds that.
    ///
    /// # Errors
    /// As [`Self::attach_carrier`], if the links are detached.
    pub fn take_over_private(
        &mut self,
        ends: Ends,
        (visible, hidden): (u32, u32),
        preference: XdpMode,
        links: PairLinks,
    ) -> Result<AttachedMode, Error> {
        let (tc, redirect) = ends.programs();
        let former = Link::of(links.xdp);
        let attach_anew = |programs: &mut Self, former: Link| {
            drop(former);
            programs.attach_private(ends, visible, hidden, preference)
        };
        let tc = match links.tc.map(Link::of) {
            Some(link) => {
                let program = classifier(&mut self.ebpf, tc)?.fd().map_err(|error| Error::program(tc, &error))?;
                match link.update(program.as_fd()) {
                    Ok(()) => TcHook::Link(link),
                    Err(_) => {
                        drop(link);
                        return attach_anew(self, former);
                    }
                }
            }
            None => {
                let device = name(visible)?;
                let program = classifier(&mut self.ebpf, tc)?;
                let attached = hook::attach(program, (&device, visible));
                attached.map_err(|error| attach_error(visible, device, tc, &error))?
            }
        };
        let program = xdp(&mut self.ebpf, redirect)?.fd().map_err(|error| Error::program(redirect, &error))?;
        let failed = |cause: io::Error| Error::Attach {
            device: format!("device {hidden}"),
            program: redirect,
            reason: cause.to_string(),
        };
        let program = program.as_fd().try_clone_to_owned().map_err(failed)?;
        // It has its effect at once, but waits for those that still run the other program.
        former.update_behind(program).map_err(failed)?;
        self.links.private.insert(visible, Pair { ends, hidden, preference, tc, xdp: former });
        Ok(match preference {
            XdpMode::Generic => AttachedMode::Generic { refused: None },
            XdpMode::Auto | XdpMode::Native => AttachedMode::Native,
        })
    }

    /// Attaches the programs of a pair again if somebody has detached one of them; returns whether that was so. `present`: the XDP
    /// program that is on the hidden end now.
    ///
    /// # Errors
    /// As [`Self::attach_carrier`]; the pair has no programs then.
    pub fn mend_private(&mut self, visible: u32, present: Option<u32>) -> Result<bool, Error> {
        let Some(pair) = self.links.private.get(&visible) else { return Ok(false) };
        let (ends, hidden, preference) = (pair.ends, pair.hidden, pair.preference);
        let (tc, redirect) = ends.programs();
        let own = |info: Result<ProgramInfo, ProgramError>| info.ok().map(|info| info.id());
        let has_xdp = own(xdp(&mut self.ebpf, redirect)?.info()) == present;
        let own_tc = own(classifier(&mut self.ebpf, tc)?.info());
        if has_xdp && hook::is_attached(visible, hook::Place::Egress, own_tc) {
            return Ok(false);
        }
        self.detach_private(visible);
        self.attach_private(ends, visible, hidden, preference).map(|_| true)
    }

    /// Detaches both; does nothing if they were not attached. The hidden end then receives nothing, so private traffic
    /// ends there.
    pub fn detach_private(&mut self, visible: u32) {
        self.links.private.remove(&visible);
    }

    pub(super) fn attach_xdp(
        &mut self,
        program: &'static str,
        ifindex: u32,
        preference: XdpMode,
    ) -> Result<(XdpLink, AttachedMode), Error> {
        let xdp = xdp(&mut self.ebpf, program)?;
        in_best_mode((program, ifindex), preference, |mode| {
            xdp.attach_to_if_index(ifindex, mode).and_then(|id| xdp.take_link(id))
        })
    }
}

/// Attaches an XDP program to a device in the best mode that is wanted and possible.
fn in_best_mode<L, E: StdError + 'static>(
    (program, ifindex): (&'static str, u32),
    preference: XdpMode,
    mut attach: impl FnMut(aya::programs::XdpMode) -> Result<L, E>,
) -> Result<(L, AttachedMode), Error> {
    let device = name(ifindex)?;
    let refused = match preference {
        XdpMode::Generic => None,
        XdpMode::Auto | XdpMode::Native => match attach(aya::programs::XdpMode::Driver) {
            Ok(link) => return Ok((link, AttachedMode::Native)),
            Err(error) => match os_error(&error) {
                Some(libc::EPERM | libc::EBUSY | libc::EEXIST | libc::ENODEV) => {
                    return Err(attach_error(ifindex, device, program, &error));
                }
                errno => Some(refusal(errno, &error)),
            },
        },
    };
    match (preference, refused) {
        (XdpMode::Native, Some(reason)) => Err(Error::NativeRefused { device, reason }),
        (_, refused) => match attach(aya::programs::XdpMode::Skb) {
            Ok(link) => Ok((link, AttachedMode::Generic { refused })),
            Err(error) => Err(attach_error(ifindex, device, program, &error)),
        },
    }
}

/// Why a driver refuses native XDP, according to the error number.
fn refusal(errno: Option<i32>, error: &(dyn StdError + 'static)) -> String {
    match errno {
        Some(libc::EOPNOTSUPP) => "the driver has no native XDP".to_owned(),
        Some(libc::ERANGE) => "the MTU is too large for it".to_owned(),
        Some(libc::ENOSPC) => "the peer has more transmit queues than the device has receive queues".to_owned(),
        _ => chain(error),
    }
}

fn attach_error(ifindex: u32, device: String, program: &'static str, error: &(dyn StdError + 'static)) -> Error {
    match os_error(error) {
        Some(libc::EPERM) => Error::Privilege { what: format!("{device}: attaching eBPF") },
        Some(libc::EBUSY | libc::EEXIST)
            if ![names::PRIVATE_TC, names::ETHERNET_TC, names::SHIELD_TC].contains(&program) =>
        {
            let program = attached_program(ifindex).map(|id| format!(" (id {id})")).unwrap_or_default();
            Error::Busy { device, program }
        }
        _ => Error::Attach { device, program, reason: chain(error) },
    }
}

/// Number of the XDP program on a device, from rtnetlink. For an error message only, which omits the number if there is
/// no answer.
fn attached_program(ifindex: u32) -> Option<u32> {
    let mut request = LinkMessage::default();
    request.header.index = ifindex;
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetLink(request));
    request.header.flags = NLM_F_REQUEST;
    request.finalize();
    let mut octets = vec![0; request.buffer_len()];
    request.serialize(&mut octets);
    let mut socket = Socket::new(NETLINK_ROUTE).ok()?;
    socket.bind_auto().ok()?;
    // The kernel has finished its answer when the request has been sent, so the read never waits.
    socket.set_non_blocking(true).ok()?;
    socket.send_to(&octets, &SocketAddr::new(0, 0), 0).ok()?;
    let (answer, _) = socket.recv_from_full().ok()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).ok()?;
    let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = answer.payload else { return None };
    link.attributes.iter().find_map(|attribute| {
        let LinkAttribute::Xdp(xdp) = attribute else { return None };
        xdp.iter().find_map(|xdp| if let LinkXdp::ProgId(id) = xdp { Some(*id) } else { None })
    })
}
