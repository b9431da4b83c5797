//! Joins decrypted TCP segments and UDP datagrams into superframes, as GRO does on a network card.
//!
//! The result must be indistinguishable: the segmentation of a superframe, by the kernel or by [`super::segment`],
//! gives exactly the original packets. So the rules are those of the kernel's `tcp_gro_receive`, `udp_gro_receive` and
//! `inet_gro_receive`. They are stricter where the segmentation of a superframe from `PACKET_VNET_HDR` has less
//! information than GRO:
//!
//! - TCP or UDP over IPv4 without options or over IPv6 without extension headers, no fragments;
//! - all header fields and options are equal, except those that change from segment to segment: IPv4 id (by one),
//!   sequence number (by the previous payload), lengths and checksums, and PSH and FIN, which end a run. So there is
//!   one acknowledgement number, one window, one ECN codepoint, and one time stamp;
//! - payloads have one size; the last may be shorter, but not empty;
//! - no SYN, RST, URG or CWR (segmentation would leave them on the first segment only);
//! - the IPv4 header checksum and the transport checksum are those that segmentation writes: a damaged packet stays
//!   damaged, and a UDP datagram without a checksum stays without.
//!
//! The order within a flow is kept: a packet that cannot join ends the run of its flow. Packets of other flows may
//! overtake.

use crate::inner::checksum::{Sum, TCP_CHECKSUM, UDP_CHECKSUM};
use crate::inner::headers::{Headers, IpVersion, Part, TCP, UDP};

/// Maximum segments of a superframe. With three more slices for the headers, this is well below the 1024 slices of one
/// `sendmsg`.
pub const MAX_SEGMENTS: usize = 64;
/// Maximum octets of a superframe without the Ethernet header: the maximum of the length fields of either IP version.
pub const MAX_SUPERFRAME: usize = 65_535;
/// Octets of a `struct virtio_net_hdr`.
pub const VNET_HEADER: usize = 10;

/// Maximum octets of the headers of a run: those of IPv6 and TCP.
pub const MAX_HEADERS: usize = 40 + 60;
/// Maximum flows that have an open run at the same time, if their hashes differ.
const SLOTS: usize = 256;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const PSH: u8 = 0x08;
const URG: u8 = 0x20;
const CWR: u8 = 0x80;

/// From `linux/virtio_net.h`.
const VIRTIO_NET_HDR_F_NEEDS_CSUM: u8 = 1;
const VIRTIO_NET_HDR_GSO_TCPV4: u8 = 1;
const VIRTIO_NET_HDR_GSO_TCPV6: u8 = 4;
const VIRTIO_NET_HDR_GSO_UDP_L4: u8 = 5;

/// Octets of a UDP header.
const UDP_HEADER: usize = 8;

/// Joins packets, one batch at a time. Keeps its memory for the next batch.
pub struct Coalescer {
    runs: Vec<State>,
    /// For each packet of the batch, the number of the next packet in its run.
    next: Vec<usize>,
    /// For each flow hash, the run that a packet of the flow may join.
    open: [Option<usize>; SLOTS],
}

/// A run that may still grow.
struct State {
    segment: Segment,
    first: usize,
    last: usize,
    count: usize,
    /// Payload octets so far.
    payload: usize,
}

/// The fields of a packet that decide whether it joins a run.
#[derive(Clone, Copy)]
struct Segment {
    /// IP and transport headers, with zeros in all fields that may differ inside a run.
    headers: [u8; MAX_HEADERS],
    /// Octets of `headers` in use; 0 for a packet that never joins another.
    headers_len: usize,
    version: IpVersion,
    /// [`TCP`] or [`UDP`].
    protocol: u8,
    transport: usize,
    id: u16,
    /// Always 0 in UDP.
    sequence: u32,
    payload: usize,
    /// The PSH and FIN flags.
    ending: u8,
}

impl Default for Coalescer {
    fn default() -> Self {
        Self { runs: Vec::new(), next: Vec::new(), open: [None; SLOTS] }
    }
}

impl Coalescer {
    /// Starts a new batch.
    pub fn clear(&mut self) {
        self.runs.clear();
        self.next.clear();
        self.open.fill(None);
    }

    /// Takes the next packet of the batch, an inner IP packet to the octet with its headers, or what is to stay alone. The first is
    /// number 0.
    pub fn push(&mut self, packet: Option<(&[u8], &Headers)>) {
        let index = self.next.len();
        self.next.push(index);
        let slot = packet.map_or(0, |(packet, headers)| headers.flow(packet) as usize % SLOTS);
        let segment = packet.and_then(|(packet, headers)| Segment::read(packet, headers));
        if let (Some(segment), Some(run)) = (&segment, self.open[slot])
            && self.runs[run].takes(segment)
        {
            let run = &mut self.runs[run];
            self.next[run.last] = index;
            run.join(index, segment);
            if run.is_full() {
                self.open[slot] = None;
            }
            return;
        }
        let run = State::new(index, segment.unwrap_or(Segment::OTHER));
        self.open[slot] = (!run.is_full()).then_some(self.runs.len());
        self.runs.push(run);
    }

