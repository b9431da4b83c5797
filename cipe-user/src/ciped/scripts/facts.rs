//! The data for `ip-up` and `ip-down`: six arguments, each option but `key` under its own name, and the CIPE_ names.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};

use crate::control::protocol::Cipher;
use crate::kernel::zone::Shown;

/// The data for a script.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Interface.
    pub device: String,
    /// Own carrier address.
    pub me: SocketAddr,
    /// The peer's carrier address, if known.
    pub peer: Option<SocketAddr>,
    /// Own address on the tunnel.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel.
    pub ptpaddr: IpAddr,
    /// Device MTU in octets.
    pub mtu: u32,
    /// Cipher.
    pub cipher: Cipher,
    /// Option `arg`.
    pub arg: OsString,
    /// The relay address of the SOCKS5 server, if there is one: the peer sees it as our address.
    pub relay: Option<SocketAddr>,
    /// Every option but `key`, as it was set.
    pub options: Vec<(&'static str, OsString)>,
}

impl Facts {
    /// Device, own carrier address, the daemon's pid, ipaddr, ptpaddr, arg.
    pub(super) fn arguments(&self) -> [OsString; 6] {
        [
            self.device.clone().into(),
            Shown(self.me).to_string().into(),
            std::process::id().to_string().into(),
            self.ipaddr.to_string().into(),
            self.ptpaddr.to_string().into(),
            self.arg.clone(),
        ]
    }

    /// Each option but `key` under its own name, with effective addresses, interface and MTU; and the CIPE_ names.
    pub(super) fn environment(&self) -> Vec<(&'static str, OsString)> {
        let cipher = match self.cipher {
            Cipher::Blowfish => "blowfish",
            Cipher::Idea | Cipher::IdeaLittle => "idea",
        };
        let mut all = self.options.clone();
        // Shells cannot read this name.
        if let Some((_, mode)) = self.options.iter().find(|(name, _)| *name == "xdp-mode") {
            all.push(("xdp_mode", mode.clone()));
        }
        // Later entries replace earlier ones.
        all.extend([
            ("device", self.device.clone().into()),
            ("me", Shown(self.relay.unwrap_or(self.me)).to_string().into()),
            ("ipaddr", self.ipaddr.to_string().into()),
            ("ptpaddr", self.ptpaddr.to_string().into()),
            ("mtu", self.mtu.to_string().into()),
            ("cipher", cipher.into()),
            ("arg", self.arg.clone()),
        ]);
        all.extend(self.peer.map(|peer| ("peer", Shown(peer).to_string().into())));
        all.extend([
            ("CIPE_DEVICE", self.device.clone().into()),
            ("CIPE_ME", Shown(self.me).to_string().into()),
            ("CIPE_PEER", self.peer.map_or_else(String::new, |peer| Shown(peer).to_string()).into()),
            ("CIPE_IPADDR", self.ipaddr.to_string().into()),
            ("CIPE_PTPADDR", self.ptpaddr.to_string().into()),
            ("CIPE_MTU", self.mtu.to_string().into()),
            ("CIPE_CIPHER", cipher.into()),
            ("CIPE_ARG", self.arg.clone()),
        ]);
        all
    }
}
