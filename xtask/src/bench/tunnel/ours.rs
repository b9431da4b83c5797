//! This project's tunnel, from real option files.

use anyhow::Result;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::topology::Topology;

use super::{INNER_MTU, Tunnel};

/// Starts both daemons and, where there are keys, waits for the dynamic ones.
pub fn start(tunnel: Tunnel, net: &Topology) -> Result<Pair> {
    let daemon = if tunnel == Tunnel::CipeIdea { Daemon::Idea } else { Daemon::Blowfish };
    let pair = Pair::start(net, daemon, |_, options| {
        let options = options.set("mtu", INNER_MTU);
        if tunnel == Tunnel::CipeNokey { options.without("key").flag("nokey") } else { options }
    })?;
    if tunnel != Tunnel::CipeNokey {
        pair.wait_for_keys(net)?;
    }
    Ok(pair)
}
