//! The tunnels that can be measured, by name.

use serde::{Deserialize, Serialize};

/// Inner MTU of every tunnel, so that a UDP payload of 1400 octets is not fragmented; only the plain wire keeps its 1500.
pub(crate) const INNER_MTU: usize = 1428;

/// A tunnel, by the name it has on the command line and in results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Tunnel {
    /// Ours, Blowfish
    CipeBlowfish,
    /// Ours, IDEA
    CipeIdea,
    /// Ours, IDEA, Ethernet frames (protocol 4), routed
    CipeIdeaEthernet,
    /// Ours, sealed packets (docs/SEALED.md)
    CipeSealed,
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

/// The kind of a tunnel; the report separates kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// This project's.
    Ours,
    /// Another encrypting tunnel, in user space.
    Peer,
    /// The kernel's own, with a cipher.
    Kernel,
    /// The kernel's own, without a cipher.
    Clear,
}

impl Tunnel {
    /// Every tunnel, in the order of the tables.
    pub(crate) fn all() -> &'static [Self] {
        <Self as clap::ValueEnum>::value_variants()
    }

    /// Its name on the command line and in results.
    pub(crate) fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self).map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// A description in one line.
    pub(crate) fn what(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default()
    }

    /// Its kind.
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::CipeBlowfish
            | Self::CipeIdea
            | Self::CipeIdeaEthernet
            | Self::CipeSealed
            | Self::CipeNokey
            | Self::CipeBlowfishLan
            | Self::CipeIdeaLan => Kind::Ours,
            Self::Wireguard | Self::Esp => Kind::Kernel,
            Self::Vxlan | Self::Veth => Kind::Clear,
            _ => Kind::Peer,
        }
    }
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
