//! What may go out: checks on frames from the private side, and the cutting of superframes.

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Stamp, Verdict, stamp};

use super::FRESH;
use super::outbound::Outgoing;
use crate::engine::checksum::complete_partial;
use crate::engine::outer::{self, Marks};
use crate::engine::segment::Superframe;
use crate::engine::tunnel::Tunnel;
use crate::wire::inner::{self, Inner};
use crate::wire::packet::{self, Type};
use crate::xsk::{Packet, Pool, Umem};

/// The descriptors of one private frame; 64 KiB need 18 of them.
pub type Pieces = ArrayVec<Packet, 32>;

/// Checks a packet that came in one frame, and queues it where it stands.
pub fn single(
    tunnel: &Tunnel,
    umem: &Umem,
    mut packet: Packet,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
) -> Result<(), Verdict> {
    let at = packet.offset as usize + outer::ETHERNET;
    let end = packet.offset as usize + packet.len as usize;
    let checked =
        umem.chunk_mut(&mut packet.frame).get_mut(at..end).ok_or(Verdict::PrivateMalformed).and_then(|payload| {
            let inner = inner::check(payload).map_err(|_| malformed(payload))?;
            complete_partial(payload);
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

/// Cuts a superframe into packets, each in a frame of its own.
pub fn cut(
    tunnel: &Tunnel,
    umem: &Umem,
    pieces: &Pieces,
    outgoing: &mut Vec<Outgoing>,
    pool: &mut Pool,
) -> Result<(), Verdict> {
    let mac: [u8; stamp::LEN] =
        pieces.first().and_then(|first| first.data(umem).first_chunk().copied()).ok_or(Verdict::PrivateMalformed)?;
    let stamp = Stamp::from_mac(mac).ok_or(Verdict::PrivateUnstamped)?;
    if stamp.gso_size == 0 {
        return Err(Verdict::TooBig);
    }
    let octets: ArrayVec<&[u8], 32> = pieces
        .iter()
        .enumerate()
        .map(|(index, piece)| piece.data(umem).get(if index == 0 { outer::ETHERNET } else { 0 }..).unwrap_or_default())
        .collect();
    let mut superframe = Superframe::parse(&octets, stamp.gso_size)?;
    if superframe.longest() > tunnel.mtu {
        return Err(Verdict::TooBig);
    }
    let (slot, marks) = way_out(tunnel, superframe.ip())?;
    for _ in 0..superframe.segments() {
        let mut frame = pool.take().ok_or(Verdict::NoFrame)?;
        match superframe.cut(&mut umem.chunk_mut(&mut frame)[FRESH..]) {
            Some(octets) => {
                outgoing.push(Outgoing::new(tunnel.number, frame, FRESH, octets, Type::Data, slot, marks));
            }
            None => pool.put(frame),
        }
    }
    Ok(())
}

/// The key to seal a packet under, and what its outer header copies.
fn way_out(tunnel: &Tunnel, inner: &Inner) -> Result<(Option<Slot>, Marks), Verdict> {
    if tunnel.peer.is_none() {
        return Err(Verdict::NoPeer);
    }
    let slot = if tunnel.nokey { None } else { Some(tunnel.data_slot()?) };
    let ttl = if tunnel.cttl == 0 { inner.ttl } else { tunnel.cttl };
    Ok((slot, Marks { tos: inner.tos, ttl, dont_fragment: inner.dont_fragment && !tunnel.ignore_df }))
}

fn malformed(payload: &[u8]) -> Verdict {
    match payload.first().map(|octet| octet >> 4) {
        Some(4 | 6) => Verdict::PrivateMalformed,
        _ => Verdict::PrivateNotIp,
    }
}
