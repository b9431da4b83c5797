//! What makes a tunnel the same tunnel when another daemon runs it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::options::{Options, Sources};

/// A tunnel, by its options. Names of network namespaces are not stable, so none is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Name of its last option file without the directories; empty: it has none.
    pub name: String,
    /// `cipcb`, `cipci`, `cipdb` or `cipdi`.
    pub prefix: String,
    /// Own address on the tunnel.
    pub ipaddr: IpAddr,
    /// The peer's address on the tunnel.
    pub ptpaddr: IpAddr,
}

impl Identity {
    /// Of the tunnel with these options.
    pub fn new(sources: &Sources, options: &Options) -> Self {
        let file = sources.files.last().and_then(|file| file.file_name());
        Self {
            name: file.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default(),
            prefix: options.prefix().to_owned(),
            ipaddr: options.ipaddr,
            ptpaddr: options.ptpaddr,
        }
    }
}
