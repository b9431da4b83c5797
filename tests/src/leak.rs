//! A network in which a private packet that does not enter the tunnel leaves in clear, and the frames that did.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::capture::Captured;
use crate::net::{Frame, in_clear};
use crate::topology::{Side, Topology};

/// Leads the gateways' default routes over the carrier, as those of a gateway on the Internet do.
///
/// # Errors
/// `ip` fails.
pub fn tempt(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        net.gw(side).ip(&["route", "add", "default", "via", &side.other().carrier().to_string()])?;
    }
    Ok(())
}

/// Frames from one LAN to the other that anybody can read, in hexadecimal digits.
pub fn clear(frames: &[Captured]) -> Vec<String> {
    let hosts: [Ipv4Addr; 2] = [Side::A.host(), Side::B.host()];
    let is_private = |frame: &[u8]| {
        let packet = Frame::parse(frame).and_then(|frame| frame.ipv4());
        packet.is_some_and(|packet| hosts.contains(&packet.source))
    };
    let octets = frames.iter().map(|frame| &frame.octets);
    octets.filter(|frame| in_clear(frame) || is_private(frame)).map(hex::encode).collect()
}
