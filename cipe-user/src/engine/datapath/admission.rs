//! What may go out: checks on frames from the private side, and the cutting of superframes.

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict, stamp};

use super::FRESH;
use super::packets::Outgoing;
use crate::engine::carrier::outer::{self, Marks};
use crate::engine::icmp::Icmp;
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
use crate::xsk::{Packet, Pool, Umem};

/// The most descriptors of one private frame: 64 KiB need 37 of them, in frames of 2048 octets with the kernel's 256 in front.
const MOST_PIECES: usize = 40;

/// Outer TTL of frames, unless `cttl` says another.
const FRAME_TTL: u8 = 64;
/// The bits of a TOS that are the DSCP (RFC 2474).
const DSCP: u8 = 0xFC;

/// The descriptors of one private frame.
pub type Pieces = ArrayVec<Packet, MOST_PIECES>;

/// Checks a packet that came in one frame, and queues it where it stands.
pub fn single(
    tunnel: &Tunnel,
    umem: &Umem,
    mut packet: Packet,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
) -> Result<(), Verdict> {
    let stamp = stamp(umem, &packet);
    let at = packet.offset as usize + outer::ETHERNET;
    let end = packet.offset as usize + packet.len as usize;
    let checked =
        umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed).and_then(|payload| {
            let inner = ip::check(payload).map_err(|_| malformed(payload))?;
            complete_checksum(stamp?, payload);
            way_out(tunnel, &inner)
        });
    let fits = at + packet::sealed_len(end.saturating_sub(at)) <= umem.frame_size() as usize;
    match checked {
        Ok((slot, marks)) if fits => {
            outgoing.push(Outgoing::new(tunnel.number, packet.frame, at, end - at, Type::Data, slot, marks));
            Ok(())
        }
        other => {
            pool.put(packet.frame);
            other.and(Err(Verdict::TooBig))
        }
    }
}

/// Checks an Ethernet frame (protocol 4), and queues it where it stands.
///
/// A frame has no TTL of its own, and TTLs of 1 are usual on a link: without `cttl` the outer packet has [`FRAME_TTL`]. Of a TOS
/// the outer packet has the DSCP; its ECN field says that it takes no part (RFC 6040, compatibility mode). DF is copied where
/// the frame fits the carrier path; with DF, what does not fit is dropped, and its sender told if this host has a way there. All
/// else the carrier's IP cuts.
pub fn frame(
    tunnel: &Tunnel,
    umem: &Umem,
    mut packet: Packet,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
    icmp: &mut Icmp,
) -> Result<(), Verdict> {
    let at = packet.offset as usize;
    let end = at + packet.len as usize;
    let has_room = at + packet::sealed_len(end - at) <= umem.frame_size() as usize;
    let checked = umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed);
    let checked = checked.and_then(|octets| marks_of_frame(tunnel, octets, icmp));
    let checked = checked.and_then(|marks| Ok((data_slot(tunnel)?, marks)));
    match checked {
        Ok((slot, marks)) if has_room => {
            outgoing.push(Outgoing::new(tunnel.number, packet.frame, at, end - at, Type::Data, slot, marks));
            Ok(())
        }
        other => {
            pool.put(packet.frame);
            other.and(Err(Verdict::TooBig))
        }
    }
}

/// What the outer header of a frame says; [`Verdict::TooBig`] if the carrier path does not take it.
fn marks_of_frame(tunnel: &Tunnel, octets: &mut [u8], icmp: &mut Icmp) -> Result<Marks, Verdict> {
    let frame = Frame::parse(octets).ok_or(Verdict::PrivateMalformed)?;
    let (header, is_tagged, inner) = (frame.header(), frame.is_tagged(), frame.ip());
    if tunnel.mtu == TunnelMtu::NONE {
        return Err(Verdict::TooBig);
    }
    let mut marks = Marks { tos: 0, ttl: if tunnel.cttl == 0 { FRAME_TTL } else { tunnel.cttl }, dont_fragment: false };
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
            icmp.too_big(&octets[header..header + inner.total], largest);
        }
        return Err(Verdict::TooBig);
    }
    marks.tos = inner.tos & DSCP;
    // Tags are more than the MTU counts.
    marks.dont_fragment = dont_fragment && octets.len() <= outer::ETHERNET + largest;
    Ok(marks)
}

