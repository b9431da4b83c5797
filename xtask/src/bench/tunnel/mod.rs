//! The tunnels that can be measured, and how each is started at both gateways of the bed.
//!
//! However it is started, a tunnel ends up the same: the gateways reach each other by the inner addresses, the LANs by routes
//! over them, and every inner packet of [`INNER_MTU`] octets goes in one piece.

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
use serde::{Deserialize, Serialize};

pub use ours::use_options;
use process::Process;
pub use process::remove_sockets;

/// Inner MTU of every tunnel, so that a UDP payload of 1400 octets goes in one piece; only the plain wire keeps its 1500.
pub const INNER_MTU: usize = 1428;

/// A tunnel, by the name it has on the command line and in results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tunnel {
    /// Ours, Blowfish
    CipeBlowfish,
    /// Ours, IDEA
    CipeIdea,
    /// Ours without a cipher
    CipeNokey,
    /// Ours, Blowfish, with the short cut past the gateways' stack (`lan`)
    CipeBlowfishLan,
    /// Ours, IDEA, with the short cut past the gateways' stack (`lan`)
    CipeIdeaLan,
    /// OpenVPN, static key, Blowfish-CBC and HMAC-SHA1
    OpenvpnBf,
    /// OpenVPN, TLS, AES-256-GCM
    OpenvpnAesGcm,
    /// WireGuard in Go
    WireguardGo,
    /// WireGuard in Rust, by Cloudflare
    Boringtun,
    /// WireGuard in Rust, by Mullvad
    Gotatun,
    /// tinc 1.0, Blowfish-CBC and SHA-1
    TincBf,
    /// fastd, Salsa20/12 and UMAC
    Fastd,
    /// WireGuard of the kernel
    Wireguard,
    /// ESP of the kernel in UDP, AES-128-GCM
    Esp,
    /// The kernel's VXLAN, without any cipher
    Vxlan,
    /// Plain routes over the wire, without any tunnel
    Veth,
}

/// What kind of tunnel it is; the report sets them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This project's.
    Ours,
    /// Another encrypting tunnel, in user space.
    Peer,
    /// The kernel's own, with a cipher.
    Kernel,
    /// The kernel's own, without a cipher.
    Clear,
}

/// Where a program comes from if it is not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A Debian package.
    Debian(&'static str),
    /// A crate with a binary.
    Crate(&'static str),
}

/// A program that a tunnel needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Its file name.
    pub program: &'static str,
    /// Where it comes from.
    pub source: Source,
    /// Arguments that make it print its version, in the first line that has a digit.
    pub version: &'static [&'static str],
}

impl Tunnel {
    /// Every tunnel, in the order of the tables.
    pub fn all() -> &'static [Self] {
        <Self as clap::ValueEnum>::value_variants()
    }

    /// Its name on the command line and in results.
    pub fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What it is, in a line.
    pub fn what(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default()
    }

    /// Its kind.
    pub fn kind(self) -> Kind {
        match self {
            Self::CipeBlowfish | Self::CipeIdea | Self::CipeNokey | Self::CipeBlowfishLan | Self::CipeIdeaLan => {
                Kind::Ours
            }
            Self::Wireguard | Self::Esp => Kind::Kernel,
            Self::Vxlan | Self::Veth => Kind::Clear,
            _ => Kind::Peer,
        }
    }

    /// Programs it needs, the one that gives its version first.
    pub fn needs(self) -> &'static [Need] {
        match self {
            Self::CipeBlowfish | Self::CipeIdea | Self::CipeNokey | Self::CipeBlowfishLan | Self::CipeIdeaLan => &[],
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

    /// Why this kernel does not have it; `None`: it does, or the tunnel is none of the kernel's.
    pub fn lacking(self) -> Option<String> {
        match self {
            Self::Wireguard => kernel::lacks("wireguard"),
            Self::Esp => kernel::lacks("xfrm"),
            _ => None,
        }
    }

    /// Starts it at both gateways and waits until it carries pings between the gateways and between the LANs.
    ///
    /// # Errors
    /// What it says, and the ends of its logs.
    pub fn start(self, net: &Topology) -> Result<Running> {
        let running = match self {
            Self::CipeBlowfish | Self::CipeIdea | Self::CipeNokey | Self::CipeBlowfishLan | Self::CipeIdeaLan => {
                Running::Ours(Box::new(ours::start(self, net)?))
            }
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
pub enum Running {
    /// Two daemons of ours, with their engines.
    Ours(Box<Pair>),
    /// Both ends of another one.
    Peer([Process; 2]),
    /// Only the kernel is at work; the sockets through which it receives.
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
    pub fn logs(&self) -> String {
        match self {
            Self::Ours(pair) => format!("{}\n{}", pair.a.log().text(), pair.b.log().text()),
            Self::Peer(ends) => ends.iter().map(Process::log).collect::<Vec<_>>().join("\n"),
            Self::Kernel(_) => String::new(),
        }
    }
}

/// Gives the device of a tunnel its addresses, MTU and routes, once it is there.
fn configure(net: &Topology, side: Side, device: &str) -> Result<()> {
    let (gw, peer) = (net.gw(side), side.other().tunnel().to_string());
    gw.ip(&["addr", "add", &format!("{}/32", side.tunnel()), "peer", &peer, "dev", device])?;
    gw.ip(&["link", "set", device, "mtu", &INNER_MTU.to_string(), "up"])?;
    gw.ip(&["route", "replace", &side.other().lan(), "via", &peer, "dev", device, "onlink"])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_in_results_is_the_one_on_the_command_line() {
        for &tunnel in Tunnel::all() {
            assert_eq!(serde_json::to_value(tunnel).expect("a name"), tunnel.name());
            assert!(!tunnel.what().is_empty(), "{tunnel:?}");
        }
    }
}
