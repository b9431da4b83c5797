//! Changing and deleting devices: attributes and flags.

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_core::NLM_F_ACK;
use rustix::io::Errno;

use super::netlink::{Netlink, Result};

impl Netlink {
    /// Removes a device. A missing device is no error.
    pub(super) async fn delete(&self, index: u32) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let what = || format!("device {index}: cannot delete it");
        match self.request(what, RouteNetlinkMessage::DelLink(message), NLM_F_ACK).await {
            Err(error) if error.is(Errno::NODEV) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Sets attributes, and exactly the given ones of the flags up, noarp and multicast.
    pub(super) async fn set_link(
        &self,
        what: impl FnOnce() -> String,
        index: u32,
        attributes: Vec<LinkAttribute>,
        flags: Option<LinkFlags>,
    ) -> Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        if let Some(flags) = flags {
            message.header.flags = flags;
            message.header.change_mask = flags | LinkFlags::Noarp | LinkFlags::Multicast;
        }
        self.request(what, RouteNetlinkMessage::SetLink(message), NLM_F_ACK).await.map(drop)
    }

    /// Disables the IPv6 link-local address, and so router solicitations and duplicate address detection.
    pub(super) async fn without_own_addresses(&self, index: u32) -> Result<()> {
        let mode = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
        let what = || format!("device {index}: cannot turn off its link-local address");
        match self.set_link(what, index, vec![LinkAttribute::AfSpecUnspec(vec![mode])], None).await {
            // The kernel has no IPv6, or the device's MTU is below 1280.
            Err(error) if error.is(Errno::AFNOSUPPORT) => Ok(()),
            result => result,
        }
    }
}
