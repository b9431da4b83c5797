//! This project's tunnel, from real option files.

use std::sync::OnceLock;

use anyhow::Result;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::topology::Topology;

use super::catalogue::{INNER_MTU, Tunnel};

static OPTIONS: OnceLock<Vec<String>> = OnceLock::new();

/// Gives every tunnel of ours these options from now on, each `NAME=VALUE` or, for a boolean, `NAME`; only the first call has
/// an effect.
pub fn use_options(options: &[String]) {
    OPTIONS.get_or_init(|| options.to_vec());
}

/// Starts both daemons and, where there are keys, waits for the dynamic ones.
pub fn start(tunnel: Tunnel, net: &Topology) -> Result<Pair> {
    let idea = matches!(tunnel, Tunnel::CipeIdea | Tunnel::CipeIdeaLan);
    let short_cut = matches!(tunnel, Tunnel::CipeBlowfishLan | Tunnel::CipeIdeaLan);
    let daemon = if idea { Daemon::Idea } else { Daemon::Blowfish };
    let pair = Pair::start(net, daemon, |_, options| {
        let options = options.set("mtu", INNER_MTU);
        let options = if tunnel == Tunnel::CipeNokey { options.without("key").flag("nokey") } else { options };
        let options = if short_cut { options.set("lan", "lan0") } else { options };
        OPTIONS.get().into_iter().flatten().fold(options, |options, option| match option.split_once('=') {
            Some((name, value)) => options.set(name, value),
            None => options.flag(option),
        })
    })?;
    if tunnel != Tunnel::CipeNokey {
        pair.wait_for_keys(net)?;
    }
    Ok(pair)
}