    /// Returns the runs of the batch, in the order of their first packets. Each packet is in exactly one run.
    pub fn runs(&mut self) -> impl Iterator<Item = Run<'_>> {
        self.runs.iter_mut().filter(|run| run.count > 1).for_each(State::write_headers);
        self.runs.iter().map(|run| Run { run, next: &self.next })
    }
}

/// Packets that are sent as one: a superframe, or a single packet, unchanged.
///
/// An `AF_PACKET` socket with `PACKET_VNET_HDR` takes it as [`Run::vnet_header`], the Ethernet header,
/// [`Run::headers`], and then the octets from `headers().len()` on of each of [`Run::packets`], in order.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    run: &'a State,
    next: &'a [usize],
}

impl<'a> Run<'a> {
    /// Number of packets in the run.
    pub fn count(&self) -> usize {
        self.run.count
    }

    /// Returns the numbers of its packets in the batch, in order.
    pub fn packets(&self) -> impl Iterator<Item = usize> + use<'a> {
        let next = self.next;
        std::iter::successors(Some(self.run.first), move |packet| Some(next[*packet])).take(self.run.count)
    }

    /// Returns the IP and transport headers of the superframe: with its lengths, the IPv4 header checksum, PSH and FIN
    /// of the last packet, and the folded sum of the pseudo header as transport checksum. Empty for a single packet.
    pub fn headers(&self) -> &'a [u8] {
        if self.run.count > 1 { &self.run.segment.headers[..self.run.segment.headers_len] } else { &[] }
    }

    /// Octets of transport payload in each packet but the last; 0 for a single packet.
    pub fn gso_size(&self) -> u16 {
        if self.run.count > 1 { self.run.segment.payload as u16 } else { 0 }
    }

    /// Returns the `struct virtio_net_hdr` for a link-layer header of `link` octets; all zeros for a single packet.
    /// Fields are in native byte order, as packet(7) sockets require.
    pub fn vnet_header(&self, link: usize) -> [u8; VNET_HEADER] {
        let mut header = [0; VNET_HEADER];
        if self.run.count > 1 {
            let segment = &self.run.segment;
            header[0] = VIRTIO_NET_HDR_F_NEEDS_CSUM;
            header[1] = match (segment.protocol, segment.version) {
                (UDP, _) => VIRTIO_NET_HDR_GSO_UDP_L4,
                (_, IpVersion::V4) => VIRTIO_NET_HDR_GSO_TCPV4,
                (_, IpVersion::V6) => VIRTIO_NET_HDR_GSO_TCPV6,
            };
            let checksum = checksum_of(segment.protocol);
            let fields = [link + segment.headers_len, segment.payload, link + segment.transport, checksum];
            for (to, field) in header[2..].as_chunks_mut().0.iter_mut().zip(fields) {
                *to = (field as u16).to_ne_bytes();
            }
        }
        header
    }
}

impl State {
    fn new(index: usize, segment: Segment) -> Self {
        Self { segment, first: index, last: index, count: 1, payload: segment.payload }
    }

    /// Whether `next` continues this run.
    fn takes(&self, next: &Segment) -> bool {
        let head = &self.segment;
        let id = head.id.wrapping_add(self.count as u16);
        let follows = head.protocol == UDP || next.sequence == head.sequence.wrapping_add(self.payload as u32);
        follows
            && next.payload <= head.payload
            && (next.id == id || head.version == IpVersion::V6)
            && head.headers_len + self.payload + next.payload <= MAX_SUPERFRAME
            && next.headers[..next.headers_len] == head.headers[..head.headers_len]
    }

    fn join(&mut self, index: usize, next: &Segment) {
        self.last = index;
        self.count += 1;
        self.payload += next.payload;
        self.segment.ending = next.ending;
    }

    /// Whether no more packets may join: a short segment, PSH or FIN can only be at the end of a superframe.
    fn is_full(&self) -> bool {
        let short = self.payload < self.count * self.segment.payload;
        short || self.segment.ending != 0 || self.segment.headers_len == 0 || self.count == MAX_SEGMENTS
    }

