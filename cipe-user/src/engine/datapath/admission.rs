//! Checks packets from the private side, and segments superframes. [`super::frames`] does the same for Ethernet tunnels.

use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::{Stamp, Verdict, stamp};

use super::TooBig;
use super::packets::{Form, Outgoing};
use crate::engine::carrier::outer::{self, FRESH, Marks};
use crate::engine::tunnel::Tunnel;
use crate::inner::checksum::complete;
use crate::inner::fragment::Fragments;
use crate::inner::headers::{Headers, IpVersion};
use crate::inner::ip;
use crate::inner::nested::complete_inside;
use crate::inner::payload::PayloadHeaders;
use crate::inner::segment::Superframe;
use crate::wire::packet::Type;
use crate::xsk::{Frame as Chunk, Packet, Pool, Umem};

/// The most descriptors of one private frame. 64 KiB need 37 of them, since each chunk of 2048 octets has 256 octets of headroom.
pub(super) const MOST_PIECES: usize = 40;

/// The descriptors of one private frame.
pub(super) type Pieces = ArrayVec<Packet, MOST_PIECES>;

/// How a payload leaves, and the fields of its outer header.
pub(super) type WayOut = (Form, Marks);

/// Packets of one private frame that are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dropped {
    /// The reason.
    pub verdict: Verdict,
    /// The number of packets. For a superframe, the segments that were not queued.
    pub packets: u64,
}

impl From<Verdict> for Dropped {
    fn from(verdict: Verdict) -> Self {
        Self { verdict, packets: 1 }
    }
}

/// The parts of a datapath that admit the frames of a tunnel.
pub(super) struct Admission<'a> {
    /// The tunnel.
    pub tunnel: &'a Tunnel,
    /// The memory of all frames.
    pub umem: &'a Umem,
    /// Free frames.
    pub pool: &'a mut Pool,
    /// The queue of packets to seal.
    pub outgoing: &'a mut Vec<Outgoing>,
    /// The queue of ICMP messages to senders of packets that are too large.
    pub too_big: &'a mut TooBig,
    /// The time of the batch.
    pub now: Instant,
}