/// Cuts what cannot go as it is: superframes, and packets larger than the tunnel takes; each part in a frame of its own.
pub fn cut(
    tunnel: &Tunnel,
    umem: &Umem,
    pieces: &mut Pieces,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
    icmp: &mut Icmp,
) -> Result<(), Verdict> {
    let stamp = stamp(umem, pieces.first().ok_or(Verdict::PrivateMalformed)?)?;
    if stamp.gso_size == 0 {
        let [packet] = pieces.as_mut_slice() else { return Err(Verdict::TooBig) };
        let octets = packet.offset as usize + outer::ETHERNET..packet.offset as usize + packet.len as usize;
        let payload = umem.chunk_mut(&mut packet.frame).get_mut(octets).ok_or(Verdict::PrivateMalformed)?;
        ip::check(payload).map_err(|_| malformed(payload))?;
        complete_checksum(stamp, payload);
        return fragment(tunnel, umem, payload, outgoing, pool, icmp);
    }
    let octets: ArrayVec<&[u8], MOST_PIECES> = pieces
        .iter()
        .enumerate()
        .map(|(index, piece)| piece.data(umem).get(if index == 0 { outer::ETHERNET } else { 0 }..).unwrap_or_default())
        .collect();
    let mut superframe = Superframe::parse(&octets, stamp.gso_size)?;
    if FRESH + packet::sealed_len(superframe.longest()) > umem.frame_size() as usize {
        return Err(Verdict::TooBig);
    }
    let (slot, marks) = way_out(tunnel, superframe.ip())?;
    let largest = tunnel.mtu.of(version(superframe.ip()));
    for _ in 0..superframe.segments() {
        let mut frame = pool.take().ok_or(Verdict::NoFrame)?;
        match superframe.cut(&mut umem.chunk_mut(&mut frame)[FRESH..]) {
            Some(octets) if octets > largest => {
                let segment = &umem.chunk(&frame)[FRESH..FRESH + octets];
                let cut = fragment(tunnel, umem, segment, outgoing, pool, icmp);
                pool.put(frame);
                cut?;
            }
            Some(octets) => {
                outgoing.push(Outgoing::new(tunnel.number, frame, FRESH, octets, Type::Data, slot, marks));
            }
            None => pool.put(frame),
        }
    }
    Ok(())
}

/// Queues the fragments of a packet that is larger than the tunnel takes, or tells its sender if it must not be cut.
fn fragment(
    tunnel: &Tunnel,
    umem: &Umem,
    packet: &[u8],
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
    icmp: &mut Icmp,
) -> Result<(), Verdict> {
    let inner = Inner::parse(packet).ok_or(Verdict::PrivateMalformed)?;
    let largest = tunnel.mtu.of(version(&inner));
    let mut fragments = match Fragments::parse(packet, largest) {
        Err(Verdict::TooBig) => {
            icmp.too_big(packet, largest);
            return Err(Verdict::TooBig);
        }
        other => other?,
    };
    let (slot, marks) = way_out(tunnel, &inner)?;
    loop {
        let mut frame = pool.take().ok_or(Verdict::NoFrame)?;
        match fragments.cut(&mut umem.chunk_mut(&mut frame)[FRESH..]) {
            Some(octets) => {
                outgoing.push(Outgoing::new(tunnel.number, frame, FRESH, octets, Type::Data, slot, marks));
            }
            None => {
                pool.put(frame);
                return Ok(());
            }
        }
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

/// Whether a private frame is one packet that may go as it is. A superframe may not, however small: its UDP datagrams are
/// several.
pub fn fits(tunnel: &Tunnel, umem: &Umem, pieces: &Pieces) -> bool {
    let [packet] = pieces.as_slice() else { return false };
    let frame = packet.data(umem);
    let stamp = frame.first_chunk().copied().and_then(Stamp::from_mac);
    if stamp.is_some_and(|stamp| stamp.gso_size > 0) {
        return false;
    }
    let payload = frame.get(outer::ETHERNET..).unwrap_or_default();
    let version = if payload.first().is_some_and(|first| first >> 4 == 6) { Version::V6 } else { Version::V4 };
    payload.len() <= tunnel.mtu.of(version)
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
