//! The stamp of Ethernet tunnels: one more VLAN tag in front of the frame, which the engine removes.

use aya_ebpf::{
    helpers::generated::{bpf_skb_vlan_pop, bpf_skb_vlan_push},
    programs::TcContext,
};
use cipe_common::{EthernetStamp, stamp::STAMP_TPID};

use crate::{
    contents::{Contents, contents, is_tcp, is_unfinished},
    frame::{
        BEHIND_ONE, BEHIND_TWO, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front, Vlan, behind_tags, is_tag,
    },
};

/// `gso_size` of SCTP, which the kernel segments.
const GSO_BY_FRAGS: u16 = 0xFFFF;

/// The frame has no Ethernet header, or the kernel had no memory.
pub struct Failed;

impl From<i64> for Failed {
    fn from(_: i64) -> Self {
        Self
    }
}

/// A VLAN tag, in network order.
#[derive(Clone, Copy)]
struct Tag {
    tpid: [u8; 2],
    tci: [u8; 2],
}

/// Pushes the tag with a frame's stamp. A plain frame gets no tag, unless its own first tag has the same TPID.
#[inline(always)]
pub fn stamp(ctx: &TcContext, gso_size: u16) -> Result<(), Failed> {
    let beside = beside(ctx);
    let first = match beside {
        Some(tag) => tag.tpid,
        None => Front::of_tc(ctx).at::<Ethernet>(0).ok_or(Failed)?.ethertype,
    };
    match of_frame(ctx, beside, gso_size)? {
        EthernetStamp::Plain if first != STAMP_TPID => Ok(()),
        stamp => push(ctx, Tag { tpid: STAMP_TPID, tci: stamp.to_tci().to_be_bytes() }),
    }
}

/// Returns the stamp of a frame.
#[inline(always)]
fn of_frame(ctx: &TcContext, beside: Option<Tag>, gso_size: u16) -> Result<EthernetStamp, Failed> {
    let superframe = match gso_size {
        0 | GSO_BY_FRAGS => EthernetStamp::Plain,
        _ => EthernetStamp::Superframe(gso_size),
    };
    let front = Front::of_tc(ctx);
    let (tags, ethertype) = behind_tags(front).ok_or(Failed)?;
    // The engine looks behind two tags at most. A tag in the metadata is one of them.
    let is_known = tags < 2 || beside.is_none();
    if is_known && matches!(ethertype, ETHERTYPE_IPV4 | ETHERTYPE_IPV6) {
        let is_tcp = match tags {
            0 => is_tcp::<ETHERNET>(front, ethertype),
            1 => is_tcp::<BEHIND_ONE>(front, ethertype),
            _ => is_tcp::<BEHIND_TWO>(front, ethertype),
        };
        if is_tcp {
            return Ok(superframe);
        }
        if let Some(contents) = contents_behind(ctx, beside, tags, ethertype)? {
            return Ok(match contents {
                Contents::Plain => superframe,
                Contents::Encapsulated => EthernetStamp::Encapsulated,
                // SCTP, or UDP that the kernel cuts into fragments.
                Contents::Other => EthernetStamp::Plain,
            });
        }
    }
    // MPLS, many tags and the like.
    if superframe == EthernetStamp::Plain && is_unfinished(ctx)? {
        return Ok(EthernetStamp::Hidden);
    }
    Ok(superframe)
}

/// Returns the kind of the packet behind `tags` tags; `None` if `skb->protocol` does not match the frame. The kernel
/// answers only if the frame has no tag in it, so this function removes the first tag for the time of the question. The
/// kernel then moves the other of two tags to the metadata.
#[inline(always)]
fn contents_behind(
    ctx: &TcContext,
    beside: Option<Tag>,
    tags: usize,
    ethertype: [u8; 2],
) -> Result<Option<Contents>, Failed> {
    // SAFETY: the context is the one the kernel called us with. The field holds the ethertype in network order in its low half.
    let protocol = unsafe { (*ctx.skb.skb).protocol as u16 }.to_ne_bytes();
    if tags == 0 {
        return Ok((protocol == ethertype).then(|| contents(ctx)));
    }
    if !is_tag(protocol) {
        return Ok(None);
    }
    let first = match beside {
        Some(tag) => tag,
        None => {
            let front = Front::of_tc(ctx);
            let tpid = front.at::<Ethernet>(0).ok_or(Failed)?.ethertype;
            Tag { tpid, tci: front.at::<Vlan>(ETHERNET).ok_or(Failed)?.tci }
        }
    };
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_skb_vlan_pop(ctx.skb.skb) } < 0 {
        return Err(Failed);
    }
    let contents = contents(ctx);
    push(ctx, first)?;
    Ok(Some(contents))
}

/// Returns the VLAN tag that the kernel keeps in a frame's metadata.
#[inline(always)]
fn beside(ctx: &TcContext) -> Option<Tag> {
    // SAFETY: the context is the one the kernel called us with; the verifier checks each field access.
    let (is_there, tpid, tci) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).vlan_present, (*skb).vlan_proto, (*skb).vlan_tci)
    };
    // The TPID is in network order, the TCI in host order.
    (is_there != 0).then(|| Tag { tpid: (tpid as u16).to_ne_bytes(), tci: (tci as u16).to_be_bytes() })
}

/// Puts a tag into the frame's metadata. The kernel writes a tag that is there already into the frame.
#[inline(always)]
fn push(ctx: &TcContext, tag: Tag) -> Result<(), Failed> {
    let (tpid, tci) = (u16::from_ne_bytes(tag.tpid), u16::from_be_bytes(tag.tci));
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_skb_vlan_push(ctx.skb.skb, tpid, tci) } < 0 { Err(Failed) } else { Ok(()) }
}
