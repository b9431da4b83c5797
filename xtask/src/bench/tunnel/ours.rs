//! This project's tunnel, from real option files.

use std::sync::OnceLock;

use anyhow::Result;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::topology::{Side, Topology};

use super::catalogue::{INNER_MTU, Tunnel};

static OPTIONS: OnceLock<Vec<String>> = OnceLock::new();

/// Gives every tunnel of ours these options from now on, each `NAME=VALUE` or, for a boolean, `NAME`; only the first call has
/// an effect.
pub(crate) fn use_options(options: &[String]) {
    OPTIONS.get_or_init(|| options.to_vec());
}

/// Starts both daemons and, where there are keys, waits until both have those for packets.
pub(super) fn start(tunnel: Tunnel, net: &Topology) -> Result<Pair> {
    let idea = matches!(tunnel, Tunnel::CipeIdea | Tunnel::CipeIdeaLan);
    let short_cut = matches!(tunnel, Tunnel::CipeBlowfishLan | Tunnel::CipeIdeaLan);
    let ethernet = tunnel == Tunnel::CipeIdeaEthernet;
    let daemon = match tunnel {
        _ if ethernet => Daemon::EthernetIdea,
        _ if idea => Daemon::Idea,
        _ => Daemon::Blowfish,
    };
    let pair = Pair::start(net, daemon, |_, options| {
        let options = options.set("mtu", INNER_MTU);
        let options = if tunnel == Tunnel::CipeNokey { options.without("key").flag("nokey") } else { options };
        let options = if tunnel == Tunnel::CipeSealed { options.set("sealed", "require") } else { options };
        let options = if ethernet { options.set("mask", "255.255.255.0") } else { options };
        let options = if short_cut { options.set("lan", "lan0") } else { options };
        OPTIONS.get().into_iter().flatten().fold(options, |options, option| match option.split_once('=') {
            Some((name, value)) => options.set(name, value),
            None => options.flag(option),
        })
    })?;
    if ethernet {
        for side in [Side::A, Side::B] {
            let (lan, via) = (side.other().lan(), side.other().tunnel().to_string());
            net.gw(side).ip(&["route", "replace", &lan, "via", &via, "dev", daemon.device()])?;
        }
    }
    if tunnel != Tunnel::CipeNokey {
        pair.wait_for_keys(net)?;
    }
    Ok(pair)
}
