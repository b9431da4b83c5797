//! Checks frames of Ethernet tunnels (protocol 4), and segments superframes in them.

use arrayvec::ArrayVec;
use cipe_common::stamp::STAMP_TPID;
use cipe_common::{EthernetStamp, Verdict};

use super::admission::{Admission, Dropped, MOST_PIECES, Pieces, data_form};
use crate::engine::carrier::outer::{ETHERNET, FRESH, Marks};
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::inner::checksum::complete;
use crate::inner::ethernet::{self, link_header};
use crate::inner::headers::{Headers, IpVersion};
use crate::inner::mss;
use crate::inner::nested::{complete_hidden, complete_inside};
use crate::inner::payload::PayloadHeaders;
use crate::inner::segment::Superframe;
use crate::xsk::{Packet, Umem};

/// Outer TTL of frames, unless `cttl` sets another.
const FRAME_TTL: u8 = 64;
/// The bits of a TOS that are the DSCP (RFC 2474).
const DSCP: u8 = 0xFC;
/// Octets of both MAC addresses, which are before a tag.
const ADDRESSES: usize = 12;
/// Octets of a VLAN tag.
const TAG: usize = 4;

impl Admission<'_> {
    /// Admits a frame of one or more pieces: queues it, or the segments of a superframe. The caller puts pieces that are left back
    /// into the pool.
    ///
    /// The outer header depends on the frame:
    /// - TTL: `cttl`, or else [`FRAME_TTL`]. A frame has no TTL, and IP packets on a link often have a TTL of 1.
    /// - TOS: the inner DSCP. The ECN field is Not-ECT (RFC 6040, compatibility mode).
    /// - DF: copied if the frame fits the carrier path. A frame with DF that does not fit is dropped, and its sender is told if
    ///   the frame has no VLAN tag. The carrier's IP fragments any other frame that does not fit.
    pub(super) fn ethernet(&mut self, pieces: &mut Pieces) -> Result<(), Dropped> {
        let stamp = take_stamp(self.umem, pieces.first_mut().ok_or(Verdict::PrivateMalformed)?)?;
        let read_before = match stamp {
            EthernetStamp::Superframe(gso_size) => match self.cut_frame(pieces, gso_size)? {
                Some(whole) => Some(whole),
                None => return Ok(()),
            },
            _ => None,
        };
        let [_] = pieces.as_slice() else { return Err(Verdict::TooBig.into()) };
        pieces.pop().map_or(Ok(()), |packet| self.frame(packet, stamp, read_before))
    }

    /// Checks a frame, and queues it in place. `read_before`: the offset of the IP packet in it, and its headers, if they were
    /// read already.
    fn frame(
        &mut self,
        mut packet: Packet,
        stamp: EthernetStamp,
        read_before: Option<(usize, Headers)>,
    ) -> Result<(), Dropped> {
        let (at, end) = (packet.offset as usize, packet.offset as usize + packet.len as usize);
        let octets = self.umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed);
        let checked = octets.and_then(|octets| {
            let read = match &read_before {
                Some((header, ip)) => ethernet::read_before(octets, *header, *ip),
                None => ethernet::read(octets),
            };
            let mut headers = read.ok_or(Verdict::PrivateMalformed)?;
            let packet = match &read_before {
                Some((header, ip)) => octets.get_mut(*header..).zip(Some(ip)),
                None => headers.packet_mut(octets).map(|(packet, headers)| (packet, &*headers)),
            };
            match (stamp, packet) {
                (EthernetStamp::Hidden, _) => complete_hidden(octets),
                (EthernetStamp::Encapsulated, Some((packet, headers))) => complete_inside(packet, headers),
                (_, Some((packet, headers))) => complete(packet, headers),
                (_, None) => false,
            };
            let marks = self.marks_of_frame(octets, &headers)?;
            Ok(((data_form(self.tunnel)?, marks), headers))
        });
        self.queue_in_place(packet.frame, at, end, checked)
    }

    /// Segments a superframe, and queues each segment, with the headers before the IP packet, in its own frame. If the kernel has
    /// already segmented it, queues nothing and returns the offset of its IP packet, and the headers.
    fn cut_frame(&mut self, pieces: &Pieces, gso_size: u16) -> Result<Option<(usize, Headers)>, Dropped> {
        let umem = self.umem;
        let link = pieces.first().map(|first| first.data(umem)).unwrap_or_default();
        let header = link_header(link).ok_or(Verdict::PrivateMalformed)?;
        let (link, content) = link.split_at_checked(header).ok_or(Verdict::PrivateMalformed)?;
        let rest = pieces.iter().skip(1).map(|piece| piece.data(umem));
        let octets: ArrayVec<&[u8], MOST_PIECES> = [content].into_iter().chain(rest).collect();
        let mut superframe = Superframe::parse(&octets, gso_size)?;
        let segments = superframe.segments();
        if let (1, [_]) = (segments, pieces.as_slice()) {
            return Ok(Some((header, *superframe.headers())));
        }
        let all = |verdict| Dropped { verdict, packets: segments as u64 };
        let form = data_form(self.tunnel).map_err(all)?;
        if form.datagram(FRESH, header + superframe.longest()).end > umem.frame_size() as usize {
            return Err(all(Verdict::TooBig));
        }
        let of_longest = superframe.headers().of_segment(superframe.longest());
        let read = ethernet::read_before(link, header, of_longest).ok_or(all(Verdict::PrivateMalformed))?;
        // No segment is longer than the first, so its marks are right for all.
        let mut marks = None;
        for index in 0..segments {
            let left = |verdict| Dropped { verdict, packets: (segments - index) as u64 };
            let mut frame = self.pool.take().ok_or(left(Verdict::NoFrame))?;
            let place = &mut umem.chunk_mut(&mut frame)[FRESH..];
            place[..header].copy_from_slice(link);
            let octets = header + superframe.cut(&mut place[header..]).unwrap_or_default();
            let known = marks.map_or_else(|| self.marks_of_frame(&mut place[..octets], &read), Ok);
            match known {
                Ok(known) => {
                    marks = Some(known);
                    self.queue(frame, FRESH, octets, (form, known), Some(read.of_segment(octets - header)));
                }
                Err(verdict) => {
                    self.pool.put(frame);
                    return Err(left(verdict));
                }
            }
        }
        Ok(None)
    }

    /// Returns the fields of the outer header of a frame, and clamps the MSS.
    ///
    /// # Errors
    /// [`Verdict::TooBig`] if the frame does not fit the carrier path.
    fn marks_of_frame(&mut self, octets: &mut [u8], read: &PayloadHeaders) -> Result<Marks, Verdict> {
        let tunnel = self.tunnel;
        let whole = octets.len();
        if tunnel.mtu == TunnelMtu::NONE {
            return Err(Verdict::TooBig);
        }
        let ttl = if tunnel.cttl == 0 { FRAME_TTL } else { tunnel.cttl };
        let mut marks = Marks { tos: 0, ttl, dont_fragment: false };
        let (Some(headers), Some(packet)) = (read.ip(), octets.get_mut(read.link()..)) else { return Ok(marks) };
        let largest = tunnel.mtu.of(headers.version);
        if tunnel.clamp_mss {
            mss::clamp(packet, headers, tunnel.mtu.of(IpVersion::V4));
        }
        let dont_fragment = headers.dont_fragment && !tunnel.ignore_df;
        if dont_fragment && headers.total() > largest {
            if !read.is_tagged() {
                self.too_big.tell(packet, headers, largest, self.now);
            }
            return Err(Verdict::TooBig);
        }
        marks.tos = headers.tos & DSCP;
        // The MTU does not include VLAN tags.
        marks.dont_fragment = dont_fragment && whole <= ETHERNET + largest;
        Ok(marks)
    }
}

/// Removes the stamp from the first piece of a frame and returns it; [`EthernetStamp::Plain`] if there is none.
fn take_stamp(umem: &Umem, first: &mut Packet) -> Result<EthernetStamp, Verdict> {
    let (at, end) = (first.offset as usize, first.offset as usize + first.len as usize);
    let octets = umem.chunk_mut(&mut first.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed)?;
    let Some(tag) = octets.get(ADDRESSES..).and_then(<[u8]>::first_chunk::<TAG>) else {
        return Ok(EthernetStamp::Plain);
    };
    let [tpid @ .., high, low] = *tag;
    if tpid != STAMP_TPID {
        return Ok(EthernetStamp::Plain);
    }
    octets.copy_within(..ADDRESSES, TAG);
    first.offset += TAG as u32;
    first.len -= TAG as u32;
    Ok(EthernetStamp::from_tci(u16::from_be_bytes([high, low])))
}
