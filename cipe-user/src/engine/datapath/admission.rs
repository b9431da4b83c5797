//! What may go out: checks on frames from the private side, and the cutting of superframes.

use std::time::Instant;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict, stamp};

use super::TooBig;
use super::packets::Outgoing;
use crate::engine::carrier::outer::{self, FRESH, Marks};
use crate::engine::tunnel::Tunnel;
use crate::engine::tunnel::mtu::TunnelMtu;
use crate::inner::checksum::complete_partial;
use crate::inner::ethernet::Frame;
use crate::inner::fragment::Fragments;
use crate::inner::headers::Version;
use crate::inner::ip::{self, Inner};
use crate::inner::mss;
use crate::inner::nested::complete_inside;
use crate::inner::segment::Superframe;
use crate::wire::packet::{self, Type};
use crate::xsk::{Frame as Chunk, Packet, Pool, Umem};

/// The most descriptors of one private frame: 64 KiB need 37 of them, in frames of 2048 octets with the kernel's 256 in front.
const MOST_PIECES: usize = 40;

/// Outer TTL of frames, unless `cttl` says another.
const FRAME_TTL: u8 = 64;
/// The bits of a TOS that are the DSCP (RFC 2474).
const DSCP: u8 = 0xFC;

/// The descriptors of one private frame.
pub type Pieces = ArrayVec<Packet, MOST_PIECES>;

/// Packets of one private frame that may not go out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dropped {
    /// Why.
    pub verdict: Verdict,
    /// How many: of a superframe, the segments that were not queued.
    pub packets: u64,
}

impl From<Verdict> for Dropped {
    fn from(verdict: Verdict) -> Self {
        Self { verdict, packets: 1 }
    }
}

/// What admits the frames of a tunnel.
pub struct Admission<'a> {
    /// The tunnel.
    pub tunnel: &'a Tunnel,
    /// The memory of all frames.
    pub umem: &'a Umem,
    /// Free frames.
    pub pool: &'a mut Pool,
    /// Where packets are queued that are to be sealed.
    pub outgoing: &'a mut Vec<Outgoing>,
    /// Where senders are told what is too large.
    pub too_big: &'a mut TooBig,
    /// The time of the batch.
    pub now: Instant,
}

