//! The XDP program on a device, and the kind of the device.

use netlink_packet_route::link::{LinkAttribute, LinkInfo, LinkMessage, LinkXdp};

use super::netlink::{Netlink, Result};

impl Netlink {
    /// The number of the XDP program on a device, whoever has attached it, and the kind of a virtual device, such as
    /// `veth`; `None`: there is no program, or the device is hardware.
    ///
    /// # Errors
    /// There is no such device.
    pub async fn attached(&self, ifindex: u32) -> Result<(Option<u32>, Option<String>)> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        let link = self.link(|| format!("no network device has the index {ifindex}"), message).await?;
        let xdp = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Xdp(facts) => Some(facts),
            _ => None,
        });
        let program = xdp.into_iter().flatten().find_map(|fact| match fact {
            LinkXdp::ProgId(number) => Some(*number),
            _ => None,
        });
        let infos = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::LinkInfo(infos) => Some(infos),
            _ => None,
        });
        let kind = infos.into_iter().flatten().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind.to_string()),
            _ => None,
        });
        Ok((program.filter(|number| *number > 0), kind))
    }
}
