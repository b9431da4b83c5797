//! Cuts superframes into segments: the TSO and USO that the kernel left to the device.
//!
//! A superframe is one IP packet of up to 64 KiB whose payload is that of several packets of `gso_size` octets each. It
//! arrives as the pieces of an AF_XDP multi-buffer frame, split at any offset. The segments are those of the kernel's
//! own software segmentation (Documentation/networking/segmentation-offloads.rst): IPv4 ids and TCP sequence numbers
//! increase, PSH and FIN are on the last segment only, CWR on the first only, options are on all, and each has its own
//! lengths and checksums.

use cipe_common::Verdict;

use crate::inner::checksum::{Sum, TCP_CHECKSUM, UDP_CHECKSUM, transport_checksum};
use crate::inner::headers::{Headers, IpVersion, Part, TCP, UDP};

/// Maximum octets of IP and transport headers: all options of IPv4 and TCP, or a few extension headers of IPv6.
const MAX_HEADER: usize = 192;

const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A superframe that is being cut, from front to back.
pub struct Superframe<'a> {
    /// The rest that is not cut yet; of the first piece, the octets from `at` on.
    pieces: &'a [&'a [u8]],
    at: usize,
    /// All headers of the superframe, copied from the pieces once.
    octets: [u8; MAX_HEADER],
    headers_len: usize,
    headers: Headers,
    gso_size: usize,
    /// Payload octets of the whole superframe; below, those cut so far.
    payload: usize,
    cut: usize,
    /// Number of segments; below, those cut so far.
    segments: usize,
    index: usize,
}

