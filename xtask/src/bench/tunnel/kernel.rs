//! What the kernel does by itself, to compare with.

use anyhow::Result;
use cipe_tests::topology::{Side, Topology};

use super::configure;

const DEVICE: &str = "vxlan0";

/// VXLAN between the carrier addresses.
pub fn vxlan(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (local, remote) = (side.carrier().to_string(), side.other().carrier().to_string());
        let kind = ["link", "add", DEVICE, "type", "vxlan", "id", "42", "dstport", "4789", "dev", "wire0"];
        net.gw(side).ip(&[&kind[..], &["local", &local, "remote", &remote]].concat())?;
        configure(net, side, DEVICE)?;
    }
    Ok(())
}

/// The inner addresses on the wire itself.
pub fn veth(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (gw, peer) = (net.gw(side), side.other().tunnel().to_string());
        gw.ip(&["addr", "add", &format!("{}/32", side.tunnel()), "peer", &peer, "dev", "wire0"])?;
        gw.ip(&["route", "replace", &side.other().lan(), "via", &peer, "dev", "wire0", "onlink"])?;
    }
    Ok(())
}