impl Admission<'_> {
    /// Returns whether a private frame is one packet that fits the MTU. A superframe never does, however small: it holds several
    /// UDP datagrams.
    pub(super) fn fits(&self, pieces: &Pieces) -> bool {
        let [packet] = pieces.as_slice() else { return false };
        let frame = packet.data(self.umem);
        let stamp = frame.first_chunk().copied().and_then(Stamp::from_mac);
        if stamp.is_some_and(|stamp| stamp.gso_size > 0) {
            return false;
        }
        let payload = frame.get(outer::ETHERNET..).unwrap_or_default();
        let version = if payload.first().is_some_and(|first| first >> 4 == 6) { IpVersion::V6 } else { IpVersion::V4 };
        payload.len() <= self.tunnel.mtu.of(version)
    }

    /// Checks a packet that is in one frame, and queues it in place.
    pub(super) fn single(&mut self, mut packet: Packet) -> Result<(), Dropped> {
        let (at, end) = (packet.offset as usize + outer::ETHERNET, packet.offset as usize + packet.len as usize);
        let stamp = stamp(self.umem, &packet);
        let payload = self.umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed);
        let checked = payload.and_then(|payload| {
            let headers = read(payload)?;
            complete_checksum(stamp?, payload, &headers);
            Ok((way_out(self.tunnel, &headers)?, PayloadHeaders::of_packet(headers)))
        });
        self.queue_in_place(packet.frame, at, end, checked)
    }

    /// Segments a superframe, or fragments a packet that is larger than the tunnel's MTU. Each part gets its own frame.
    pub(super) fn cut(&mut self, pieces: &mut Pieces) -> Result<(), Dropped> {
        let stamp = stamp(self.umem, pieces.first().ok_or(Verdict::PrivateMalformed)?)?;
        if stamp.gso_size > 0 {
            return self.cut_superframe(pieces, stamp.gso_size);
        }
        let [packet] = pieces.as_mut_slice() else { return Err(Verdict::TooBig.into()) };
        let octets = packet.offset as usize + outer::ETHERNET..packet.offset as usize + packet.len as usize;
        let payload = self.umem.chunk_mut(&mut packet.frame).get_mut(octets).ok_or(Verdict::PrivateMalformed)?;
        let headers = read(payload)?;
        complete_checksum(stamp, payload, &headers);
        self.fragment(payload, &headers)
    }

    fn cut_superframe(&mut self, pieces: &Pieces, gso_size: u16) -> Result<(), Dropped> {
        let octets: ArrayVec<&[u8], MOST_PIECES> = pieces
            .iter()
            .enumerate()
            .map(|(index, piece)| {
                piece.data(self.umem).get(if index == 0 { outer::ETHERNET } else { 0 }..).unwrap_or_default()
            })
            .collect();
        let mut superframe = Superframe::parse(&octets, gso_size)?;
        let segments = superframe.segments();
        let all = |verdict| Dropped { verdict, packets: segments as u64 };
        let headers = *superframe.headers();
        let way = way_out(self.tunnel, &headers).map_err(all)?;
        if way.0.datagram(FRESH, superframe.longest()).end > self.umem.frame_size() as usize {
            return Err(all(Verdict::TooBig));
        }
        let largest = self.tunnel.mtu.of(headers.version);
        for index in 0..segments {
            let left = |dropped: Dropped| Dropped { packets: (segments - index) as u64, ..dropped };
            let mut frame = self.pool.take().ok_or_else(|| left(Verdict::NoFrame.into()))?;
            match superframe.cut(&mut self.umem.chunk_mut(&mut frame)[FRESH..]) {
                Some(octets) if octets > largest => {
                    let segment = &self.umem.chunk(&frame)[FRESH..FRESH + octets];
                    let cut = self.fragment(segment, &headers.of_segment(octets));
                    self.pool.put(frame);
                    // The sender will resend the rest in smaller segments too.
                    cut.map_err(left)?;
                }
                Some(octets) => {
                    let headers = PayloadHeaders::of_packet(headers).of_segment(octets);
                    self.queue(frame, FRESH, octets, way, Some(headers));
                }
                None => self.pool.put(frame),
            }
        }
        Ok(())
    }

    /// Queues the fragments of a packet that is larger than the tunnel's MTU. With DF, drops it and tells its sender.
    fn fragment(&mut self, packet: &[u8], headers: &Headers) -> Result<(), Dropped> {
        let largest = self.tunnel.mtu.of(headers.version);
        let mut fragments = match Fragments::new(packet, headers, largest) {
            Err(Verdict::TooBig) => {
                self.too_big.tell(packet, headers, largest, self.now);
                return Err(Verdict::TooBig.into());
            }
            other => other?,
        };
        let way = way_out(self.tunnel, headers)?;
        let mut of_first = Some(PayloadHeaders::of_packet(*headers));
        loop {
            let mut frame = self.pool.take().ok_or(Verdict::NoFrame)?;
            match fragments.cut(&mut self.umem.chunk_mut(&mut frame)[FRESH..]) {
                Some(octets) => self.queue(frame, FRESH, octets, way, of_first.take()),
                None => {
                    self.pool.put(frame);
                    return Ok(());
                }
            }
        }
    }

    /// Queues the payload at `at..end` of a frame, if `checked` is right and the frame has room to seal it in place.
    pub(super) fn queue_in_place(
        &mut self,
        frame: Chunk,
        at: usize,
        end: usize,
        checked: Result<(WayOut, PayloadHeaders), Verdict>,
    ) -> Result<(), Dropped> {
        let frame_size = self.umem.frame_size() as usize;
        match checked {
            Ok((way, headers)) if way.0.datagram(at, end.saturating_sub(at)).end <= frame_size => {
                self.queue(frame, at, end - at, way, Some(headers));
                Ok(())
            }
            other => {
                self.pool.put(frame);
                Err(other.err().unwrap_or(Verdict::TooBig).into())
            }
        }
    }

    /// Queues `octets` octets at `at` of a frame, which has room to seal them in place. `headers` is `None` for a fragment other
    /// than the first.
    pub(super) fn queue(
        &mut self,
        frame: Chunk,
        at: usize,
        octets: usize,
        (form, marks): WayOut,
        headers: Option<PayloadHeaders>,
    ) {
        let out = Outgoing::new(self.tunnel.number, frame, at, octets, Type::Data, form, marks);
        self.outgoing.push(Outgoing { headers, ..out });
    }
}

/// Reads the stamp from the first piece of a frame.
fn stamp(umem: &Umem, first: &Packet) -> Result<Stamp, Verdict> {
    let mac: &[u8; stamp::LEN] = first.data(umem).first_chunk().ok_or(Verdict::PrivateMalformed)?;
    Stamp::from_mac(*mac).ok_or(Verdict::PrivateUnstamped)
}

/// Completes the checksum that the local stack left to the device, if it did.
fn complete_checksum(stamp: Stamp, packet: &mut [u8], headers: &Headers) {
    if stamp.encapsulated {
        complete_inside(packet, headers);
    } else {
        complete(packet, headers);
    }
}

/// Returns how a packet leaves, and the fields that its outer header copies.
fn way_out(tunnel: &Tunnel, headers: &Headers) -> Result<WayOut, Verdict> {
    let form = data_form(tunnel)?;
    let ttl = if tunnel.cttl == 0 { headers.ttl } else { tunnel.cttl };
    Ok((form, Marks { tos: headers.tos, ttl, dont_fragment: headers.dont_fragment && !tunnel.ignore_df }))
}

/// Returns how data leaves.
pub(super) fn data_form(tunnel: &Tunnel) -> Result<Form, Verdict> {
    if tunnel.is_orphaned {
        return Err(Verdict::TunnelDead);
    }
    if tunnel.peer.is_none() {
        return Err(Verdict::NoPeer);
    }
    if tunnel.nokey {
        Ok(Form::Whole)
    } else if tunnel.sends_sealed() {
        Ok(Form::Sealed)
    } else if tunnel.sends_unsealed() {
        tunnel.data_slot().map(Form::Keyed)
    } else {
        Err(Verdict::NoSendKey)
    }
}

/// Reads the headers of an outbound packet. This is the only time that they are read.
fn read(payload: &[u8]) -> Result<Headers, Verdict> {
    ip::check(payload).map_err(|_| match payload.first().map(|octet| octet >> 4) {
        Some(4 | 6) => Verdict::PrivateMalformed,
        _ => Verdict::PrivateNotIp,
    })
}