impl Admission<'_> {
    /// Whether a private frame is one packet that may go as it is. A superframe may not, however small: its UDP datagrams are
    /// several.
    pub fn fits(&self, pieces: &Pieces) -> bool {
        let [packet] = pieces.as_slice() else { return false };
        let frame = packet.data(self.umem);
        let stamp = frame.first_chunk().copied().and_then(Stamp::from_mac);
        if stamp.is_some_and(|stamp| stamp.gso_size > 0) {
            return false;
        }
        let payload = frame.get(outer::ETHERNET..).unwrap_or_default();
        let version = if payload.first().is_some_and(|first| first >> 4 == 6) { Version::V6 } else { Version::V4 };
        payload.len() <= self.tunnel.mtu.of(version)
    }

    /// Checks a packet that came in one frame, and queues it where it stands.
    pub fn single(&mut self, mut packet: Packet) -> Result<(), Dropped> {
        let (at, end) = (packet.offset as usize + outer::ETHERNET, packet.offset as usize + packet.len as usize);
        let stamp = stamp(self.umem, &packet);
        let payload = self.umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed);
        let checked = payload.and_then(|payload| {
            let inner = ip::check(payload).map_err(|_| malformed(payload))?;
            complete_checksum(stamp?, payload);
            way_out(self.tunnel, &inner)
        });
        self.queue_in_place(packet.frame, at, end, checked)
    }

    /// Checks an Ethernet frame (protocol 4), and queues it where it stands.
    ///
    /// A frame has no TTL of its own, and TTLs of 1 are usual on a link: without `cttl` the outer packet has [`FRAME_TTL`]. Of a
    /// TOS the outer packet has the DSCP; its ECN field says that it takes no part (RFC 6040, compatibility mode). DF is copied
    /// where the frame fits the carrier path; with DF, what does not fit is dropped, and its sender told if this host has a way
    /// there. All else the carrier's IP cuts.
    pub fn frame(&mut self, mut packet: Packet) -> Result<(), Dropped> {
        let (at, end) = (packet.offset as usize, packet.offset as usize + packet.len as usize);
        let octets = self.umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed);
        let checked = octets.and_then(|octets| {
            let marks = self.marks_of_frame(octets)?;
            Ok((data_slot(self.tunnel)?, marks))
        });
        self.queue_in_place(packet.frame, at, end, checked)
    }

    /// Cuts what cannot go as it is: superframes, and packets larger than the tunnel takes; each part in a frame of its own.
    pub fn cut(&mut self, pieces: &mut Pieces) -> Result<(), Dropped> {
        let stamp = stamp(self.umem, pieces.first().ok_or(Verdict::PrivateMalformed)?)?;
        if stamp.gso_size > 0 {
            return self.cut_superframe(pieces, stamp.gso_size);
        }
        let [packet] = pieces.as_mut_slice() else { return Err(Verdict::TooBig.into()) };
        let octets = packet.offset as usize + outer::ETHERNET..packet.offset as usize + packet.len as usize;
        let payload = self.umem.chunk_mut(&mut packet.frame).get_mut(octets).ok_or(Verdict::PrivateMalformed)?;
        ip::check(payload).map_err(|_| malformed(payload))?;
        complete_checksum(stamp, payload);
        self.fragment(payload)
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
        if FRESH + packet::sealed_len(superframe.longest()) > self.umem.frame_size() as usize {
            return Err(all(Verdict::TooBig));
        }
        let (slot, marks) = way_out(self.tunnel, superframe.ip()).map_err(all)?;
        let largest = self.tunnel.mtu.of(version(superframe.ip()));
        for index in 0..segments {
            let left = |dropped: Dropped| Dropped { packets: (segments - index) as u64, ..dropped };
            let mut frame = self.pool.take().ok_or_else(|| left(Verdict::NoFrame.into()))?;
            match superframe.cut(&mut self.umem.chunk_mut(&mut frame)[FRESH..]) {
                Some(octets) if octets > largest => {
                    let cut = self.fragment(&self.umem.chunk(&frame)[FRESH..FRESH + octets]);
                    self.pool.put(frame);
                    // Its sender cuts anew what follows, too.
                    cut.map_err(left)?;
                }
                Some(octets) => {
                    let out = Outgoing::new(self.tunnel.number, frame, FRESH, octets, Type::Data, slot, marks);
                    self.outgoing.push(out);
                }
                None => self.pool.put(frame),
            }
        }
        Ok(())
    }

    /// Queues the fragments of a packet that is larger than the tunnel takes, or tells its sender if it must not be cut.
    fn fragment(&mut self, packet: &[u8]) -> Result<(), Dropped> {
        let inner = Inner::parse(packet).ok_or(Verdict::PrivateMalformed)?;
        let largest = self.tunnel.mtu.of(version(&inner));
        let mut fragments = match Fragments::parse(packet, largest) {
            Err(Verdict::TooBig) => {
                self.too_big.tell(packet, largest, self.now);
                return Err(Verdict::TooBig.into());
            }
            other => other?,
        };
        let (slot, marks) = way_out(self.tunnel, &inner)?;
        loop {
            let mut frame = self.pool.take().ok_or(Verdict::NoFrame)?;
            match fragments.cut(&mut self.umem.chunk_mut(&mut frame)[FRESH..]) {
                Some(octets) => {
                    let out = Outgoing::new(self.tunnel.number, frame, FRESH, octets, Type::Data, slot, marks);
                    self.outgoing.push(out);
                }
                None => {
                    self.pool.put(frame);
                    return Ok(());
                }
            }
        }
    }

    /// Queues what stands at `at..end` of a frame, if it was found right and has room to be sealed there.
    fn queue_in_place(
        &mut self,
        frame: Chunk,
        at: usize,
        end: usize,
        checked: Result<(Option<Slot>, Marks), Verdict>,
    ) -> Result<(), Dropped> {
        let fits = at + packet::sealed_len(end.saturating_sub(at)) <= self.umem.frame_size() as usize;
        match checked {
            Ok((slot, marks)) if fits => {
                let out = Outgoing::new(self.tunnel.number, frame, at, end - at, Type::Data, slot, marks);
                self.outgoing.push(out);
                Ok(())
            }
            other => {
                self.pool.put(frame);
                Err(other.err().unwrap_or(Verdict::TooBig).into())
            }
        }
    }

    /// What the outer header of a frame says; [`Verdict::TooBig`] if the carrier path does not take it.
    fn marks_of_frame(&mut self, octets: &mut [u8]) -> Result<Marks, Verdict> {
        let tunnel = self.tunnel;
        let frame = Frame::parse(octets).ok_or(Verdict::PrivateMalformed)?;
        let (header, is_tagged, inner) = (frame.header(), frame.is_tagged(), frame.ip());
        if tunnel.mtu == TunnelMtu::NONE {
            return Err(Verdict::TooBig);
        }
        let ttl = if tunnel.cttl == 0 { FRAME_TTL } else { tunnel.cttl };
        let mut marks = Marks { tos: 0, ttl, dont_fragment: false };
        let Some(inner) = inner else { return Ok(marks) };
        let largest = tunnel.mtu.of(version(&inner));
        // Nobody has completed it where an operator has switched the offload on.
        complete_partial(&mut octets[header..]);
        if tunnel.clamp_mss {
            mss::clamp(&mut octets[header..], tunnel.mtu.of(Version::V4));
        }
        let dont_fragment = inner.dont_fragment && !tunnel.ignore_df;
        if dont_fragment && inner.total > largest {
            if !is_tagged {
                self.too_big.tell(&octets[header..header + inner.total], largest, self.now);
            }
            return Err(Verdict::TooBig);
        }
        marks.tos = inner.tos & DSCP;
        // Tags are more than the MTU counts.
        marks.dont_fragment = dont_fragment && octets.len() <= outer::ETHERNET + largest;
        Ok(marks)
    }
}

