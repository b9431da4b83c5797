//! Devices of Ethernet tunnels (`cipdb0`): the visible end of a veth pair of their own, which may be a port of a
//! bridge. The engine uses the hidden end (`cipdb0x`) like a [`Hub`]'s, and receives there every frame that enters the
//! pair, with any destination address.
//!
//! The device is made without offloads: the kernel segments superframes, completes checksums of every kind, and writes
//! VLAN tags into the frames before they arrive at the hidden end. An engine that takes superframes switches on all
//! offloads but that of tags.

use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use rustix::io::Errno;

use super::device::{Device, TunnelDevice, valid};
use super::hub::{Framing, Hub, is_veth};
use super::links::{self, Card};
use super::netlink::{Error, Netlink, Result};
use super::owner::Owner;

impl Netlink {
    /// Makes an Ethernet tunnel's device, up, with its addresses, and `queues` transmit and receive queues at either end. On an
    /// error nothing is left behind.
    ///
    /// # Errors
    /// The name is taken or impossible, or the kernel refuses the MTU, the MAC address, an address, or the pair.
    pub async fn make_ethernet(&self, wanted: &TunnelDevice, queues: u32) -> Result<(Hub, Device)> {
        let name = match &wanted.name {
            Some(name) => valid(name)?.to_owned(),
            // The kernel chooses the number, so that two engines never compete for one.
            None => format!("{}%d", valid(&wanted.prefix)?),
        };
        let visible = vec![
            LinkAttribute::IfName(name),
            LinkAttribute::Mtu(wanted.mtu),
            LinkAttribute::Address(wanted.mac.to_vec()),
        ];
        let (index, hidden_index) = self.make_pair(visible, queues).await?;
        match self.finish_ethernet(wanted, index, hidden_index).await {
            Ok(made) => Ok(made),
            Err(error) => {
                // The first error is more useful than an error of the clean-up.
                self.delete(hidden_index).await.ok();
                Err(error)
            }
        }
    }

    async fn finish_ethernet(&self, wanted: &TunnelDevice, index: u32, hidden: u32) -> Result<(Hub, Device)> {
        let hub = self.configure_ends(Framing::Ethernet, index, hidden).await?;
        self.configure(wanted, index, &hub.name).await?;
        let device = Device { name: hub.name.clone(), index, mac: wanted.mac };
        Ok((hub, device))
    }

    /// Adopts the device of this name that an engine left when it died, one of `pairs`: a device that was made for the
    /// same owner, or whose owner has ended. Returns it with its index in `pairs`; `None` if there is none.
    ///
    /// # Errors
    /// The kernel refuses the MTU or an address. The device then stays as it is.
    pub async fn adopt_ethernet(
        &self,
        name: &str,
        wanted: &TunnelDevice,
        pairs: &[&Hub],
    ) -> Result<Option<(usize, Device)>> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(valid(name)?.to_owned()));
        let link = match self.link(|| format!("{name}: cannot read its state"), message).await {
            Ok(link) if is_veth(&link) => link,
            Err(error) if !error.is(Errno::NODEV) => return Err(error),
            _ => return Ok(None),
        };
        let ours = |owner: &Owner| owner.pid() == wanted.owner || owner.is_dead();
        let owned = links::alias_of(&link).and_then(Owner::from_alias).is_some_and(|(_, owner)| ours(&owner));
        let place = pairs.iter().position(|pair| pair.index == link.header.index);
        let (Some(place), true) = (place, owned) else { return Ok(None) };
        let card = Card::from_message(&link).ok_or_else(|| Error::Answer(format!("{name}: cannot read its state")))?;
        let mac = card.mac.ok_or_else(|| Error::Answer(format!("{name}: has no address")))?;
        let device = Device { name: card.name, index: card.ifindex, mac };
        self.take_over(&device, wanted).await?;
        Ok(Some((place, device)))
    }
}

#[cfg(test)]
mod tests;
