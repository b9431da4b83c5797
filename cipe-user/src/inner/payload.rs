//! What a payload of a tunnel carries, read once: each stage that a packet passes goes by it, in either direction.

use crate::inner::ethernet::ETHERNET;
use crate::inner::headers::Headers;

/// Where the IP packet of a payload stands, and its headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PayloadHeaders {
    link: u8,
    ip: Option<Headers>,
}

impl PayloadHeaders {
    /// Of a payload that is an IP packet.
    pub fn of_packet(ip: Headers) -> Self {
        Self { link: 0, ip: Some(ip) }
    }

    /// Of a frame with `link` octets of Ethernet header and tags, and perhaps a whole IP packet behind them.
    pub fn of_frame(link: u8, ip: Option<Headers>) -> Self {
        Self { link, ip }
    }

    /// Of a segment with all of these headers, whose IP packet is `total` octets long.
    #[must_use]
    pub fn of_segment(self, total: usize) -> Self {
        Self { ip: self.ip.map(|ip| ip.of_segment(total)), ..self }
    }

    /// Octets before the packet: 0, or those of Ethernet header and VLAN tags.
    pub fn link(&self) -> usize {
        self.link.into()
    }

    /// Whether it is a frame that has a VLAN tag.
    pub fn is_tagged(&self) -> bool {
        self.link() > ETHERNET
    }

    /// The IP headers, if there is an IP packet.
    pub fn ip(&self) -> Option<&Headers> {
        self.ip.as_ref()
    }

    /// The IP packet of `payload`, with its headers and what stands behind it, as padding of short frames.
    pub fn packet<'a>(&self, payload: &'a [u8]) -> Option<(&'a [u8], &Headers)> {
        payload.get(self.link()..).zip(self.ip.as_ref())
    }

    /// The same to change: whoever changes a field that was read changes both.
    pub fn packet_mut<'a>(&mut self, payload: &'a mut [u8]) -> Option<(&'a mut [u8], &mut Headers)> {
        payload.get_mut(self.link()..).zip(self.ip.as_mut())
    }

    /// The IP packet of `payload`, if nothing stands behind it, and no tag before it.
    pub fn plain_packet<'a>(&self, payload: &'a [u8]) -> Option<(&'a [u8], &Headers)> {
        self.packet(payload).filter(|(packet, headers)| !self.is_tagged() && packet.len() == headers.total())
    }
}
