//! The tunnels that can be measured, and their start at both gateways of the bed.
//!
//! Every started tunnel has the same properties: the gateways reach each other by the inner addresses, the LANs by routes over
//! them, and an inner packet of [`INNER_MTU`] octets is not fragmented.

mod catalogue;
mod device;
mod fastd;
mod kernel;
mod openvpn;
mod ours;
mod process;
mod tinc;
mod wireguard;

use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Result, bail};
use cipe_tests::SOON;
use cipe_tests::gateway::Pair;
use cipe_tests::ping;
use cipe_tests::topology::{Side, Topology};

use super::program::Need;
pub(super) use catalogue::{INNER_MTU, Kind, Tunnel};
pub(super) use ours::use_options;
use process::Process;
pub(super) use process::remove_sockets;

impl Tunnel {
    /// Programs it needs, the one that gives its version first.
    pub(super) fn needs(self) -> &'static [Need] {
        match self {
            Self::CipeBlowfish
            | Self::CipeIdea
            | Self::CipeIdeaEthernet
            | Self::CipeSealed
            | Self::CipeNokey
            | Self::CipeBlowfishLan
            | Self::CipeIdeaLan => &[],
            Self::Esp | Self::Vxlan | Self::Veth => &[],
            Self::Wireguard => kernel::NEEDS_WIREGUARD,
            Self::OpenvpnBf => openvpn::NEEDS_BF,
            Self::OpenvpnAesGcm => openvpn::NEEDS_AES,
            Self::WireguardGo => wireguard::NEEDS_GO,
            Self::Boringtun => wireguard::NEEDS_BORINGTUN,
            Self::Gotatun => wireguard::NEEDS_GOTATUN,
            Self::TincBf => tinc::NEEDS,
            Self::Fastd => fastd::NEEDS,
        }
    }

    /// Why this kernel does not have it; `None`: it has it, or the tunnel is not the kernel's.
    pub(super) fn lacking(self) -> Option<String> {
        match self {
            Self::Wireguard => kernel::lacks("wireguard"),
            Self::Esp => kernel::lacks("xfrm"),
            _ => None,
        }
    }

    /// Starts it at both gateways and waits until it carries pings between the gateways and between the LANs.
    ///
    /// # Errors
    /// The tunnel does not start; the error has the ends of its logs.
    pub(super) fn start(self, net: &Topology) -> Result<Running> {
        let running = match self {
            Self::CipeBlowfish
            | Self::CipeIdea
            | Self::CipeIdeaEthernet
            | Self::CipeSealed
            | Self::CipeNokey
            | Self::CipeBlowfishLan
            | Self::CipeIdeaLan => Running::Ours(Box::new(ours::start(self, net)?)),
            Self::OpenvpnBf => Running::Peer(openvpn::start_bf(net)?),
            Self::OpenvpnAesGcm => Running::Peer(openvpn::start_aes(net)?),
            Self::WireguardGo | Self::Boringtun | Self::Gotatun => Running::Peer(wireguard::start(self, net)?),
            Self::TincBf => Running::Peer(tinc::start(net)?),
            Self::Fastd => Running::Peer(fastd::start(net)?),
            Self::Wireguard => kernel::wireguard(net).map(|()| Running::Kernel(Vec::new()))?,
            Self::Esp => kernel::esp(net).map(Running::Kernel)?,
            Self::Vxlan => kernel::vxlan(net).map(|()| Running::Kernel(Vec::new()))?,
            Self::Veth => kernel::veth(net).map(|()| Running::Kernel(Vec::new()))?,
        };
        running.wait(net)?;
        Ok(running)
    }
}

/// A started tunnel; dropping it ends it.
pub(super) enum Running {
    /// Two daemons of ours, with their engines.
    Ours(Box<Pair>),
    /// Both ends of another one.
    Peer([Process; 2]),
    /// The kernel alone does the work; the sockets by which it receives.
    Kernel(#[expect(dead_code, reason = "kept open")] Vec<UdpSocket>),
}

impl Running {
    fn wait(&self, net: &Topology) -> Result<()> {
        for (from, to) in [(net.gw(Side::A), Side::B.tunnel()), (net.lan(Side::A), Side::B.host())] {
            if !ping::wait_for_answer(from, to, Duration::from_millis(50), SOON)? {
                bail!("no ping from {} to {to}\n{}", from.name(), self.logs());
            }
        }
        Ok(())
    }

    /// The ends of the logs.
    pub(super) fn logs(&self) -> String {
        match self {
            Self::Ours(pair) => format!("{}\n{}", pair.a.log().text(), pair.b.log().text()),
            Self::Peer(ends) => ends.iter().map(Process::log).collect::<Vec<_>>().join("\n"),
            Self::Kernel(_) => String::new(),
        }
    }
}