/// What TC knows of a frame, by its first piece.
fn stamp(umem: &Umem, first: &Packet) -> Result<Stamp, Verdict> {
    let mac: &[u8; stamp::LEN] = first.data(umem).first_chunk().ok_or(Verdict::PrivateMalformed)?;
    Stamp::from_mac(*mac).ok_or(Verdict::PrivateUnstamped)
}

/// Completes the checksum that the local stack left to the device, if it did.
fn complete_checksum(stamp: Stamp, packet: &mut [u8]) {
    if stamp.encapsulated {
        complete_inside(packet);
    } else {
        complete_partial(packet);
    }
}

fn version(inner: &Inner) -> Version {
    if inner.source.is_ipv4() { Version::V4 } else { Version::V6 }
}

/// The key to seal a packet under, and what its outer header copies.
fn way_out(tunnel: &Tunnel, inner: &Inner) -> Result<(Option<Slot>, Marks), Verdict> {
    let slot = data_slot(tunnel)?;
    let ttl = if tunnel.cttl == 0 { inner.ttl } else { tunnel.cttl };
    Ok((slot, Marks { tos: inner.tos, ttl, dont_fragment: inner.dont_fragment && !tunnel.ignore_df }))
}

/// The key to seal data under; `None`: bare (`nokey`).
fn data_slot(tunnel: &Tunnel) -> Result<Option<Slot>, Verdict> {
    if tunnel.peer.is_none() {
        return Err(Verdict::NoPeer);
    }
    if tunnel.nokey { Ok(None) } else { tunnel.data_slot().map(Some) }
}

fn malformed(payload: &[u8]) -> Verdict {
    match payload.first().map(|octet| octet >> 4) {
        Some(4 | 6) => Verdict::PrivateMalformed,
        _ => Verdict::PrivateNotIp,
    }
}
