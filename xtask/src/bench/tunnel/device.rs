//! Settings of every tunnel's device.

use anyhow::Result;
use cipe_tests::topology::{Side, Topology};

use super::catalogue::INNER_MTU;

/// Gives the device of a tunnel its addresses, MTU and routes, once it is there.
pub(super) fn configure(net: &Topology, side: Side, device: &str) -> Result<()> {
    let (gw, peer) = (net.gw(side), side.other().tunnel().to_string());
    gw.ip(&["addr", "add", &format!("{}/32", side.tunnel()), "peer", &peer, "dev", device])?;
    gw.ip(&["link", "set", device, "mtu", &INNER_MTU.to_string(), "up"])?;
    gw.ip(&["route", "replace", &side.other().lan(), "via", &peer, "dev", device, "onlink"])?;
    Ok(())
}