impl<'a> Superframe<'a> {
    /// Reads the headers of the IP packet in `pieces`, which starts behind the Ethernet header. `gso_size` is the one
    /// in the frame stamp, in payload octets. Octets behind the end of the packet are ignored.
    ///
    /// # Errors
    /// [`Verdict::PrivateNotIp`]; [`Verdict::PrivateMalformed`] if the headers contradict the frame, the packet is a
    /// fragment or neither TCP nor UDP, or `gso_size` is 0.
    pub fn parse(pieces: &'a [&'a [u8]], gso_size: u16) -> Result<Self, Verdict> {
        let (octets, gathered) = gather(pieces);
        let headers = Headers::parse(&octets[..gathered])?;
        let headers_len = headers.transport()
            + match headers.protocol {
                TCP => tcp_header_len(&octets[headers.transport()..gathered]).ok_or(Verdict::PrivateMalformed)?,
                UDP => 8,
                _ => return Err(Verdict::PrivateMalformed),
            };
        let total = headers.total();
        let received: usize = pieces.iter().map(|piece| piece.len()).sum();
        let headers_are_whole = headers_len <= gathered && headers_len <= total;
        if headers.part != Part::Whole || gso_size == 0 || !headers_are_whole || received < total {
            return Err(Verdict::PrivateMalformed);
        }
        let payload = total - headers_len;
        let gso_size = usize::from(gso_size);
        let segments = payload.div_ceil(gso_size).max(1);
        let mut superframe =
            Self { pieces, at: 0, octets, headers_len, headers, gso_size, payload, cut: 0, segments, index: 0 };
        superframe.skip(headers_len);
        Ok(superframe)
    }

    /// Its headers; the same for every segment but for the lengths ([`Headers::of_segment`]).
    pub fn headers(&self) -> &Headers {
        &self.headers
    }

    /// Number of segments; at least one.
    pub fn segments(&self) -> usize {
        self.segments
    }

    /// Octets of the longest segment, the first.
    pub fn longest(&self) -> usize {
        self.headers_len + self.gso_size.min(self.payload)
    }

    /// Writes the next segment, a complete IP packet, to the start of `buffer`. Returns its length; `None` after the
    /// last segment.
    ///
    /// # Panics
    /// If `buffer` is shorter than [`Superframe::longest`].
    pub fn cut(&mut self, buffer: &mut [u8]) -> Option<usize> {
        if self.index == self.segments {
            return None;
        }
        let payload = self.gso_size.min(self.payload - self.cut);
        let len = self.headers_len + payload;
        let (headers, rest) = buffer.split_at_mut(self.headers_len);
        headers.copy_from_slice(&self.octets[..self.headers_len]);
        let (ip, transport) = headers.split_at_mut(self.headers.transport());
        self.adjust_ip(ip, len);
        let field = self.adjust_transport(transport, payload);
        let has_checksum = self.headers.protocol == TCP || transport[field..field + 2] != [0; 2];
        transport[field..field + 2].fill(0);

        let protocol = self.headers.protocol;
        let mut sum = Sum::pseudo_header(self.headers.version, ip, protocol, transport.len() + payload);
        sum.add(transport);
        self.copy(&mut rest[..payload], &mut sum);
        if has_checksum {
            transport[field..field + 2].copy_from_slice(&transport_checksum(sum, protocol));
        }
        self.cut += payload;
        self.index += 1;
        Some(len)
    }

    /// Sets lengths, IPv4 id and IPv4 header checksum for a segment of `len` octets.
    fn adjust_ip(&self, ip: &mut [u8], len: usize) {
        match self.headers.version {
            IpVersion::V4 => {
                ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
                let id = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(self.index as u16);
                ip[4..6].copy_from_slice(&id.to_be_bytes());
                ip[10..12].fill(0);
                let mut sum = Sum::default();
                sum.add(ip);
                ip[10..12].copy_from_slice(&sum.checksum());
            }
            IpVersion::V6 => ip[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes()),
        }
    }

    /// Sets sequence number and flags, or the UDP length. Returns the offset of the checksum field.
    fn adjust_transport(&self, transport: &mut [u8], payload: usize) -> usize {
        if self.headers.protocol == UDP {
            transport[4..6].copy_from_slice(&((8 + payload) as u16).to_be_bytes());
            return UDP_CHECKSUM;
        }
        let sequence = &mut transport[TCP_SEQUENCE..TCP_SEQUENCE + 4];
        let first = sequence.iter().fold(0, |number, octet| number << 8 | u32::from(*octet));
        sequence.copy_from_slice(&first.wrapping_add(self.cut as u32).to_be_bytes());
        if self.index > 0 {
            transport[TCP_FLAGS] &= !CWR;
        }
        if self.index + 1 < self.segments {
            transport[TCP_FLAGS] &= !(PSH | FIN);
        }
        TCP_CHECKSUM
    }

    /// Fills `to` with the next payload octets and adds them to `sum`. `parse` has checked that there are enough.
    fn copy(&mut self, mut to: &mut [u8], sum: &mut Sum) {
        while !to.is_empty() {
            let piece = &self.pieces[0][self.at..];
            let (now, later) = to.split_at_mut(piece.len().min(to.len()));
            sum.copy(now, &piece[..now.len()]);
            self.skip(now.len());
            to = later;
        }
    }

    /// Advances by `octets`, and drops the pieces that are used up.
    fn skip(&mut self, octets: usize) {
        self.at += octets;
        while let Some((piece, later)) = self.pieces.split_first().filter(|(piece, _)| piece.len() <= self.at) {
            self.at -= piece.len();
            self.pieces = later;
        }
    }
}

/// Returns the first octets of the packet, at most [`MAX_HEADER`], and their number.
fn gather(pieces: &[&[u8]]) -> ([u8; MAX_HEADER], usize) {
    let mut octets = [0; MAX_HEADER];
    let mut gathered = 0;
    for piece in pieces {
        let take = piece.len().min(MAX_HEADER - gathered);
        octets[gathered..gathered + take].copy_from_slice(&piece[..take]);
        gathered += take;
    }
    (octets, gathered)
}

/// Octets of a TCP header according to its data offset.
fn tcp_header_len(header: &[u8]) -> Option<usize> {
    let len = usize::from(*header.get(12)? >> 4) * 4;
    (len >= 20).then_some(len)
}

#[cfg(test)]
mod tests;