    /// Writes the header fields that hold for the whole run.
    fn write_headers(&mut self) {
        let segment = &mut self.segment;
        let len = segment.headers_len + self.payload;
        let transport_len = len - segment.transport;
        let (ip, transport) = segment.headers[..segment.headers_len].split_at_mut(segment.transport);
        match segment.version {
            IpVersion::V4 => {
                ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
                ip[4..6].copy_from_slice(&segment.id.to_be_bytes());
                ip[10..12].fill(0);
                let mut sum = Sum::default();
                sum.add(ip);
                ip[10..12].copy_from_slice(&sum.checksum());
            }
            IpVersion::V6 => ip[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes()),
        }
        if segment.protocol == UDP {
            transport[4..6].copy_from_slice(&(transport_len as u16).to_be_bytes());
        } else {
            transport[4..8].copy_from_slice(&segment.sequence.to_be_bytes());
            transport[13] |= segment.ending;
        }
        let sum = Sum::pseudo_header(segment.version, ip, segment.protocol, transport_len);
        let checksum = checksum_of(segment.protocol);
        transport[checksum..checksum + 2].copy_from_slice(&sum.folded());
    }
}

impl Segment {
    /// A packet that never joins another.
    const OTHER: Self = Self {
        headers: [0; MAX_HEADERS],
        headers_len: 0,
        version: IpVersion::V4,
        protocol: TCP,
        transport: 0,
        id: 0,
        sequence: 0,
        payload: 0,
        ending: 0,
    };

    /// Reads the fields of a packet; returns `None` if it must not be joined with any other.
    fn read(packet: &[u8], found: &Headers) -> Option<Self> {
        let version = found.version;
        let plain = match version {
            // No options, and of the flags none but DF.
            IpVersion::V4 => found.transport() == 20 && packet.get(6).is_some_and(|flags| flags & !0x40 == 0),
            IpVersion::V6 => found.transport() == 40,
        };
        if !plain || found.part != Part::Whole || found.total() != packet.len() {
            return None;
        }
        let (ip, transport) = packet.split_at(found.transport());
        let (header, sequence, ending) = match found.protocol {
            TCP => tcp(transport)?,
            UDP => (udp(transport)?, 0, 0),
            _ => return None,
        };
        let payload = transport.len().checked_sub(header).filter(|payload| *payload > 0)?;
        let pseudo = Sum::pseudo_header(version, ip, found.protocol, transport.len());
        if !is_canonical(pseudo, transport, checksum_of(found.protocol)) {
            return None;
        }

        let headers_len = ip.len() + header;
        let mut headers = [0; MAX_HEADERS];
        headers[..headers_len].copy_from_slice(&packet[..headers_len]);
        let (ip_gaps, gaps) = headers.split_at_mut(ip.len());
        let mut id = 0;
        match version {
            IpVersion::V4 => {
                if !is_canonical(Sum::default(), ip, 10) {
                    return None;
                }
                id = u16::from_be_bytes([ip[4], ip[5]]);
                ip_gaps[2..6].fill(0);
                ip_gaps[10..12].fill(0);
            }
            IpVersion::V6 => ip_gaps[4..6].fill(0),
        }
        if found.protocol == UDP {
            gaps[4..UDP_HEADER].fill(0);
        } else {
            gaps[4..8].fill(0);
            gaps[13] &= !(PSH | FIN);
            gaps[TCP_CHECKSUM..TCP_CHECKSUM + 2].fill(0);
        }
        let (protocol, transport) = (found.protocol, ip.len());
        Some(Self { headers, headers_len, version, protocol, transport, id, sequence, payload, ending })
    }
}

/// Returns header length, sequence number, and PSH and FIN of a TCP segment; `None` if it must not be joined.
fn tcp(segment: &[u8]) -> Option<(usize, u32, u8)> {
    let fixed: &[u8; 20] = segment.first_chunk()?;
    let header = usize::from(fixed[12] >> 4) * 4;
    if header < fixed.len() || fixed[13] & (SYN | RST | URG | CWR) != 0 {
        return None;
    }
    let sequence = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
    Some((header, sequence, fixed[13] & (PSH | FIN)))
}

/// Returns the header length of a UDP datagram; `None` if it must not be joined: it has no checksum, or its length
/// differs from the packet's.
fn udp(datagram: &[u8]) -> Option<usize> {
    let [.., high, low, c, d]: &[u8; UDP_HEADER] = datagram.first_chunk()?;
    let length = usize::from(u16::from_be_bytes([*high, *low]));
    (length == datagram.len() && [*c, *d] != [0; 2]).then_some(UDP_HEADER)
}

/// Offset of the checksum field in a transport header.
fn checksum_of(protocol: u8) -> usize {
    if protocol == UDP { UDP_CHECKSUM } else { TCP_CHECKSUM }
}

/// Whether the checksum at `field` is correct, and the one that this host would write: one's complement has two zeros,
/// and [`Sum::checksum`] always gives the same one.
fn is_canonical(mut sum: Sum, octets: &[u8], field: usize) -> bool {
    sum.add(octets);
    sum.folded() == [0xFF; 2] && octets[field..field + 2] != [0xFF; 2]
}

#[cfg(test)]
mod tests;
